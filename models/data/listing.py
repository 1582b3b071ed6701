"""Which videos a folder or a manifest names, with their labels."""

import csv
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
    | {".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
_log = logging.getLogger(__name__)
_FIELDS = ("path", "label", "start")


@dataclass(frozen=True)
class Video:
    """A video file: where it is, its name in reports, its class, and the frame where a clip must start (None: any)."""

    path: Path
    name: str
    label: int
    start: int | None = None


@dataclass(frozen=True)
class Listing:
    """The videos in a fixed order, the names of the classes, and the files of the folder that are no videos."""

    videos: list[Video]
    classes: list[str]
    others: list[str]


def list_videos(source: str | Path) -> Listing:
    """List a folder (searched through), a manifest (.csv, .txt, .jsonl) or one video file.

    A folder's classes are the names of its direct sub-folders, sorted; files beside them are of class ".". A manifest
    line is `path[,label[,start]]`, with an optional header, or an object with these keys; paths are relative to the
    manifest. Labels that are all numbers are taken as they are, others are numbered in sorted order; none means 0.

    Files of a folder that are not videos by their name are told in one line of the log. Raises FileNotFoundError for a
    missing source and ValueError for one that names no video or has a bad line.
    """
    source = Path(source)
    if source.is_dir():
        listing = _list_folder(source)
    elif source.suffix.lower() in SUFFIXES and source.is_file():
        listing = Listing([Video(source, source.name, 0)], ["."], [])
    elif source.is_file():
        listing = _list_manifest(source)
    else:
        raise FileNotFoundError(f"no folder, manifest or file of videos at {source}")
    if not listing.videos:
        raise ValueError(f"no video files in {source}")
    if listing.others:
        names = ", ".join(listing.others[:5]) + (", ..." if len(listing.others) > 5 else "")
        _log.warning("%s: skipped, not videos (%d): %s", source, len(listing.others), names)
    return listing


def _list_folder(root: Path) -> Listing:
    names = sorted(
        path.relative_to(root)
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    videos = [name for name in names if name.suffix.lower() in SUFFIXES]
    classes = sorted({_class(name) for name in videos})
    return Listing(
        [Video(root / name, str(name), classes.index(_class(name))) for name in videos],
        classes,
        [str(name) for name in names if name.suffix.lower() not in SUFFIXES],
    )


def _class(name: Path) -> str:
    return name.parts[0] if len(name.parts) > 1 else "."


def _list_manifest(manifest: Path) -> Listing:
    if manifest.suffix not in (".csv", ".txt", ".jsonl"):
        raise ValueError(f"{manifest.name} is no video, and a manifest of videos must be .csv, .txt or .jsonl")
    rows = list(_read_jsonl(manifest) if manifest.suffix == ".jsonl" else _read_csv(manifest))
    labels = {label for _, label, _ in rows}
    if all(label.isdecimal() for label in labels):
        number = {label: int(label) for label in labels}
        classes = [str(index) for index in range(max(number.values(), default=-1) + 1)]
    else:
        classes = sorted(labels)
        number = {label: index for index, label in enumerate(classes)}
    videos = [Video(manifest.parent / path, path, number[label], start) for path, label, start in rows]
    return Listing(videos, classes, [])


def _read_csv(manifest: Path) -> Iterator[tuple[str, str, int | None]]:
    with open(manifest, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        for row in reader:
            fields = [field.strip() for field in row]
            if not any(fields) or fields == list(_FIELDS[: len(fields)]):
                continue
            where = f"{manifest}:{reader.line_num}"
            if len(fields) > len(_FIELDS) or not fields[0]:
                raise ValueError(f"{where}: a line must be path[,label[,start]], got {','.join(row)}")
            path, label, start = fields + [""] * (len(_FIELDS) - len(fields))
            yield path, label or "0", _start(start, where)


def _read_jsonl(manifest: Path) -> Iterator[tuple[str, str, int | None]]:
    with open(manifest, encoding="utf-8") as file:
        for line_number, line in enumerate(file, 1):
            where = f"{manifest}:{line_number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(record, dict) or not {"path"} <= set(record) <= set(_FIELDS):
                raise ValueError(f"{where}: a line must be an object with path, label and start, got {line.strip()}")
            yield str(record["path"]), str(record.get("label", 0)), _start(str(record.get("start", "")), where)


def _start(text: str, where: str) -> int | None:
    if text and not re.fullmatch(r"\d+", text):
        raise ValueError(f"{where}: start must be a frame number of at least 0, got {text!r}")
    return int(text) if text else None

"""Which videos a folder or a manifest names, with their labels."""

import csv
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
    | {".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
_log = logging.getLogger(__name__)
_FIELDS = ("path", "label", "start", "text")
_LISTED = "path, label, start and text"
_SURROGATE = re.compile("[\ud800-\udfff]")  # as JSON may escape them; no UTF-8 has them
_Row = dict[str, str]  # every field's text, "" where there is none


@dataclass(frozen=True)
class Video:
    """A video file: where it is, its name in reports, its class, and what a manifest may say of it besides."""

    path: Path
    name: str
    label: int
    start: int | None = None  # the frame where a clip must start; None: any
    text: str = ""  # its caption


@dataclass(frozen=True)
class Listing:
    """The videos in a fixed order, the names of the classes, and the files of the folder that are no videos."""

    videos: list[Video]
    classes: list[str]
    others: list[str]


def list_videos(source: str | Path) -> Listing:
    """List a folder (searched through), a manifest (.csv, .txt, .jsonl) or one video file.

    A folder's classes are the names of its direct sub-folders, sorted; files beside them are of class ".". A manifest
    line is `path[,label[,start[,text]]]`, or what a header `path,text`, say, names, or an object with these keys; paths
    are relative to the manifest. Labels that are all numbers are taken as they are, others are numbered in sorted
    order; none means 0. `text` is the caption, in quotes where it has a comma.

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
        if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(root).parts)
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
    try:
        rows = list(_read_jsonl(manifest) if manifest.suffix == ".jsonl" else _read_csv(manifest))
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest} is not UTF-8: {error}") from error
    labels = {row["label"] or "0" for row, _ in rows}
    if all(label.isdecimal() for label in labels):
        number = {label: int(label) for label in labels}
        classes = [str(index) for index in range(max(number.values(), default=-1) + 1)]
    else:
        classes = sorted(labels)
        number = {label: index for index, label in enumerate(classes)}
    videos = [
        Video(
            manifest.parent / row["path"],
            row["path"],
            number[row["label"] or "0"],
            _start(row["start"], where),
            row["text"],
        )
        for row, where in rows
    ]
    return Listing(videos, classes, [])


def _read_csv(manifest: Path) -> Iterator[tuple[_Row, str]]:
    """Each line's fields and its place."""
    columns: Sequence[str] = _FIELDS
    with open(manifest, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for row in reader:
            fields = [field.strip() for field in row]
            if not any(fields):
                continue
            where = f"{manifest}:{reader.line_num}"
            if fields[0] == "path":
                if not set(fields) <= set(_FIELDS):
                    raise ValueError(f"{where}: a header must be of {_LISTED}, got {','.join(row)}")
                columns = fields
                continue
            if len(fields) > len(columns) or not fields[0]:
                raise ValueError(f"{where}: a line must be {_form(columns)}, got {','.join(row)}")
            yield {**dict.fromkeys(_FIELDS, ""), **dict(zip(columns, fields, strict=False))}, where


def _form(columns: Sequence[str]) -> str:
    """path[,label[,start]] for these three."""
    return "[,".join(columns) + "]" * (len(columns) - 1)


def _read_jsonl(manifest: Path) -> Iterator[tuple[_Row, str]]:
    """Each line's fields and its place."""
    with open(manifest, encoding="utf-8-sig") as file:
        for line_number, line in enumerate(file, 1):
            where = f"{manifest}:{line_number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(record, dict) or not set(record) <= set(_FIELDS) or not record.get("path"):
                raise ValueError(f"{where}: a line must be an object with {_LISTED}, got {line.strip()}")
            values = {field: record[field] for field in _FIELDS if record.get(field) is not None}
            if _SURROGATE.search("".join(map(str, values.values()))):
                raise ValueError(f"{where}: half of a surrogate pair is no character: {line.strip()}")
            yield {**dict.fromkeys(_FIELDS, ""), **{field: str(value) for field, value in values.items()}}, where


def _start(text: str, where: str) -> int | None:
    if text and not re.fullmatch(r"\d+", text):
        raise ValueError(f"{where}: start must be a frame number of at least 0, got {text!r}")
    return int(text) if text else None


def numbered_captions(texts: Iterable[str]) -> dict[str, int]:
    """The distinct texts, numbered in their order; none at all where every text is empty."""
    distinct = dict.fromkeys(texts)
    return {text: number for number, text in enumerate(distinct)} if any(distinct) else {}

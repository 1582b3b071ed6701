"""Checkpoint files: written aside, synced and renamed, so that a crash or a full disk never costs the last good one."""

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step_(\d{8})\.pt")


class StorageError(OSError):
    """A checkpoint could not be written or read; the message is one line with the path and the reason."""


def save(directory: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as step_{step:08d}.pt in `directory` and delete all but the newest `keep` checkpoints.

    The file appears under its name only when all of it is on the disk. Raises StorageError when it cannot be written
    (a full disk, no permission); the older checkpoints are then untouched and the partial file is gone.
    """
    path = directory / f"step_{step:08d}.pt"
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    for old in paths(directory)[:-keep]:
        old.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write and sync, and rename it to `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {_reason(error)}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU (`weights_only=True`). StorageError for a missing, damaged or other file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # processes share the pages
    except FileNotFoundError as error:
        raise StorageError(f"no checkpoint at {path}") from error
    except Exception as error:  # torch.load reports damage through many types, pickle's and zipfile's among them
        whole = zipfile.is_zipfile(path)
        reason = str(error).splitlines()[0] if whole else "not a whole file of torch.save's format"
        raise StorageError(f"cannot read the checkpoint {path}: {reason}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{path} is no checkpoint: it must hold a dictionary, got {type(content).__name__}")
    return content


def paths(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    return sorted(path for path in directory.glob("step_*.pt") if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def remove_partial_files(directory: Path) -> None:
    """Delete what a killed run left half written."""
    for path in directory.glob(".step_*.tmp"):
        path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:  # torch.save wraps the operating system's error in its own
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]

"""Folders of safetensors shards with an index.json, written so that a killed command goes on where it was stopped.

Entry i of the index belongs to the tensors "{i}.NAME" of the shard that it names.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.command_line import UsageError
from models.data.listing import Video
from models.training.checkpointing import StorageError, atomic_file

INDEX = "index.json"


class Index(Protocol):
    """A dataclass that says how a folder was made and what it holds; an entry is a dataclass with a field `shard`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    entries: list[Any]

    def to_json(self) -> str:
        """The text of index.json."""


I = TypeVar("I", bound=Index)


class ShardWriter(Generic[I]):
    """Collects entries and writes them as shards, each there whole or not at all, the index after the shard.

    A kill between the two leaves a shard that no entry names; the next shard takes its name.
    """

    def __init__(self, folder: Path, name: str, index: I, limit: float) -> None:
        """Write `folder`/{name}-00000.safetensors, ... going on after `index`; a shard closes at `limit` bytes."""
        self.folder, self.name, self.index, self.limit = folder, name, index, limit
        self._entries: list[Any] = []
        self._tensors: dict[str, Tensor] = {}

    def add(self, items: Sequence[tuple[Any, dict[str, Tensor]]]) -> None:
        """Take entries, whose `shard` is set here, and their tensors; all come into one shard."""
        shard = f"{self.name}-{len({entry.shard for entry in self.index.entries}):05d}.safetensors"
        for entry, tensors in items:
            number = len(self.index.entries) + len(self._entries)
            self._entries.append(replace(entry, shard=shard))
            self._tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self._tensors.values()) >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Write what was collected as one shard, and then the index."""
        if not self._entries:
            return
        _write(self.folder / self._entries[0].shard, safetensors.torch.save(self._tensors))
        self.index = replace(self.index, entries=[*self.index.entries, *self._entries])
        _write(self.folder / INDEX, self.index.to_json().encode())
        self._entries, self._tensors = [], {}


def resume(out: Path, new: I, read: Callable[[Path], I], same: Sequence[str], holds: str) -> I:
    """The index that `read` finds in `out` if there is one, else `new`; half-written files are deleted.

    Raises UsageError where the two differ in a field of `same`; `holds` is what the folder's entries are called.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error
    for partial in out.glob(".*.tmp"):
        partial.unlink()
    if not (out / INDEX).exists():
        return new
    old = read(out)
    for name in same:
        if getattr(old, name) != getattr(new, name):
            raise UsageError(
                f"{out} holds {holds} of another {name}: {getattr(old, name)}, now {getattr(new, name)}; "
                "want another --out"
            )
    return old


def relabelled(out: Path, index: I, listed: Callable[[Any], Video | None]) -> I:
    """The index with the labels and texts that its entries' videos have now, by `listed`; written where one is new.

    An entry whose video is None stays as it is.
    """
    videos = [(entry, listed(entry) or entry) for entry in index.entries]
    entries = [replace(entry, label=video.label, text=video.text) for entry, video in videos]
    if entries != index.entries:
        index = replace(index, entries=entries)
        _write(out / INDEX, index.to_json().encode())
    return index


@contextmanager
def open_shard(path: Path) -> Iterator[safe_open]:
    """A shard to read tensors from. Raises StorageError that names it where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot read the shard {path}: {error}") from error


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

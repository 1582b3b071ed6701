"""Arrays kept as .npy files, which are there whole or count as not there."""

import os
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np

from models.training.checkpointing import StorageError


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a file that appears whole; processes that write the same one at once do no harm.

    Raises StorageError that names the file where it cannot be written, and leaves nothing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.save(file, array)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def read_array(path: Path, shape: tuple[int, ...], mmap_mode: Literal["c"] | None = None) -> np.ndarray | None:
    """The array of a file, None where it is missing, damaged or of another shape: it can be made again.

    `mmap_mode` "c" maps the file: what is written to the array stays out of it.
    """
    try:
        array = np.load(path, mmap_mode=mmap_mode)
    except (FileNotFoundError, NotADirectoryError, EOFError, ValueError):
        return None
    return array if array.shape == shape else None

"""Text embeddings on disk: a file for each encoder and text, made once, read by any number of processes."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.array_files import read_array, write_array
from models.data.packaged import cache_folder
from models.text.encoder import TextEncoder

_BATCH = 256  # texts encoded between two looks at the clock
_SLOW = 1024  # texts from which a progress bar is shown


class TextCache:
    """Embeddings float32 (L, W) by text, in text/IDENTITY/ of cache_folder(); it holds no encoder, only paths."""

    def __init__(self, identity: str, shape: tuple[int, int]) -> None:
        """`identity` and `shape` (L, W): of the encoder."""
        self.folder, self.shape = cache_folder() / "text" / identity, shape

    def fill(self, encoder: TextEncoder, texts: Iterable[str]) -> None:
        """Encode and keep the texts that are not there yet, or damaged. Raises OSError where they cannot be written."""
        missing = [text for text in dict.fromkeys(texts) if self._read(text) is None]
        bar = tqdm(total=len(missing), unit="text", desc="encoding", disable=len(missing) < _SLOW)
        with bar:
            for first in range(0, len(missing), _BATCH):
                part = missing[first : first + _BATCH]
                for text, embedding in zip(part, encoder.encode(part), strict=True):
                    write_array(self.path(text), embedding.numpy())
                bar.update(len(part))

    def __getitem__(self, text: str) -> Tensor:
        """The embedding of a text that `fill` was given, mapped from its file; writing to it changes no file."""
        array = self._read(text)
        if array is None:
            raise FileNotFoundError(f"no embedding of {text!r} of shape {self.shape} at {self.path(text)}")
        return torch.from_numpy(array)

    def path(self, text: str) -> Path:
        """The file of a text."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.npy"

    def _read(self, text: str) -> np.ndarray | None:
        return read_array(self.path(text), self.shape, mmap_mode="c")

"""Text embeddings on disk: a file for each encoder and text, made once, read by any number of processes."""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.data.packaged import cache_folder
from models.text.encoder import TextEncoder

_BATCH = 256  # texts encoded between two looks at the clock
_SLOW = 1024  # texts from which a progress bar is shown


class TextCache:
    """Embeddings float32 (L, W) by text, in text/IDENTITY/ of cache_folder(); it holds no encoder, only paths."""

    def __init__(self, identity: str) -> None:
        """`identity`: of the encoder."""
        self.folder = cache_folder() / "text" / identity

    def fill(self, encoder: TextEncoder, texts: Iterable[str]) -> None:
        """Encode and keep the texts that are not there yet. Raises OSError where they cannot be written."""
        missing = [text for text in dict.fromkeys(texts) if not self.path(text).exists()]
        bar = tqdm(total=len(missing), unit="text", desc="encoding", disable=len(missing) < _SLOW)
        with bar:
            for first in range(0, len(missing), _BATCH):
                part = missing[first : first + _BATCH]
                for text, embedding in zip(part, encoder.encode(part), strict=True):
                    _write(self.path(text), embedding.numpy())
                bar.update(len(part))

    def __getitem__(self, text: str) -> Tensor:
        """The embedding of a text that `fill` was given, mapped from its file; writing to it changes no file."""
        return torch.from_numpy(np.load(self.path(text), mmap_mode="c"))

    def path(self, text: str) -> Path:
        """The file of a text."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.npy"


def _write(path: Path, array: np.ndarray) -> None:
    """Write a file that appears whole; processes that write the same one at once do no harm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.save(file, array)
    os.replace(file.name, path)

"""What a text encoder is, and which one a name means."""

import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

_log = logging.getLogger(__name__)
_SHOWN = 60  # characters of a text in a message


class TextEncoder(Protocol):
    """Turns texts into embeddings of one fixed shape; "" is the null prompt."""

    @property
    def identity(self) -> str:
        """A name, fit for a folder, that no encoder with other weights or another tokenizer has."""
        ...

    @property
    def length(self) -> int:
        """L: tokens of every text, cut or padded to this number."""
        ...

    @property
    def width(self) -> int:
        """W: numbers of a token."""
        ...

    def encode(self, texts: list[str]) -> Tensor:
        """Embeddings float32 (len(texts), L, W) on the CPU."""
        ...


def load_text_encoder(spec: str, device: str = "cpu") -> TextEncoder:
    """The encoder that `spec` means: "wordllama", or the local folder of a CLIP model, which runs on `device`.

    Raises OSError or ValueError in one line where it cannot be had.
    """
    if spec == "wordllama":
        from models.text.wordllama import load_wordllama

        return load_wordllama()
    from models.text.clip import load_clip_text  # transformers is slow to import

    return load_clip_text(spec, device)


def warn_of_cuts(texts: Sequence[str], lengths: Sequence[int], most: int) -> None:
    """Log one line where texts have more than `most` tokens: how many, and the first of them."""
    cut = [(text, length) for text, length in zip(texts, lengths, strict=True) if length > most]
    if cut:
        text, length = cut[0]
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
        _log.warning("%d of %d texts cut to %d tokens; the first has %d: %r", len(cut), len(texts), most, length, shown)

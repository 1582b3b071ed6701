"""A dataset whose samples carry the embedding of their caption."""

import numpy as np

from models.data.seeded import Sample, SeededDataset
from models.text.cache import TextCache
from models.text.encoder import TextEncoder, load_text_encoder


class TextDataset(SeededDataset):
    """The samples of a dataset with captions, and "text": float32 (L, W), the embedding of sample["caption"].

    The captions are encoded when the dataset is made, once for all runs (see TextCache); workers only read files. An
    empty caption has the embedding of the null prompt "".
    """

    def __init__(self, dataset: SeededDataset, encoder: TextEncoder | str) -> None:
        """`dataset`: with `captions`, a tuple of str; `encoder`: or what load_text_encoder takes.

        Raises ValueError for a dataset without captions, and as load_text_encoder.
        """
        super().__init__(dataset.seed)
        captions = getattr(dataset, "captions", ())
        if not captions:
            raise ValueError(f"{type(dataset).__name__} has no captions to encode")
        encoder = load_text_encoder(encoder) if isinstance(encoder, str) else encoder
        self.dataset, self.captions = dataset, captions
        self.classes = getattr(dataset, "classes", ())
        self.text_shape = (encoder.length, encoder.width)
        self._cache = TextCache(encoder.identity, self.text_shape)
        self._cache.fill(encoder, captions)

    def __len__(self) -> int:
        """The number of samples in an epoch."""
        return len(self.dataset)

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The dataset's sample with its text."""
        sample = self.dataset.draw(index, rng)
        return {**sample, "text": self._cache[self.captions[int(sample["caption"])]]}

"""Samples that depend only on (seed, epoch, index), and the sampler that hands these out, resumable at any batch."""

from collections.abc import Iterator
from itertools import count
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Sample = dict[str, Tensor]
Key = tuple[int, int]  # (epoch, index)


class SeededDataset(Dataset[Sample]):
    """A map-style dataset whose randomness is a function of (seed, epoch, index): of no worker, rank or history.

    `dataset[index]` uses the epoch of `set_epoch`, which reaches running workers through shared memory;
    `dataset[epoch, index]`, the keys of ResumableSampler, carries its own. Subclasses write `__len__` and `draw`.
    """

    def __init__(self, seed: int) -> None:
        """Keep the seed, a non-negative int."""
        if seed < 0:
            raise ValueError(f"seed must be a non-negative int, got {seed}")
        self.seed = seed
        self._epoch = get_context("spawn").Value("q", 0)

    def set_epoch(self, epoch: int) -> None:
        """Let plain integer indices mean the samples of `epoch`."""
        self._epoch.value = epoch

    def __len__(self) -> int:
        """The number of samples in an epoch."""
        raise NotImplementedError

    def __getitem__(self, key: int | Key) -> Sample:
        """One sample; IndexError when the index is outside [0, len)."""
        epoch, index = key if isinstance(key, tuple) else (self._epoch.value, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        return self.draw(index, np.random.default_rng((self.seed, epoch, index)))

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample at `index`, every random choice of it taken from `rng`."""
        raise NotImplementedError


class ResumableSampler(Sampler[list[Key]]):
    """An endless batch sampler over shuffled epochs, split over ranks, that can start at any batch.

    Sample s of the endless stream is item s % length of the permutation that belongs to (seed, s // length). Batch k
    of all ranks together is the next batch_size * world_size samples, of which rank r takes the r-th batch_size. So no
    sample is dropped or repeated in an epoch, a dataset smaller than a batch works, and a run resumes with `start` =
    the number of batches already taken, even on another world size with the same global batch.

    Give it to `DataLoader(dataset, batch_sampler=...)`. Each batch is a list of keys (epoch, index).
    """

    def __init__(
        self, length: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0, start: int = 0
    ) -> None:
        """`length`: of the dataset; `batch_size`: per rank; `start`: batches to pass over."""
        for name, value in {"length": length, "batch_size": batch_size, "world_size": world_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[Key]]:
        """Batches from `start` on, for ever."""
        epoch, order = -1, np.empty(0, np.int64)
        for batch in count(self.start):
            first = (batch * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                keys.append((epoch, int(order[position % self.length])))
            yield keys


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """A CPU torch generator seeded by `rng`, for draws that are made as tensors."""
    return torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))

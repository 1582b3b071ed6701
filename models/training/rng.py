"""The random numbers of a training step, as a function of the run's seed, the step and the process."""

import hashlib
import random

import numpy as np
import torch


def seed_step(generator: torch.Generator, seed: int, step: int, rank: int) -> None:
    """Seed everything random in step `step`, so that a resumed run draws what an uninterrupted one would have drawn.

    `generator` draws for the whole batch (models.training.draws) and is the same in every process. The
    global generators of Python, NumPy and torch differ between processes: nothing that a network of ours computes
    comes from them. Nothing waits for the device.
    """
    generator.manual_seed(_mix(seed, step))
    seed_process(seed, step, rank)


def seed_process(seed: int, *more: int) -> None:
    """Seed the global generators of Python, NumPy and torch (every device) from the given numbers."""
    mixed = _mix(seed, *more, -1)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


def _mix(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1

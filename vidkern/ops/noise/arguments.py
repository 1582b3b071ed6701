"""Checks of the arguments that every operator which draws noise takes: key, sharing, base_weight, sample_offset."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidkern.ops import _check
from vidkern.ops.noise.generator import LANES

SHARING = ("independent", "shared", "mixed", "progressive")
WEIGHTED = ("mixed", "progressive")

MAX_COUNT = 1 << 32  # a counter word has 32 bits


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Require one of some names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_key(key: Any) -> None:
    """Require a noise key: int64 (2,) = (seed, offset)."""
    _check.is_tensor("key", key)
    _check.has_dtype("key", key, (torch.int64,))
    _check.has_shape("key", key, (2,), "(seed, offset)")


def check_counts(batch: int, frames: int, elements: int, sample_offset: int) -> None:
    """Require that samples, frames and groups of elements can be counted in 32 bits each."""
    if not isinstance(sample_offset, int) or isinstance(sample_offset, bool):
        raise TypeError(f"sample_offset must be an int, got {type(sample_offset).__name__}")
    if sample_offset < 0 or sample_offset + batch > MAX_COUNT:
        raise ValueError(f"sample_offset must be at least 0 and at most 2^32 - B, got {sample_offset} with B = {batch}")
    if frames > MAX_COUNT or elements > LANES * MAX_COUNT:
        raise ValueError(
            f"the noise of a sample must have at most 2^32 frames of 2^34 numbers, got {frames} of {elements}"
        )


def weight_per_frame(
    sharing: str, base_weight: float | Tensor | None, batch: int, frames: int, device: torch.device
) -> Tensor | None:
    """Check ``sharing`` and ``base_weight``; return the weight as float32 (B, F), or None where there is none."""
    check_choice("sharing", sharing, SHARING)
    if sharing not in WEIGHTED:
        if base_weight is not None:
            raise ValueError(f"base_weight must be None with sharing={sharing!r}, got {base_weight!r}")
        return None
    if base_weight is None:
        raise ValueError(f"base_weight must be given with sharing={sharing!r}, got None")
    if not isinstance(base_weight, Tensor):
        if not 0.0 <= base_weight <= 1.0:
            raise ValueError(f"base_weight must be between 0 and 1, got {base_weight!r}")
        return torch.full((1, 1), base_weight, dtype=torch.float32, device=device).expand(batch, frames)
    _check.has_dtype("base_weight", base_weight, (torch.float32,))
    if base_weight.device != device:
        raise ValueError(f"base_weight must be on the key's device ({device}), got {base_weight.device}")
    if base_weight.requires_grad:
        raise ValueError("base_weight must not require a gradient: noise is not differentiated by it")
    if base_weight.dim() == 1:
        _check.has_shape("base_weight", base_weight, (frames,), "(F,)")
        return base_weight.expand(batch, frames)
    _check.has_shape("base_weight", base_weight, (batch, frames), "(F,) or (B, F)")
    return base_weight

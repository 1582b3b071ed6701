"""The timestep embedding operator."""

from typing import Any

import torch
from torch import Tensor

from vidkern import _library
from vidkern.ops import _check
from vidkern.ops.embedding import reference


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Embed timesteps as cosines, then sines, at geometric frequencies: [cos(t w_i) | sin(t w_i)].

        w_i = max_period^(-i / (dim // 2)),    i = 0 .. dim // 2 - 1

    GLIDE's and ADM's form of the transformer's positions (Vaswani et al. 2017), which DiT, Latte and FVDM use.

    Args:
        t: timesteps of any shape and strides: int64, int32, float32 or float64. 16-bit floats are refused, as they
            cannot hold the timesteps of a schedule apart.
        dim: length of the embedding, at least 2; where odd, the last entry is 0.
        max_period: period of the slowest frequency is 2 pi times this, in the limit; above 0.

    Returns:
        (*t.shape, dim) float32 (float64 for float64 t), contiguous. Differentiable in a floating-point t.

    Raises:
        TypeError, ValueError: an argument of another type, dtype or range.
    """
    _check.is_tensor("t", t)
    _check.has_dtype("t", t, (torch.int64, torch.int32, torch.float32, torch.float64))
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}")
    if not max_period > 0:
        raise ValueError(f"max_period must be a positive number, got {max_period!r}")
    return _timestep_embedding(t, dim, float(max_period))


def _embedding_like(t: Tensor, dim: int, max_period: float) -> Tensor:
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    return t.new_empty((*t.shape, dim), dtype=dtype)


_timestep_embedding = _library.define(
    "timestep_embedding(Tensor t, SymInt dim, float max_period) -> Tensor",
    kernels={},
    reference=reference.timestep_embedding,
    fake=_embedding_like,
)

_timestep_embedding_backward = _library.define(
    "timestep_embedding_backward(Tensor grad, Tensor t, float max_period) -> Tensor",
    kernels={},
    reference=reference.timestep_embedding_backward,
    fake=lambda grad, t, max_period: t.new_empty(t.shape),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    t, _, ctx.max_period = inputs
    ctx.save_for_backward(t)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    (t,) = ctx.saved_tensors
    return _timestep_embedding_backward(grad, t, ctx.max_period), None, None


_library.differentiate(_timestep_embedding, save=_save, backward=_backward)

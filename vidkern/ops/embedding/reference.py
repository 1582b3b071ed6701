"""What the timestep embedding means, in plain PyTorch: cosines, then sines, of t at geometric frequencies."""

import math

import torch
from torch import Tensor


def frequencies(dim: int, max_period: float, like: Tensor) -> Tensor:
    """Return max_period^(-i / (dim // 2)), i = 0 .. dim // 2 - 1, in the dtype and on the device of ``like``."""
    half = dim // 2
    return torch.exp(-math.log(max_period) * torch.arange(half, dtype=like.dtype, device=like.device) / half)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(torch.float32)


def timestep_embedding(t: Tensor, dim: int, max_period: float) -> Tensor:
    """Return [cos(t w) | sin(t w)], with a last 0 where dim is odd."""
    wide = _wide(t)
    angle = wide.unsqueeze(-1) * frequencies(dim, max_period, wide)
    embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def timestep_embedding_backward(grad: Tensor, t: Tensor, max_period: float) -> Tensor:
    """Return dt, in t's dtype."""
    wide, dim = _wide(t), grad.shape[-1]
    w = frequencies(dim, max_period, wide)
    angle = wide.unsqueeze(-1) * w
    dcos, dsin = grad[..., : dim // 2], grad[..., dim // 2 : 2 * (dim // 2)]
    return (w * (dsin * angle.cos() - dcos * angle.sin())).sum(-1).to(t.dtype)

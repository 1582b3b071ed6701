"""What the activation operators mean on rows (M, D): GELU in its tanh form and its gradients, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic and of the sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return GELU(x + bias), contiguous."""
    return F.gelu(_biased(x, bias), approximate="tanh").to(x.dtype).contiguous()


def gelu_tanh_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (dx, dbias): dbias (D,) is the sum of dx over the rows, and (0,) where there is no bias."""
    dx = _gradient(dy, _biased(x, bias))
    dbias = dx.new_empty(0) if bias is None else dx.sum(0)
    return dx.to(x.dtype).contiguous(), dbias


def gelu_mlp_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, GELU(x) again, the sum of dx over the rows)."""
    dx = _gradient(dy, _biased(x, None))
    return dx.to(x.dtype).contiguous(), gelu_tanh(x, None), dx.sum(0)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.to(accumulator(x.dtype))
    return wide if bias is None else wide + bias.to(wide.dtype)


def _gradient(dy: Tensor, biased: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy.to(biased.dtype), biased, approximate="tanh")

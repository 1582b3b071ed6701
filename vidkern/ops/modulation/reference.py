"""What the modulation operators mean, in plain PyTorch.

Statistics, ``1 + scale`` and every sum are taken in float32 (float64 for float64 input), with one rounding at the
end; so is the gradient of a vector, which is returned in that wider dtype. Results are contiguous, whatever the
inputs' strides.
"""

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that statistics and sums of this dtype are taken in."""
    return torch.promote_types(dtype, torch.float32)


def _wide(tokens: Tensor) -> Tensor:
    """Return tokens in the accumulator's dtype and contiguous, as then are all results computed from them."""
    return tokens.to(accumulator(tokens.dtype)).contiguous()


def _vector(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype).unsqueeze(2)  # (B, F, 1, D), beside (B, F, N, D)


def _layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rough_mean = x.mean(-1)
    centred = x - rough_mean.unsqueeze(-1)
    slip = centred.mean(-1)  # what rounding left over: it matters where |mean| is far above the deviation
    centred = centred - slip.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    return centred * rstd.unsqueeze(-1), rough_mean + slip, rstd


def _rms_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = (x.square().mean(-1) + eps).rsqrt()
    return x * rstd.unsqueeze(-1), rstd


def _layer_norm_backward(dnormed: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    along = (dnormed * normed).mean(-1, keepdim=True)
    return rstd.unsqueeze(-1) * (dnormed - dnormed.mean(-1, keepdim=True) - normed * along)


def _rms_norm_backward(dnormed: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    along = (dnormed * normed).mean(-1, keepdim=True)
    return rstd.unsqueeze(-1) * (dnormed - normed * along)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (LN(x) * (1 + scale) + shift, mean, rstd)."""
    wide = accumulator(x.dtype)
    normed, mean, rstd = _layer_norm(_wide(x), eps)
    y = normed * (1 + _vector(scale, wide)) + _vector(shift, wide)
    return y.to(x.dtype), mean, rstd


def layer_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dshift, dscale)."""
    wide = accumulator(x.dtype)
    grad = _wide(dy)
    normed = (_wide(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dx = _layer_norm_backward(grad * (1 + _vector(scale, wide)), normed, rstd)
    return dx.to(x.dtype), grad.sum(2), (grad * normed).sum(2)


def rms_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (RMS(x) * (1 + scale) + shift, rstd)."""
    wide = accumulator(x.dtype)
    normed, rstd = _rms_norm(_wide(x), eps)
    y = normed * (1 + _vector(scale, wide)) + _vector(shift, wide)
    return y.to(x.dtype), rstd


def rms_norm_modulate_backward(dy: Tensor, x: Tensor, scale: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dshift, dscale)."""
    wide = accumulator(x.dtype)
    grad = _wide(dy)
    normed = _wide(x) * rstd.unsqueeze(-1)
    dx = _rms_norm_backward(grad * (1 + _vector(scale, wide)), normed, rstd)
    return dx.to(x.dtype), grad.sum(2), (grad * normed).sum(2)


def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    wide = accumulator(x.dtype)
    return _wide(x) + _vector(gate, wide) * _wide(y)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * y."""
    return _residual(x, y, gate).to(x.dtype)


def gate_residual_backward(dz: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dy, dgate); the gradient of x is dz itself."""
    wide = accumulator(y.dtype)
    grad = _wide(dz)
    return (grad * _vector(gate, wide)).to(y.dtype), (grad * _wide(y)).sum(2)


def gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (z, LN(z) * (1 + scale) + shift, mean, rstd) with z = x + gate * y, normed before it is rounded."""
    wide = accumulator(x.dtype)
    z = _residual(x, y, gate)
    normed, mean, rstd = _layer_norm(z, eps)
    h = normed * (1 + _vector(scale, wide)) + _vector(shift, wide)
    return z.to(x.dtype), h.to(x.dtype), mean, rstd


def gate_residual_modulate_backward(
    dh: Tensor,
    dz: Tensor | None,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dy, dgate, dshift, dscale); dz is None where nothing else reads z."""
    wide = accumulator(x.dtype)
    grad = _wide(dh)
    normed = (_residual(x, y, gate) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    total = _layer_norm_backward(grad * (1 + _vector(scale, wide)), normed, rstd)
    return _through_residual(total, dz, y, gate, grad, normed)


def gate_residual_rms_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (z, RMS(z) * (1 + scale) + shift, rstd) with z = x + gate * y, normed before it is rounded."""
    wide = accumulator(x.dtype)
    z = _residual(x, y, gate)
    normed, rstd = _rms_norm(z, eps)
    h = normed * (1 + _vector(scale, wide)) + _vector(shift, wide)
    return z.to(x.dtype), h.to(x.dtype), rstd


def gate_residual_rms_modulate_backward(
    dh: Tensor, dz: Tensor | None, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dy, dgate, dshift, dscale); dz is None where nothing else reads z."""
    wide = accumulator(x.dtype)
    grad = _wide(dh)
    normed = _residual(x, y, gate) * rstd.unsqueeze(-1)
    total = _rms_norm_backward(grad * (1 + _vector(scale, wide)), normed, rstd)
    return _through_residual(total, dz, y, gate, grad, normed)


def _through_residual(
    total: Tensor, dz: Tensor | None, y: Tensor, gate: Tensor, dh: Tensor, normed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = total.dtype
    if dz is not None:
        total = total + _wide(dz)
    dy = total * _vector(gate, wide)
    dgate = (total * _wide(y)).sum(2)
    return total.to(y.dtype), dy.to(y.dtype), dgate, dh.sum(2), (dh * normed).sum(2)

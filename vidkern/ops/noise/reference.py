"""What the noise operators mean, in plain PyTorch: noise from a key, forward diffusion, and its regression loss.

Arithmetic is float32 (float64 for float64 tensors), every product and sum rounded on its own, with one rounding to
the result's dtype at the end.
"""

import torch
from torch import Tensor

from vidkern.ops.noise import generator


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that arithmetic on these tensors is done in."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def per_frame(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, F) as (B, F, 1, 1, 1), beside (B, F, C, H, W)."""
    return vector.to(dtype)[:, :, None, None, None]


def noise_like(
    x: Tensor,
    key: Tensor,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
    step: Tensor | None = None,
) -> Tensor:
    """Return float32 noise of the shape of x, (B, F, C, H, W)."""
    batch, frames, *rest = x.shape
    elements = torch.Size(rest).numel()
    return generator.normal(batch, frames, elements, key, sharing, base_weight, sample_offset, step).view(x.shape)


def philox_normal(
    shape: list[int],
    key: Tensor,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return standard normal noise of a shape (B, F, ...)."""
    batch, frames, *rest = shape
    elements = torch.Size(rest).numel()
    noise = generator.normal(batch, frames, elements, key, sharing, base_weight, sample_offset)
    return noise.reshape(shape).to(dtype)


def _target(kind: str, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    if kind == "epsilon":
        return noise
    if kind == "v":
        return alpha * noise - sigma * x0
    if kind == "flow":
        return noise - x0
    return x0


def add_noise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    target: str | None,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """Return (x_t, the regression target, which has no elements where none is asked for)."""
    wide = wide_dtype(x0)
    x, a, s = x0.to(wide), per_frame(alpha, wide), per_frame(sigma, wide)
    noise = noise_like(x0, key, sharing, base_weight, sample_offset).to(wide)
    x_t = (a * x + s * noise).to(x0.dtype).contiguous()
    if target is None:
        return x_t, x0.new_empty(0)
    return x_t, _target(target, x, a, s, noise).to(x0.dtype).contiguous()


def add_noise_backward(
    dx_t: Tensor | None,
    dtarget: Tensor | None,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    target: str | None,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx0 in x0's dtype, dalpha, dsigma in the wide dtype)."""
    wide = wide_dtype(x0)
    x, a, s = x0.to(wide), per_frame(alpha, wide), per_frame(sigma, wide)
    noise = noise_like(x0, key, sharing, base_weight, sample_offset).to(wide)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dalpha, dsigma = torch.zeros_like(dx), torch.zeros_like(dx)
    if dx_t is not None:
        grad = dx_t.to(wide)
        dx, dalpha, dsigma = a * grad, grad * x, grad * noise
    if dtarget is not None:
        grad = dtarget.to(wide)
        if target == "v":
            dx, dalpha, dsigma = dx - s * grad, dalpha + grad * noise, dsigma - grad * x
        elif target == "flow":
            dx = dx - grad
        elif target == "x0":
            dx = dx + grad
    return dx.to(x0.dtype).contiguous(), dalpha.sum((2, 3, 4)), dsigma.sum((2, 3, 4))


def diffusion_mse(
    pred: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    prediction: str,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """Return (mean of (pred - target)^2 over each frame, pred - target in pred's dtype for the backward pass)."""
    wide = wide_dtype(pred, x0)
    noise = noise_like(x0, key, sharing, base_weight, sample_offset).to(wide)
    target = _target(prediction, x0.to(wide), per_frame(alpha, wide), per_frame(sigma, wide), noise)
    residual = pred.to(wide) - target
    return residual.square().mean((2, 3, 4)), residual.to(pred.dtype).contiguous()


def diffusion_mse_backward(dmse: Tensor, residual: Tensor) -> Tensor:
    """Return dpred = 2 / (C H W) * dmse * residual."""
    wide = wide_dtype(dmse, residual)
    scale = dmse.to(wide) * (2.0 / max(residual.shape[2:].numel(), 1))
    return (per_frame(scale, wide) * residual.to(wide)).to(residual.dtype)

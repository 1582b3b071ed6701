"""What the noise operators mean, in plain PyTorch: noise from a key, forward diffusion, and its losses.

Arithmetic is float32 (float64 for float64 tensors), every product and sum rounded on its own, with one rounding to
the result's dtype at the end.
"""

import math

import torch
from torch import Tensor

from vidkern.ops.noise import generator

HALF_BIN = 1 / 255  # of 8-bit values in [-1, 1]
LAST_BIN = 0.999  # values beyond are in the first or the last bin, which extend to infinity
LEAST_PROBABILITY = 1e-12


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


def x0_distance_per_residual(prediction: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return k, where k * (pred - target) is x_0 minus the x_0 that pred implies at x_t = alpha x_0 + sigma n."""
    if prediction == "epsilon":
        return sigma / alpha
    if prediction == "v":
        return sigma / (alpha * alpha + sigma * sigma)
    if prediction == "flow":
        return sigma / (alpha + sigma)
    return torch.full_like(alpha, -1.0)


def hybrid_loss(
    model_out: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    t: Tensor,
    posterior_mean_coef: Tensor,
    posterior_log_variance: Tensor,
    log_beta: Tensor,
    key: Tensor,
    prediction: str,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (mse, vb, factors, slope), from which the backward pass follows without another look at the inputs.

    factors, of model_out's shape and dtype: in the first half pred - target, in the second d bound / d (log std)
    of each element, the log standard deviation being that of p(x_{t-1} | x_t); slope (B, F): d (log std) / d v in bits.
    """
    wide = wide_dtype(model_out, x0)
    pred, fraction = model_out.to(wide).chunk(2, 2)
    x, a, s = x0.to(wide), per_frame(alpha, wide), per_frame(sigma, wide)
    noise = noise_like(x0, key, sharing, base_weight, sample_offset).to(wide)
    residual = pred - _target(prediction, x, a, s, noise)

    step = t.clamp(0, log_beta.numel() - 1)
    mean_coef, low, high = (
        per_frame(table[step], wide) for table in (posterior_mean_coef, posterior_log_variance, log_beta)
    )
    # the means of the posterior and of p differ by their x_0 alone: their x_t terms are equal
    distance = mean_coef * x0_distance_per_residual(prediction, a, s) * residual
    excess = (fraction + 1) * ((high - low) / 2)
    kl, kl_slope = _divergence(distance * distance * torch.exp(-low), excess)
    nll, nll_slope = _decoder(x, distance, (low + excess) / 2)
    decodes = per_frame(step, torch.int64) == 0
    bound, bound_slope = torch.where(decodes, nll, kl), torch.where(decodes, nll_slope, kl_slope)

    factors = torch.cat((residual, bound_slope), 2).to(model_out.dtype).contiguous()
    slope = ((high - low) / (4 * math.log(2)))[:, :, 0, 0, 0].contiguous()
    return residual.square().mean((2, 3, 4)), bound.mean((2, 3, 4)) / math.log(2), factors, slope


def _divergence(surplus: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL divergence of two Gaussians in nats, and its derivative by the second one's log std.

    Args:
        surplus: the squared distance of the means over the first one's variance.
        excess: log of the second one's variance over the first one's.
    """
    growth = torch.expm1(-excess)
    slope = -growth - surplus * (growth + 1)
    return (excess - slope) / 2, slope


def _decoder(x0: Tensor, distance: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p, in nats, of 8-bit values under a Gaussian (Ho et al. 2020, equation 13), and d/d log_std.

    Args:
        x0: the values, in [-1, 1]. Bins are 2/255 wide; those of -1 and 1 extend to infinity.
        distance: x0 minus the Gaussian's mean, of x0's shape.
        log_std: log of its standard deviation.
    """
    inverse, far = torch.exp(-log_std), distance.abs()
    first, last = x0 < -LAST_BIN, x0 > LAST_BIN
    # the bin's ends on the side where the distribution function is small, so that float32 resolves their difference
    upper = inverse * torch.where(first, HALF_BIN + distance, HALF_BIN - torch.where(last, distance, far))
    lower = inverse * (-HALF_BIN - far)
    above, above_slope = _normal_cdf(upper)
    below, below_slope = _normal_cdf(lower)
    closed = ~(first | last)
    probability = above - torch.where(closed, below, 0.0)
    slope = (upper * above_slope - torch.where(closed, lower * below_slope, 0.0)) / probability
    impossible = probability < LEAST_PROBABILITY
    return -probability.clamp(min=LEAST_PROBABILITY).log(), torch.where(impossible, 0.0, slope)


def _normal_cdf(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normal distribution function as ADM and DiT train with it (Page 1977), and its derivative."""
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    square = x * x
    value = torch.sigmoid(scale * x * (1 + cubic * square))
    return value, value * (1 - value) * (scale * (1 + 3 * cubic * square))


def hybrid_loss_backward(dmse: Tensor, dvb: Tensor, factors: Tensor, slope: Tensor) -> Tensor:
    """Return dmodel_out = [2 dmse, dvb * slope] / (C H W) * factors, for the two halves of the channels."""
    wide = wide_dtype(dmse, dvb, factors)
    residual, bound_slope = factors.to(wide).chunk(2, 2)
    elements = max(residual.shape[2:].numel(), 1)
    dpred = per_frame(dmse.to(wide) * (2.0 / elements), wide) * residual
    dfraction = per_frame(dvb.to(wide) * slope.to(wide) / elements, wide) * bound_slope
    return torch.cat((dpred, dfraction), 2).to(factors.dtype)

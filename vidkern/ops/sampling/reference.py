"""What the sampler's steps mean, in plain PyTorch: guidance, x0, the step, its noise and the hold.

Arithmetic is float32 (float64 for a float64 x_t), every operation rounded on its own in the order written, with one
rounding to x_t's dtype at the end. Differences of schedule entries are taken before dividing, so that they are exact
where the entries are close.
"""

import torch
from torch import Tensor

from vidkern.ops.noise import generator
from vidkern.ops.noise.reference import noise_like, per_frame


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded root."""
    return x.sqrt() if x.dtype == torch.float64 else generator.sqrt(x)


def _at(table: Tensor, t: Tensor, clean: float, dtype: torch.dtype) -> Tensor:
    """Return the schedule's entries at t (B, F) as (B, F, 1, 1, 1), ``clean`` where t is negative."""
    return per_frame(table.to(dtype)[t.clamp(min=0)].masked_fill(t < 0, clean), dtype)


def _guided(values: Tensor, batch: int, scale: float | None) -> Tensor:
    """Return uncond + scale * (cond - uncond) of a batch (cond, uncond), or the values where there is no guidance."""
    if scale is None:
        return values
    cond, uncond = values[:batch], values[batch:]
    return uncond + scale * (cond - uncond)


def _finish(x_t: Tensor, x_prev: Tensor, t: Tensor, hold: Tensor | None) -> Tensor:
    """Round to x_t's dtype; held and clean frames are x_t itself."""
    keep = t < 0 if hold is None else hold | (t < 0)
    return torch.where(keep[:, :, None, None, None], x_t, x_prev.to(x_t.dtype)).contiguous()


def _clamped(x0: Tensor, clip_x0: float | None) -> Tensor:
    return x0 if clip_x0 is None else x0.clamp(-clip_x0, clip_x0)


def _predicted_x0(x: Tensor, out: Tensor, abar: Tensor, prediction: str, clip_x0: float | None) -> Tensor:
    alpha, sigma = _sqrt(abar), _sqrt(1 - abar)
    if prediction == "epsilon":
        out = (1 / alpha) * (x - sigma * out)
    elif prediction == "v":
        out = alpha * x - sigma * out
    return _clamped(out, clip_x0)


def _predicted_epsilon(
    x: Tensor, out: Tensor, x0: Tensor, abar: Tensor, prediction: str, clip_x0: float | None
) -> Tensor:
    alpha, sigma = _sqrt(abar), _sqrt(1 - abar)
    if prediction == "epsilon" and clip_x0 is None:
        return out
    if prediction == "v" and clip_x0 is None:
        return alpha * out + sigma * x
    return (1 / sigma) * (x - alpha * x0)


def ddim_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    alphas_cumprod: Tensor,
    prediction: str,
    eta: float,
    key: Tensor | None,
    guidance_scale: float | None,
    hold: Tensor | None,
    clip_x0: float | None,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> Tensor:
    """Return sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps + s n, with s as in the public function."""
    wide = _wide(x_t)
    x = x_t.to(wide)
    out = _guided(model_out[:, :, : x.shape[2]].to(wide), x.shape[0], guidance_scale)
    abar, abar_prev = _at(alphas_cumprod, t, 1.0, wide), _at(alphas_cumprod, t_prev, 1.0, wide)
    x0 = _predicted_x0(x, out, abar, prediction, clip_x0)
    epsilon = _predicted_epsilon(x, out, x0, abar, prediction, clip_x0)
    # the share of the variance 1 - abar' that is new noise: s^2 = share * (1 - abar')
    share = eta**2 * ((abar_prev - abar) / (abar_prev * (1 - abar)))
    direction = _sqrt((1 - abar_prev) * (1 - share).clamp(min=0))
    x_prev = _sqrt(abar_prev) * x0 + direction * epsilon
    if eta > 0:
        assert key is not None
        noise = noise_like(x_t, key, sharing, base_weight, sample_offset, step=t)
        x_prev = x_prev + _sqrt((1 - abar_prev) * share) * noise
    return _finish(x_t, x_prev, t, hold)


def ddpm_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    alphas_cumprod: Tensor,
    prediction: str,
    variance: str,
    key: Tensor,
    guidance_scale: float | None,
    hold: Tensor | None,
    clip_x0: float | None,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> Tensor:
    """Return a draw from p(x_prev | x_t): the posterior's mean at the predicted x0, plus the noise."""
    wide = _wide(x_t)
    x = x_t.to(wide)
    batch, _, channels, *_ = x.shape
    out = _guided(model_out[:, :, :channels].to(wide), batch, guidance_scale)
    abar, abar_prev = _at(alphas_cumprod, t, 1.0, wide), _at(alphas_cumprod, t_prev, 1.0, wide)
    beta = (abar_prev - abar) / abar_prev
    x0_weight = beta * _sqrt(abar_prev) / (1 - abar)
    x_weight = _sqrt(abar / abar_prev) * ((1 - abar_prev) / (1 - abar))
    x0 = _predicted_x0(x, out, abar, prediction, clip_x0)
    mean = x0_weight * x0 + x_weight * x

    posterior = beta * ((1 - abar_prev) / (1 - abar))
    if variance == "learned_range":
        fraction = (model_out[:batch, :, channels:].to(wide) + 1) * 0.5
        log_low, log_high = posterior.log(), beta.log()
        std = (0.5 * (log_low + fraction * (log_high - log_low))).exp()
    else:
        std = _sqrt(posterior if variance == "fixed_small" else beta)
    noise = noise_like(x_t, key, sharing, base_weight, sample_offset, step=t)
    x_prev = torch.where(posterior > 0, mean + std * noise, mean)  # the last step adds none
    return _finish(x_t, x_prev, t, hold)


def flow_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    sigma: Tensor,
    prediction: str,
    guidance_scale: float | None,
    hold: Tensor | None,
    clip_x0: float | None,
) -> Tensor:
    """Return x_t + (sigma' - sigma) v, the Euler step along dx/dsigma = v = noise - x0."""
    wide = _wide(x_t)
    x = x_t.to(wide)
    out = _guided(model_out[:, :, : x.shape[2]].to(wide), x.shape[0], guidance_scale)
    now, then = _at(sigma, t, 0.0, wide), _at(sigma, t_prev, 0.0, wide)
    if prediction == "flow" and clip_x0 is None:
        velocity = out
    else:
        x0 = _clamped(x - now * out if prediction == "flow" else out, clip_x0)
        velocity = (1 / now) * (x - x0)
    return _finish(x_t, x + (then - now) * velocity, t, hold)

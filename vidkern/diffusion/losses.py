"""Training losses: weighted mean squared error and, for a learned variance, the variational bound of each frame."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidkern import ops
from vidkern.diffusion.schedules import Schedule


def diffusion_loss(
    model: Callable[..., Tensor],
    x0: Tensor,
    t: Tensor,
    schedule: Schedule,
    key: Tensor,
    *,
    y: Tensor | None = None,
    prediction: str = "epsilon",
    learned_range: bool = True,
    hold: Tensor | None = None,
    min_snr: float | None = None,
    sharing: str = "independent",
    base_weight: Tensor | float | None = None,
    sample_offset: int = 0,
) -> dict[str, Tensor]:
    """Return the loss of one training step: noise, one call of the model, mse and vb. Never waits for the device.

    With ``learned_range`` it is the hybrid loss mse + vb of Nichol & Dhariwal 2021, with no factor on vb, as DiT, Latte
    and FVDM train: the second half of the model's channels interpolates the log variance between its bounds, and vb is,
    in bits per dimension, the negative log likelihood of the decoder in frames at timestep 0 and the KL divergence in
    the others. The predicted mean gets no gradient from vb.

    Args:
        model: called as model(x_t, t) or model(x_t, t, y); returns (B, F, C, H, W), with 2C channels if
            ``learned_range``.
        x0: clean clips or latents, (B, F, C, H, W), scaled to [-1, 1] or to unit variance.
        t: int64 (B,), or (B, F) for one timestep a frame. The model gets it as it is.
        schedule: on x0's device.
        key: the noise key, int64 (2,) on x0's device.
        y: the condition of each sample.
        prediction: what the model predicts: "epsilon" the noise n; "v" alpha n - sigma x_0; "flow" n - x_0; "x0".
        learned_range: whether the model also predicts the variance.
        hold: bool (B, F), true for frames that are given: they enter the model clean and do not count.
            The task functions return it beside a t that is 0 there.
        min_snr: clamp of the min-SNR weights of the mse (Hang et al. 2023); None: no weights.
        sharing, base_weight, sample_offset: see ``vidkern.ops.add_noise``.

    Returns:
        "loss", the mean over the counted frames, 0-dimensional, carrying the gradient; "mse", "vb" (0 without
        ``learned_range``), its two parts, and "per_frame", their sum for each frame (B, F): float32 and detached.

    Raises:
        ValueError: a learned range for a schedule that is not variance-preserving, a model output of another shape.
        TypeError, ValueError: as ``vidkern.ops.add_noise`` and ``vidkern.ops.diffusion_mse``.
    """
    if learned_range and not schedule.variance_preserving:
        raise ValueError(f"learned_range needs a variance-preserving schedule, got {schedule.name!r}")
    tau = per_frame(t, x0.shape[1])
    alpha, sigma = schedule.coefficients(tau if hold is None else tau.masked_fill(hold, -1))
    noise: dict[str, Any] = {"sharing": sharing, "base_weight": base_weight, "sample_offset": sample_offset}
    x_t = ops.add_noise(x0, alpha, sigma, key, **noise)

    out = model(x_t, t) if y is None else model(x_t, t, y)
    channels = x0.shape[2] * (2 if learned_range else 1)
    wanted = (*x0.shape[:2], channels, *x0.shape[3:])
    if out.shape != wanted:
        raise ValueError(f"model must return shape {tuple(wanted)}, got {tuple(out.shape)}")
    pred = out[:, :, : x0.shape[2]]

    weight = None if min_snr is None else min_snr_weight(alpha, sigma, min_snr, prediction)
    mse = ops.diffusion_mse(pred, x0, alpha, sigma, key, prediction=prediction, weight=weight, **noise)
    vb = torch.zeros_like(mse)
    if learned_range:
        guess = predict_x0(pred.detach(), x_t, alpha, sigma, prediction)
        vb = variational_bound(x0, guess, out[:, :, x0.shape[2] :], tau, schedule)

    frames = mse + vb
    return {
        "loss": _mean(frames, hold),
        "mse": _mean(mse.detach(), hold),
        "vb": _mean(vb.detach(), hold),
        "per_frame": frames.detach(),
    }


def variational_bound(x0: Tensor, guess: Tensor, fraction: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return the term of the variational bound at timestep t, in bits per dimension, for each frame.

    Args:
        x0, guess: the clean clip and the model's prediction of it, (B, F, C, H, W).
        fraction: the model's variance channels v, (B, F, C, H, W): the log variance is (v + 1)/2 of the way from that
            of the posterior q(x_{t-1} | x_t, x_0) to log beta_t.
        t: int64 (B, F). Frames at 0 get -log p(x_0 | x_1), others KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).

    Returns:
        float32 (B, F).
    """
    assert schedule.posterior_mean_coef is not None  # a variance-preserving schedule has all three tables
    assert schedule.posterior_log_variance is not None
    assert schedule.log_beta is not None
    low = over_pixels(schedule.posterior_log_variance[t])
    high = over_pixels(schedule.log_beta[t])
    excess = (fraction.float() + 1) / 2 * (high - low)
    # the two means differ by their x_0 only: their x_t terms are equal
    distance = over_pixels(schedule.posterior_mean_coef[t]) * (x0.float() - guess.float())
    log_variance = low + excess
    kl = 0.5 * (excess - 1 + torch.exp(-excess) + distance**2 * torch.exp(-log_variance))
    # at t = 0 the mean is the predicted x_0 itself, so ``distance`` is x_0 - mean
    nll = discretized_gaussian_nll(x0.float(), distance, 0.5 * log_variance)
    return torch.where(over_pixels(t == 0), nll, kl).mean((2, 3, 4)) / math.log(2)


def discretized_gaussian_nll(x0: Tensor, distance: Tensor, log_scale: Tensor) -> Tensor:
    """Return -log p, in nats, of 8-bit values in [-1, 1] under a Gaussian (Ho et al. 2020, equation 13).

    Args:
        x0: the values. Bins are 2/255 wide; those of -1 and 1 extend to infinity.
        distance: x0 minus the Gaussian's mean, of x0's shape.
        log_scale: log of its standard deviation.
    """
    inverse = torch.exp(-log_scale)
    # every difference is taken in the left tail, where float32 resolves it
    far = distance.abs()
    inner = _normal_cdf(inverse * (1 / 255 - far)) - _normal_cdf(inverse * (-1 / 255 - far))
    below = _normal_cdf(inverse * (distance + 1 / 255))
    above = _normal_cdf(inverse * (1 / 255 - distance))
    probability = torch.where(x0 < -0.999, below, torch.where(x0 > 0.999, above, inner))
    return -probability.clamp(min=1e-12).log()


def predict_x0(pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """Return the clean clip that a prediction implies at x_t, in float32.

    Args:
        pred, x_t: (B, F, C, H, W).
        alpha, sigma: float32 (B, F).
        prediction: "epsilon", "v", "flow" or "x0".
    """
    a, s, pred, x_t = over_pixels(alpha), over_pixels(sigma), pred.float(), x_t.float()
    if prediction == "epsilon":
        return (x_t - s * pred) / a
    if prediction == "v":
        return (a * x_t - s * pred) / (a**2 + s**2)
    if prediction == "flow":
        return (x_t - s * pred) / (a + s)
    return pred


def min_snr_weight(alpha: Tensor, sigma: Tensor, clamp: float, prediction: str) -> Tensor:
    """Return the min-SNR weight of a squared error (Hang et al. 2023), (B, F): min(snr, clamp) for the x_0 loss."""
    snr = (alpha / sigma) ** 2
    if prediction == "epsilon":
        return (clamp / snr).clamp(max=1)
    least = snr.clamp(max=clamp)
    if prediction == "v":
        return least / (snr + 1)
    if prediction == "flow":
        return least * (sigma / (alpha + sigma)) ** 2
    return least


def per_frame(t: Tensor, frames: int) -> Tensor:
    """Return timesteps (B,) or (B, F) as (B, F), without a copy."""
    return t if t.dim() == 2 else t[:, None].expand(-1, frames)


def over_pixels(v: Tensor) -> Tensor:
    """Return a per-frame value (B, F) as (B, F, 1, 1, 1)."""
    return v[:, :, None, None, None]


def _normal_cdf(x: Tensor) -> Tensor:
    # the approximation that ADM and DiT train with (Page 1977): (1 + tanh u) / 2 is sigmoid(2 u)
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _mean(frames: Tensor, hold: Tensor | None) -> Tensor:
    """Return the mean over the frames that are not given."""
    if hold is None:
        return frames.mean()
    counted = (~hold).to(frames.dtype)
    return (frames * counted).sum() / counted.sum().clamp(min=1)

"""Training losses: weighted mean squared error and, for a learned variance, the variational bound of each frame."""

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
        TypeError, ValueError: as ``vidkern.ops.add_noise``, ``vidkern.ops.diffusion_mse`` and
            ``vidkern.ops.hybrid_loss``, by which x0 gets no gradient.
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

    weight = None if min_snr is None else min_snr_weight(alpha, sigma, min_snr, prediction)
    options: dict[str, Any] = {"prediction": prediction, "weight": weight, **noise}
    if learned_range:
        mse, vb = ops.hybrid_loss(out, x0, alpha, sigma, tau, schedule, key, **options)
    else:
        mse = ops.diffusion_mse(out, x0, alpha, sigma, key, **options)
        vb = torch.zeros_like(mse)

    frames = mse + vb
    return {
        "loss": _mean(frames, hold),
        "mse": _mean(mse.detach(), hold),
        "vb": _mean(vb.detach(), hold),
        "per_frame": frames.detach(),
    }


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


def _mean(frames: Tensor, hold: Tensor | None) -> Tensor:
    """Return the mean over the frames that are not given."""
    if hold is None:
        return frames.mean()
    counted = (~hold).to(frames.dtype)
    return (frames * counted).sum() / counted.sum().clamp(min=1)

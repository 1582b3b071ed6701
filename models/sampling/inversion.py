"""DDIM inversion: the noise from which deterministic sampling draws a given clip."""

from collections.abc import Callable

import torch
from torch import Tensor

from vidkern.diffusion import Schedule, respace


@torch.no_grad()
def invert(
    model: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    prediction: str = "epsilon",
    refinements: int = 0,
) -> Tensor:
    """Return z_T, float32 of x0's shape, such that ``sample`` with DDIM, eta 0 and as many steps draws x0 from it.

    A step of DDIM leads from z_t to z_s = alpha_s x_0 + sigma_s eps(z_t, t) (Song et al. 2021, eq. 12). Solved for z_t,

        z_t = alpha_t / alpha_s z_s + (sigma_t - sigma_s alpha_t / alpha_s) eps(z_t, t),

    whose right side wants the z_t sought. The usual inversion evaluates eps at z_s; each refinement evaluates it again,
    at the z_t found so far (Pan et al. 2023), which shrinks the error by the factor in front of eps times the network's
    slope, where that is below 1. It costs (1 + refinements) num_steps calls of the model.

    S2DM draws a given first frame so: inverted as a clip of one frame with motion at rest, its z_T is the noise that
    all frames share.

    Args:
        model: called as model(x, t) with t int64 (B, F); its first C output channels count. Guidance makes the slope
            larger by about its scale, so that an inversion without it comes back closer.
        x0: (B, F, C, H, W).
        schedule: variance-preserving, on x0's device.
        num_steps: of the sampling.
        prediction: what the model predicts: "epsilon", "v" or "x0".
        refinements: further evaluations of each step.

    Raises:
        ValueError: a schedule or a prediction without DDIM.
    """
    if not schedule.variance_preserving:
        raise ValueError(f"schedule must be variance-preserving, got {schedule.name!r}")
    if prediction not in ("epsilon", "v", "x0"):
        raise ValueError(f"prediction must be epsilon, v or x0, got {prediction!r}")
    z = x0.float()
    alpha_s, sigma_s = z.new_tensor(1.0), z.new_tensor(0.0)
    for step in respace(schedule.num_steps, num_steps).tolist():
        t = torch.full(z.shape[:2], step, dtype=torch.int64, device=z.device)
        alpha_t, sigma_t = schedule.alpha[step], schedule.sigma[step]
        ratio = alpha_t / alpha_s
        scaled, factor = ratio * z, sigma_t - sigma_s * ratio
        z_t = z
        for _ in range(1 + refinements):
            out = model(z_t, t)[:, :, : z.shape[2]].float()
            z_t = scaled + factor * _epsilon(out, z_t, alpha_t, sigma_t, prediction)
        z, alpha_s, sigma_s = z_t, alpha_t, sigma_t
    return z


def _epsilon(out: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The noise in z = alpha x_0 + sigma eps, whatever the network predicts."""
    if prediction == "v":
        return alpha * out + sigma * z
    if prediction == "x0":
        return (z - alpha * out) / sigma
    return out

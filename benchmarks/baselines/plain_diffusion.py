"""The diffusion process as public code computes it, in plain PyTorch: gathered tables, stored noise, term by term.

The arithmetic is that of ADM's Gaussian diffusion (Dhariwal & Nichol 2021), which DiT, Latte and FVDM train and sample
with. Its tables lie on the schedule's device, or as in the public code on the host, which copies them at every use.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from vidkern.diffusion import Schedule
from vidkern.diffusion.schedules import respace

Model = Callable[..., Tensor]


class PlainDiffusion:
    """Loss and DDIM steps of a model that predicts epsilon and the learned range of the variance, (B, F, 2C, H, W).

    Timesteps are (B,), or (B, F) with one for each frame (FVDM).
    """

    def __init__(self, schedule: Schedule, tables_on_host: bool = False) -> None:
        abar = schedule.alphas_cumprod.double()
        before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        beta = 1 - abar / before
        variance = beta * (1 - before) / (1 - abar)
        tables = {
            "abar": abar,
            "alpha": abar.sqrt(),
            "sigma": (1 - abar).sqrt(),
            "inverse_alpha": (1 / abar).sqrt(),
            "sigma_over_alpha": (1 / abar - 1).sqrt(),
            "mean_of_x0": beta * before.sqrt() / (1 - abar),
            "mean_of_x_t": (1 - before) * (1 - beta).sqrt() / (1 - abar),
            "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
            "log_beta": beta.log(),
        }
        self.tables = {name: table.cpu() if tables_on_host else table.float() for name, table in tables.items()}

    def at(self, name: str, t: Tensor) -> Tensor:
        """Gather a table at t, to stand beside a clip."""
        return _beside_a_clip(self.tables[name].to(t.device)[t].float())

    def loss(self, model: Model, x0: Tensor, t: Tensor, y: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Return mse + vb of a training step; draws the noise unless it is given."""
        noise = torch.randn_like(x0) if noise is None else noise
        x_t = self.at("alpha", t) * x0 + self.at("sigma", t) * noise
        pred, fraction = model(x_t, t, *([] if y is None else [y])).chunk(2, dim=2)
        vb = self.variational_bound(pred.detach(), fraction, x0, x_t, t)
        mse = ((noise - pred) ** 2).flatten(t.dim()).mean(t.dim())
        return (mse + vb).mean()

    def guided_ddim_step(
        self, model: Model, x: Tensor, t: Tensor, t_prev: Tensor, y: Tensor, scale: float, eta: float = 0.0
    ) -> Tensor:
        """Take a DDIM step of a batch of 2B, whose halves are the same clips under y's two halves."""
        half = x.chunk(2)[0]
        epsilon, fraction = model(torch.cat([half, half]), t, y).chunk(2, dim=2)
        cond, uncond = epsilon.chunk(2)
        guided = uncond + scale * (cond - uncond)
        epsilon = torch.cat([guided, guided])
        x0, _, _ = self._denoised(epsilon, fraction, x, t)
        epsilon = (self.at("inverse_alpha", t) * x - x0) / self.at("sigma_over_alpha", t)
        abar = self.at("abar", t)
        abar_prev = torch.where(_beside_a_clip(t_prev < 0), 1.0, self.at("abar", t_prev.clamp(min=0)))
        std = eta * torch.sqrt((1 - abar_prev) / (1 - abar)) * torch.sqrt(1 - abar / abar_prev)
        mean = x0 * torch.sqrt(abar_prev) + torch.sqrt(1 - abar_prev - std**2) * epsilon
        nonzero = _beside_a_clip(t_prev >= 0).float()
        return mean + nonzero * std * torch.randn_like(x)

    @torch.no_grad()
    def sample(
        self, model: Model, x: Tensor, steps: int, y: Tensor, y_null: int, scale: float, per_frame: bool
    ) -> Tensor:
        """Draw clips from noise x (B, F, C, H, W) by so many DDIM steps under guidance, the clip or each frame at t."""
        taus = [*reversed(respace(len(self.tables["abar"]), steps).tolist()), -1]
        both = torch.cat([y, torch.full_like(y, y_null)])
        x = torch.cat([x, x])
        shape = x.shape[: 2 if per_frame else 1]
        for now, then in itertools.pairwise(taus):
            t, t_prev = (torch.full(shape, tau, device=x.device) for tau in (now, then))
            x = self.guided_ddim_step(model, x, t, t_prev, both, scale)
        return x.chunk(2)[0]

    def _denoised(self, epsilon: Tensor, fraction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_0, and the mean and log variance of p(x_{t-1} | x_t)."""
        x0 = self.at("inverse_alpha", t) * x_t - self.at("sigma_over_alpha", t) * epsilon
        low, high = self.at("log_variance", t), self.at("log_beta", t)
        share = (fraction + 1) / 2
        return x0, self._posterior_mean(x0, x_t, t), share * high + (1 - share) * low

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.at("mean_of_x0", t) * x0 + self.at("mean_of_x_t", t) * x_t

    def variational_bound(self, epsilon: Tensor, fraction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the term of the bound at t, of t's shape, in bits per dimension."""
        true_mean, true_log_variance = self._posterior_mean(x0, x_t, t), self.at("log_variance", t)
        _, mean, log_variance = self._denoised(epsilon, fraction, x_t, t)
        kl = 0.5 * (
            -1.0
            + log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        nll = -_log_likelihood(x0, mean, 0.5 * log_variance)
        kl, nll = (term.flatten(t.dim()).mean(t.dim()) / math.log(2.0) for term in (kl, nll))
        return torch.where(t == 0, nll, kl)


def _beside_a_clip(values: Tensor) -> Tensor:
    """Return (B,) or (B, F) as (B, 1 or F, 1, 1, 1)."""
    return values[(..., *[None] * (5 - values.dim()))]


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log likelihood of 8-bit values in [-1, 1] under a Gaussian, each in its bin."""
    centred, inverse = x - mean, torch.exp(-log_scale)
    below = _normal_cdf(inverse * (centred + 1.0 / 255.0))
    above = _normal_cdf(inverse * (centred - 1.0 / 255.0))
    first = torch.log(below.clamp(min=1e-12))
    last = torch.log((1.0 - above).clamp(min=1e-12))
    inner = torch.log((below - above).clamp(min=1e-12))
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, inner))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))

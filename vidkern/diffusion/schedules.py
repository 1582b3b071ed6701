"""Noise schedules: tables of the forward process as device tensors, respacing, and the SDE view."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

SDE_BETA_MIN = 0.1
SDE_BETA_MAX = 20.0


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The forward process x_t = alpha[t] * x_0 + sigma[t] * n for t = 0 .. num_steps - 1.

    Every table is float32 of shape (num_steps,), computed in float64 and rounded once.

    Args:
        name: the name that ``make_schedule`` was given.
        num_steps: the number of steps T.
        alphas_cumprod: alpha^2, the "alpha bar" of a variance-preserving schedule.
        alpha, sigma: the coefficients of the signal and of the noise.
        posterior_mean_coef: weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7).
        posterior_log_variance: log of that posterior's variance; entry 0, whose variance is 0, repeats entry 1.
        log_beta: log(1 - alphas_cumprod[t] / alphas_cumprod[t - 1]).

    The last three are None for a schedule that is not variance-preserving (flow matching).
    """

    name: str
    num_steps: int
    alphas_cumprod: Tensor
    alpha: Tensor
    sigma: Tensor
    posterior_mean_coef: Tensor | None = None
    posterior_log_variance: Tensor | None = None
    log_beta: Tensor | None = None
    _levels: Tensor = dataclasses.field(init=False, repr=False)  # (2, T + 1): alpha and sigma, the clean end last

    def __post_init__(self) -> None:
        """Lay alpha and sigma side by side, so that one gather reads both."""
        clean = self.alpha.new_tensor([[1.0], [0.0]])
        object.__setattr__(self, "_levels", torch.cat([torch.stack([self.alpha, self.sigma]), clean], 1))

    @property
    def device(self) -> torch.device:
        """Return where the tables lie."""
        return self.alpha.device

    @property
    def variance_preserving(self) -> bool:
        """Return whether alpha^2 + sigma^2 = 1, which DDPM and DDIM need."""
        return self.log_beta is not None

    def to(self, device: torch.device | str) -> "Schedule":
        """Return the same schedule with its tables on ``device``."""
        tables: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        moved: dict[str, Any] = {name: t.to(device) for name, t in tables.items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **moved)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Gather (alpha, sigma), float32 of t's shape, without a host synchronisation.

        Args:
            t: int64 indices of any shape on the schedule's device; -1 is the clean end (alpha 1, sigma 0).
        """
        alpha, sigma = self._levels[:, t]
        return alpha, sigma


def make_schedule(
    name: str, num_steps: int = 1000, device: torch.device | str | None = None, **options: float
) -> Schedule:
    """Build a schedule's tables on ``device``.

    Args:
        name: "linear" (DDPM; Latte and FVDM), "scaled_linear" (Stable Diffusion), "cosine" (Nichol & Dhariwal 2021),
            "sde" (the variance-preserving SDE, Song et al. 2021) or "flow" (flow matching, sigma from 1/T to 1).
        num_steps: the number of steps T, at least 2.
        device: where the tables go; the CPU if None.
        **options: linear and scaled_linear: beta_start, beta_end; cosine: offset, max_beta; sde: beta_min, beta_max;
            flow: shift (Esser et al. 2024, eq. 23).

    Raises:
        ValueError: an unknown name or option, or num_steps < 2.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, got {num_steps}")
    tables = SCHEDULES[name]
    allowed = tables.__kwdefaults__ or {}
    for option in options:
        if option not in allowed:
            raise ValueError(f"options of schedule {name!r} must be among {', '.join(allowed)}, got {option}")
    arrays = tables(num_steps, **options)
    tensors = {k: torch.from_numpy(v).to(dtype=torch.float32, device=device) for k, v in arrays.items()}
    return Schedule(name=name, num_steps=num_steps, **tensors)


def respace(num_steps: int, count: int | str) -> Tensor:
    """Pick ``count`` evenly spaced steps out of ``num_steps``, the first and the last included.

    Returns:
        int64 tensor of shape (count,) on the CPU, ascending: respace(1000, "50") is 0, 20, 41, ..., 999.

    Raises:
        ValueError: ``count`` is not a whole number from 1 to ``num_steps``.
    """
    if not str(count).isdecimal() or not 1 <= int(count) <= num_steps:
        raise ValueError(f"count must be a whole number from 1 to {num_steps}, got {count!r}")
    return torch.from_numpy(np.rint(np.linspace(0, num_steps - 1, int(count))).astype(np.int64))


def sde_beta(s: Tensor, beta_min: float = SDE_BETA_MIN, beta_max: float = SDE_BETA_MAX) -> Tensor:
    """Return the rate beta(s) = beta_min + s * (beta_max - beta_min) at continuous times s in [0, 1], of s's shape."""
    return beta_min + s * (beta_max - beta_min)


def sde_drift(x: Tensor, s: Tensor, beta_min: float = SDE_BETA_MIN, beta_max: float = SDE_BETA_MAX) -> Tensor:
    """Return the drift -beta(s)/2 * x of the forward SDE, with a time for every frame (FVDM, section 2.2).

    Args:
        x: (B, F, C, H, W).
        s: continuous times in [0, 1], (B, F).
    """
    return -0.5 * sde_beta(s, beta_min, beta_max)[:, :, None, None, None] * x


def sde_diffusion(s: Tensor, beta_min: float = SDE_BETA_MIN, beta_max: float = SDE_BETA_MAX) -> Tensor:
    """Return the diffusion sqrt(beta(s)) of the forward SDE, of s's shape."""
    return sde_beta(s, beta_min, beta_max).sqrt()


def _linear(num_steps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> dict[str, np.ndarray]:
    scale = 1000 / num_steps  # the end points are those of 1000 steps
    return _from_betas(np.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=np.float64))


def _scaled_linear(num_steps: int, *, beta_start: float = 0.00085, beta_end: float = 0.012) -> dict[str, np.ndarray]:
    roots = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=np.float64)
    return _from_betas(roots**2)


def _cosine(num_steps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> dict[str, np.ndarray]:
    s = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    alphas_cumprod = np.cos((s + offset) / (1 + offset) * math.pi / 2) ** 2
    return _from_betas(np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], max_beta))


def _sde(num_steps: int, *, beta_min: float = SDE_BETA_MIN, beta_max: float = SDE_BETA_MAX) -> dict[str, np.ndarray]:
    s = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    integral = beta_min * s + 0.5 * (beta_max - beta_min) * s**2
    return _from_betas(-np.expm1(-np.diff(integral)))


def _flow(num_steps: int, *, shift: float = 1.0) -> dict[str, np.ndarray]:
    s = np.arange(1, num_steps + 1, dtype=np.float64) / num_steps
    sigma = shift * s / (1 + (shift - 1) * s)
    return {"alphas_cumprod": (1 - sigma) ** 2, "alpha": 1 - sigma, "sigma": sigma}


def _from_betas(betas: np.ndarray) -> dict[str, np.ndarray]:
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"every beta must be inside (0, 1), got values from {betas.min():g} to {betas.max():g}")
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    return {
        "alphas_cumprod": alphas_cumprod,
        "alpha": np.sqrt(alphas_cumprod),
        "sigma": np.sqrt(1 - alphas_cumprod),
        "posterior_mean_coef": betas * np.sqrt(previous) / (1 - alphas_cumprod),
        "posterior_log_variance": np.log(np.append(variance[1], variance[1:])),
        "log_beta": np.log(betas),
    }


SCHEDULES: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "sde": _sde,
    "flow": _flow,
}

"""The optimiser: AdamW with the EMA of the weights in one pass, what its numbers are at a step, and clipping."""

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.config import OptimConfig
from models.training.ema import decay_at
from vidkern.optim import AdamWEMA

_NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclasses.dataclass(frozen=True)
class Rates:
    """What changes from step to step: numbers, or tensors () on the device for a step in a CUDA graph."""

    lr: float | Tensor
    """Learning rate."""
    ema_decay: float | Tensor
    """Decay of the averaged weights."""
    max_grad_norm: float | Tensor
    """Gradients of a larger global norm are scaled down to it; infinite where none are."""


def rates_at(config: OptimConfig, step: int) -> Rates:
    """The numbers of optimiser step `step`, counted from 1."""
    clips = config.max_grad_norm is not None and step >= config.clip_from_step
    limit = config.max_grad_norm if clips and config.max_grad_norm is not None else math.inf
    return Rates(learning_rate(config, step), decay_at(config, step), limit)


def learning_rate(config: OptimConfig, step: int) -> float:
    """A linear rise over `warmup_steps` steps, then constant."""
    return config.lr * min(1.0, step / config.warmup_steps) if config.warmup_steps else config.lr


def make_optimizer(model: nn.Module, ema: nn.Module, config: OptimConfig) -> AdamWEMA:
    """AdamW over the trained parameters of `model`, which moves those of `ema` after them."""
    pairs = [(p, e) for p, e in zip(model.parameters(), ema.parameters(), strict=True) if p.requires_grad]
    trained, averages = zip(*pairs, strict=True)
    return AdamWEMA(trained, averages, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def take_step(optimizer: AdamWEMA, config: OptimConfig, rates: Rates) -> Tensor:
    """Step with the gradients at hand, scaled down as `rates` say, and forget them.

    Returns their global 2-norm before, float32 () on the device.
    """
    for group in optimizer.param_groups:
        group.update(lr=rates.lr, ema_decay=rates.ema_decay, betas=config.betas, weight_decay=config.weight_decay)
    norm = gradient_norm(p for group in optimizer.param_groups for p in group["params"])
    optimizer.step(gradient_scale=_clip(norm, rates.max_grad_norm))
    optimizer.zero_grad(set_to_none=True)
    return norm


def _clip(norm: Tensor, limit: float | Tensor) -> Tensor | None:
    """What scales gradients of a norm down to a limit, as torch.nn.utils.clip_grad_norm_ does; None: nothing."""
    if isinstance(limit, Tensor):
        return (limit.to(norm.dtype) / (norm + _NORM_EPS)).clamp(max=1)
    return None if math.isinf(limit) else _clip(norm, torch.full_like(norm, limit))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The global 2-norm of the gradients, on the device."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

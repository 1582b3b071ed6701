"""The optimiser: fused AdamW, its learning rate at a step, and clipping."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters of `model`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def apply_settings(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> None:
    """Give every group the settings of `config` at optimiser step `step`, counted from 1."""
    for group in optimizer.param_groups:
        group.update(lr=learning_rate(config, step), betas=config.betas, weight_decay=config.weight_decay)


def learning_rate(config: OptimConfig, step: int) -> float:
    """A linear rise over `warmup_steps` steps, then constant."""
    return config.lr * min(1.0, step / config.warmup_steps) if config.warmup_steps else config.lr


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale the gradients down to a global 2-norm of `max_norm`, if given; return their norm before, on the device."""
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, math.inf if max_norm is None else max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

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


def clip_gradients(model: nn.Module, config: OptimConfig, step: int) -> Tensor:
    """Scale the gradients down as `config` says at `step`; return their global 2-norm before, on the device."""
    trained = [p for p in model.parameters() if p.requires_grad]
    limit = math.inf if config.max_grad_norm is None or step < config.clip_from_step else config.max_grad_norm
    norm = nn.utils.clip_grad_norm_(trained, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

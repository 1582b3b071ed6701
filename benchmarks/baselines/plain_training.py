"""A training step as the public code of Latte and FVDM takes it, in plain PyTorch."""

import random
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.baselines.plain_diffusion import Model, PlainDiffusion
from benchmarks.steps.parts import DATA, EMA, OPTIMISER, part

PER_FRAME_PROBABILITY = 0.2


class PlainTraining:
    """AdamW with PyTorch's defaults, an EMA parameter by parameter."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        diffusion: PlainDiffusion,
        learning_rate: float,
        max_grad_norm: float,
        decay: float,
    ) -> None:
        self.trained = [p for p in parameters.values() if p.requires_grad]
        self.parameters = parameters
        self.averaged = OrderedDict((name, p.detach().clone()) for name, p in parameters.items())
        self.optimiser = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=0.0)
        self.diffusion, self.max_grad_norm, self.decay = diffusion, max_grad_norm, decay

    def step(self, model: Model, x0: Tensor, y: Tensor, per_frame: bool, dtype: torch.dtype) -> Tensor:
        """Train on clips and labels that lie on the host; return the loss, which public code reads after every step.

        Args:
            model: what is called, of these parameters.
            x0: (B, F, C, H, W).
            y: (B,).
            per_frame: FVDM's timesteps: one for each frame in a fifth of the steps, else one for the clip; (B, F).
            dtype: bfloat16 is autocast.
        """
        device = self.trained[0].device
        with part(DATA):
            x0, y = x0.to(device, non_blocking=True), y.to(device, non_blocking=True)
        t = self._timesteps(x0, per_frame)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = self.diffusion.loss(model, x0, t, y)
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients, step, forget them, and move the average."""
        with part(OPTIMISER):
            nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
            self.optimiser.step()
            self.optimiser.zero_grad()
        with part(EMA), torch.no_grad():
            for name, parameter in self.parameters.items():
                self.averaged[name].mul_(self.decay).add_(parameter.data, alpha=1 - self.decay)

    def _timesteps(self, x0: Tensor, per_frame: bool) -> Tensor:
        steps = len(self.diffusion.tables["abar"])
        if not per_frame:
            return torch.randint(0, steps, (x0.shape[0],), device=x0.device)
        if random.random() < PER_FRAME_PROBABILITY:
            return torch.randint(0, steps, x0.shape[:2], device=x0.device)
        return torch.randint(0, steps, (x0.shape[0], 1), device=x0.device).repeat(1, x0.shape[1])

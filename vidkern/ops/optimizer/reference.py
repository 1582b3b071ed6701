"""What the optimiser's step means, in plain PyTorch: AdamW of scaled gradients, then the weights' moving average.

Arithmetic is float32 (float64 for float64 parameters) with one rounding at each store; the numbers that are the same
for all elements of a tensor are worked out in float64, and the average is of the weights as they were rounded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: Tensor,
    grad_scale: Tensor | None,
) -> None:
    """Take the step of :func:`vidkern.ops.adamw_ema_`."""
    for p, grad, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        wide = torch.promote_types(p.dtype, torch.float32)
        t = step.double()
        g = grad.to(wide) if grad_scale is None else grad.to(wide) * grad_scale.to(wide)
        mean = m.to(wide) + (1 - beta1) * (g - m.to(wide))
        square = beta2 * v.to(wide) + (1 - beta2) * (g * g)
        keep, step_size = 1 - lr.double() * weight_decay, lr.double() / (1 - beta1**t)
        root = square.sqrt() * (1 / (1 - beta2**t).sqrt()).to(wide)
        p.copy_(keep.to(wide) * p.to(wide) - step_size.to(wide) * mean / (root + eps))
        m.copy_(mean)
        v.copy_(square)
    for average, p in zip(averages, params, strict=bool(averages)):
        wide = torch.promote_types(average.dtype, torch.float32)
        share = (1 - ema_decay.double()).to(wide)
        average.copy_(average.to(wide) + share * (p.to(wide) - average.to(wide)))

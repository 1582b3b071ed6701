"""The optimiser's step by PyTorch's own kernels, for a GPU on which this package's library is not built."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidkern import _library
from vidkern._dispatch import forced_backend, tell


def wanted(device: torch.device) -> bool:
    """Whether the step on a device is PyTorch's: on a GPU that only the definition, 15 launches a parameter, serves."""
    if device.type != "cuda" or forced_backend() is not None:
        return False
    reason = _library.operators["adamw_ema_"].why_not("cuda", "cuda")
    if reason is not None:
        tell(f"adamw_ema_ on cuda: torch's fused AdamW, then its foreach operators, not cuda: {reason}")
    return reason is not None


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float | Tensor,
    grad_scale: Tensor | None,
) -> None:
    """Take the step of :func:`vidkern.ops.adamw_ema_`, in two passes; the gradients come out scaled."""
    divisor = None if grad_scale is None else grad_scale.float().reciprocal()
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        lr=lr.float() if isinstance(lr, Tensor) else lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
        found_inf=None if divisor is None else torch.zeros_like(divisor),
    )
    if averages:
        weights = [p.to(average.dtype) for p, average in zip(params, averages, strict=True)]
        distances = torch._foreach_sub(weights, list(averages))
        torch._foreach_mul_(distances, (1 - ema_decay).float() if isinstance(ema_decay, Tensor) else 1 - ema_decay)
        torch._foreach_add_(list(averages), distances)

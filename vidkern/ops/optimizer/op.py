"""The optimiser's operator: a step of AdamW and of the weights' moving average for many parameters at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidkern import _library
from vidkern._dispatch import compiled
from vidkern.ops import _check
from vidkern.ops.optimizer import reference

_NUMBERS = (torch.float32, torch.float64)


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    ema_decay: float | Tensor = 0.9999,
    grad_scale: Tensor | None = None,
) -> None:
    """Take a step of AdamW (Loshchilov & Hutter 2019) in place, and move the average of the weights after it.

        g = grad_scale * grad
        m = m + (1 - beta1) * (g - m),    v = beta2 * v + (1 - beta2) * g^2
        p = (1 - lr * weight_decay) * p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
        average = average + (1 - ema_decay) * (p - average)

    As torch.optim.AdamW followed by a lerp, in one pass over memory. Arithmetic is float32 (float64 for float64
    parameters). Not differentiable: what it changes has no history.

    Args:
        params: the parameters p, float32, float16, bfloat16 or float64, all of one dtype and device. Elements may lie
            in any dense order (contiguous, channels last), those of all tensors of one parameter in the same.
        grads: their gradients, which stay as they are; shapes, strides and dtypes of ``params``.
        exp_avgs: their first moments m, as ``grads``.
        exp_avg_sqs: their second moments v, as ``grads``.
        steps: float32 () each: the number t of this step for the parameter, from 1.
        averages: shapes and strides of ``params``, all of their dtype or all float32; None is AdamW alone.
        lr: learning rate; a tensor () of float32 or float64 on the device is read when the step runs.
        betas: decays of the moments, in [0, 1).
        eps: at least 0.
        weight_decay: decoupled, at least 0.
        ema_decay: in [0, 1], or a tensor as ``lr``.
        grad_scale: None (1), or a tensor as ``lr``: what clipping multiplies gradients by.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, strides, range or device, or lists of
            different lengths.
    """
    if not params:
        return
    first = params[0]
    _check_tensors(params, grads, exp_avgs, exp_avg_sqs, averages or [], steps)
    _check_ranges(betas, eps, weight_decay)
    rate, decay = _number("lr", lr, first), _number("ema_decay", ema_decay, first)
    if grad_scale is not None:
        _number("grad_scale", grad_scale, first)
    _adamw_ema_(
        params, grads, exp_avgs, exp_avg_sqs, steps, averages or [], rate, *betas, eps, weight_decay, decay, grad_scale
    )
    if not torch.compiler.is_compiling():  # a backward pass that saved the old values must notice
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *(averages or [])])


def _check_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> None:
    """Require dense parameters of one dtype and device, lists of tensors like them, and steps."""
    for i, p in enumerate(params):
        _check.is_tensor(f"params[{i}]", p)
    first = params[0]
    _check.has_dtype("params[0]", first, _check.FLOATS)
    places = [(p.shape, p.stride()) for p in params]
    for name, tensors in {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}.items():
        _check_list(name, tensors, places, first, first.dtype)
    for i, p in enumerate(params):
        if not (p.is_contiguous() or _is_dense(p)):
            raise ValueError(
                f"params[{i}] must be dense in memory, got shape {tuple(p.shape)} with strides {tuple(p.stride())}"
            )
    if averages:
        _check.is_tensor("averages[0]", averages[0])
        _check.has_dtype("averages[0]", averages[0], (first.dtype, torch.promote_types(first.dtype, torch.float32)))
        _check_list("averages", averages, places, first, averages[0].dtype)
    _check_list("steps", steps, [((), ())] * len(params), first, torch.float32)


def _check_list(
    name: str,
    tensors: Sequence[Any],
    places: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    first: Tensor,
    dtype: torch.dtype,
) -> None:
    """Require a tensor for each shape and strides in ``places``; in bulk, as hundreds are checked at every step."""
    if len(tensors) != len(places):
        raise ValueError(f"{name} must have one tensor for each of the {len(places)} params, got {len(tensors)}")
    device = first.device
    if all(isinstance(t, Tensor) and t.dtype == dtype and t.device == device for t in tensors) and (
        [(t.shape, t.stride()) for t in tensors] == places
    ):
        return
    for i, (tensor, (shape, strides)) in enumerate(zip(tensors, places, strict=True)):
        _check.is_tensor(f"{name}[{i}]", tensor)
        _check.has_shape(f"{name}[{i}]", tensor, shape, "()" if name == "steps" else f"the shape of params[{i}]")
        _check.has_dtype(f"{name}[{i}]", tensor, (dtype,))
        _check.same_device(f"{name}[{i}]", tensor, "params[0]", first)
        if tensor.stride() != strides:
            raise ValueError(f"{name}[{i}] must have the strides of params[{i}] = {strides}, got {tensor.stride()}")


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_ranges(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {betas}")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _number(name: str, value: float | Tensor, first: Tensor) -> Tensor:
    """Return a number as a tensor () on the parameters' device."""
    if isinstance(value, Tensor):
        _check.has_shape(name, value, (), "()")
        _check.has_dtype(name, value, _NUMBERS)
        _check.same_device(name, value, "params[0]", first)
        return value
    if not (value >= 0 if name == "lr" else 0 <= value <= 1):
        raise ValueError(f"{name} must be {'at least 0' if name == 'lr' else 'from 0 to 1'}, got {value}")
    return torch.full((), value, dtype=torch.float64, device=first.device)


def _supports(params: Sequence[Tensor], *_: Any) -> str | None:
    """Whether the compiled kernels take a call: the public function has checked everything else."""
    return "float64 is the reference's" if params[0].dtype == torch.float64 else None


def _changed_in_place(*_: Any) -> None:
    """Nothing is returned."""


_adamw_ema_ = _library.define(
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] steps,"
    " Tensor(d!)[] averages, Tensor lr, float beta1, float beta2, float eps, float weight_decay, Tensor ema_decay,"
    " Tensor? grad_scale) -> ()",
    kernels={
        "cpu": compiled("cpu", "adamw_ema_", _supports),
        "cuda": compiled("cuda", "adamw_ema_", _supports),
    },
    reference=reference.adamw_ema_,
    fake=_changed_in_place,
)

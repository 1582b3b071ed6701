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
    _check.is_tensor("params[0]", first)
    _check.has_dtype("params[0]", first, _check.FLOATS)
    _check_lists(params, {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}, first)
    if averages:
        _check_averages(params, averages, first)
    _check_steps(steps, len(params), first)
    _check_ranges(betas, eps, weight_decay)
    rate, decay = _number("lr", lr, first), _number("ema_decay", ema_decay, first)
    if grad_scale is not None:
        _number("grad_scale", grad_scale, first)
    _adamw_ema_(
        params, grads, exp_avgs, exp_avg_sqs, steps, averages or [], rate, *betas, eps, weight_decay, decay, grad_scale
    )
    if not torch.compiler.is_compiling():  # a backward pass that saved the old values must notice
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *(averages or [])])


def _check_lists(params: Sequence[Tensor], lists: dict[str, Sequence[Tensor]], first: Tensor) -> None:
    """Require tensors like the parameters, these dense; one pass where all is well."""
    for name, tensors in lists.items():
        _same_length(name, tensors, params)
        for i, (tensor, p) in enumerate(zip(tensors, params, strict=True)):
            if (
                isinstance(tensor, Tensor)
                and tensor.shape == p.shape
                and tensor.stride() == p.stride()
                and tensor.dtype == first.dtype
                and tensor.device == first.device
                and (tensor is not p or _is_dense(p))
            ):
                continue
            _refuse(f"{name}[{i}]", tensor, f"params[{i}]", p, (first.dtype,), first)


def _check_averages(params: Sequence[Tensor], averages: Sequence[Tensor], first: Tensor) -> None:
    _same_length("averages", averages, params)
    _check.is_tensor("averages[0]", averages[0])
    _check.has_dtype("averages[0]", averages[0], (first.dtype, torch.promote_types(first.dtype, torch.float32)))
    dtype = averages[0].dtype
    for i, (tensor, p) in enumerate(zip(averages, params, strict=True)):
        if not (
            isinstance(tensor, Tensor)
            and tensor.shape == p.shape
            and tensor.stride() == p.stride()
            and tensor.dtype == dtype
            and tensor.device == first.device
        ):
            _refuse(f"averages[{i}]", tensor, f"params[{i}]", p, (dtype,), first)


def _refuse(name: str, tensor: Any, of: str, p: Tensor, dtypes: Sequence[torch.dtype], first: Tensor) -> None:
    """Raise for what is wrong with a tensor that must be like a parameter, or nothing where all is well."""
    _check.is_tensor(name, tensor)
    _check.has_shape(name, tensor, p.shape, f"the shape of {of}")
    _check.has_dtype(name, tensor, dtypes)
    _check.same_device(name, tensor, "params[0]", first)
    if tensor.stride() != p.stride():
        raise ValueError(f"{name} must have the strides of {of} = {tuple(p.stride())}, got {tuple(tensor.stride())}")
    raise ValueError(f"{name} must be dense in memory, got shape {tuple(p.shape)} with strides {tuple(p.stride())}")


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_steps(steps: Sequence[Tensor], count: int, first: Tensor) -> None:
    if len(steps) != count:
        raise ValueError(f"steps must have one tensor for each of the {count} params, got {len(steps)}")
    for i, step in enumerate(steps):
        _check.is_tensor(f"steps[{i}]", step)
        _check.has_shape(f"steps[{i}]", step, (), "()")
        _check.has_dtype(f"steps[{i}]", step, (torch.float32,))
        _check.same_device(f"steps[{i}]", step, "params[0]", first)


def _check_ranges(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {betas}")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _same_length(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{name} must have one tensor for each of the {len(params)} params, got {len(tensors)}")


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

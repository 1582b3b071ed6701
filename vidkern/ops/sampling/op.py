"""The sampling operators: one DDIM, DDPM or flow-matching step of a clip, each frame at its own timestep."""

from typing import Any

import torch
from torch import Tensor

from vidkern import _library
from vidkern._dispatch import Kernel, compiled, triton_kernel
from vidkern.ops import _check
from vidkern.ops.noise.arguments import (
    check_choice,
    check_counts,
    check_key,
    weight_per_frame,
)
from vidkern.ops.sampling import reference

PREDICTIONS = ("epsilon", "v", "x0")
FLOW_PREDICTIONS = ("flow", "x0")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")


def ddim_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    schedule: Any,
    *,
    prediction: str = "epsilon",
    eta: float = 0.0,
    key: Tensor | None = None,
    guidance_scale: float | None = None,
    hold: Tensor | None = None,
    clip_x0: float | None = None,
    sharing: str = "independent",
    base_weight: float | Tensor | None = None,
    sample_offset: int = 0,
) -> Tensor:
    """Take every frame from its timestep t to t_prev by DDIM (Song et al. 2021, equation 12; FVDM 2.4).

        x_prev = sqrt(abar') * x0 + sqrt(1 - abar' - s^2) * eps + s * n
        s = eta * sqrt((1 - abar') / (1 - abar)) * sqrt(1 - abar / abar')

    with abar, abar' the schedule's alphas_cumprod at t and t_prev, and x0, eps what the model's output says. Where
    x0 is clipped, eps is taken anew from the clipped x0, as ADM does.

    Args:
        x_t: (B, F, C, H, W) float32, float16, bfloat16 or float64, any strides.
        model_out: (B, F, C or 2C, H, W), any strides and any of those dtypes; the second C channels (a learned
            variance) are not read. With ``guidance_scale`` its batch is 2B: conditional, then unconditional.
        t: (B, F) int64 indices into the schedule, any strides; -1 is clean, and such a frame comes out as it went in.
        t_prev: (B, F) int64, at most t; -1 makes the frame clean. An index of T or more is not checked.
        schedule: anything with ``alphas_cumprod``, (T,) float32 (float64 too where x_t is float64).
        prediction: what the model predicts: "epsilon", "v" = sqrt(abar) eps - sqrt(1 - abar) x0, or "x0".
        eta: in [0, 1]; 0 is deterministic, 1 has DDPM's variance.
        key: int64 (2,) noise key, needed where eta > 0. The timestep is part of the noise's counter, so one key
            serves all steps of a sampling run.
        guidance_scale: None, or g in uncond + g * (cond - uncond), applied to all C channels of the prediction.
        hold: None or (B, F) bool: held frames come out bit for bit as they went in.
        clip_x0: None, or a bound: x0 is clamped to [-clip_x0, clip_x0].
        sharing: how frames share the step's noise, see :func:`vidkern.ops.philox_normal`; frames that share a base
            take it at the latest of their timesteps.
        base_weight: see :func:`vidkern.ops.philox_normal`.
        sample_offset: see :func:`vidkern.ops.philox_normal`.

    Returns:
        x_prev: x_t's shape and dtype, contiguous. Inference only: raises on backward.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, range or device.
    """
    table = _check_step(x_t, model_out, t, t_prev, schedule, "alphas_cumprod", guidance_scale, hold, clip_x0)
    check_choice("prediction", prediction, PREDICTIONS)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be between 0 and 1, got {eta!r}")
    weight = None
    if eta > 0:
        if key is None:
            raise ValueError(f"key must be given where eta > 0, got None with eta = {eta!r}")
        weight = _check_noise(x_t, key, sharing, base_weight, sample_offset)
    return _ddim_step(
        x_t,
        model_out,
        t,
        t_prev,
        table,
        prediction,
        eta,
        key,
        guidance_scale,
        hold,
        clip_x0,
        sharing,
        weight,
        sample_offset,
    )


def ddpm_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    schedule: Any,
    *,
    prediction: str = "epsilon",
    variance: str = "learned_range",
    key: Tensor,
    guidance_scale: float | None = None,
    hold: Tensor | None = None,
    clip_x0: float | None = None,
    sharing: str = "independent",
    base_weight: float | Tensor | None = None,
    sample_offset: int = 0,
) -> Tensor:
    """Draw every frame's x_prev from p(x_prev | x_t), from timestep t to t_prev (Ho et al. 2020, equation 7).

        beta = 1 - abar / abar',    beta~ = beta * (1 - abar') / (1 - abar)
        x_prev = sqrt(abar') beta / (1 - abar) * x0 + sqrt(abar / abar') (1 - abar') / (1 - abar) * x_t + std * n

    A step to t_prev = -1 adds no noise. With any t_prev < t this is the respaced chain of ADM (Dhariwal & Nichol 2021).

    Args:
        x_t: see :func:`ddim_step`.
        model_out: (B, F, C or 2C, H, W), batch 2B with ``guidance_scale``, see :func:`ddim_step`.
        t: see :func:`ddim_step`.
        t_prev: see :func:`ddim_step`.
        schedule: see :func:`ddim_step`.
        prediction: see :func:`ddim_step`.
        variance: "learned_range": log std^2 = f log beta + (1 - f) log beta~, f = (v + 1) / 2 and v the second C
            channels of model_out, of its conditional half under guidance; "fixed_small": beta~; "fixed_large": beta.
        key: int64 (2,) noise key; one serves all steps of a run, see :func:`ddim_step`.
        guidance_scale: see :func:`ddim_step`; the variance is not guided.
        hold: see :func:`ddim_step`.
        clip_x0: see :func:`ddim_step`.
        sharing: see :func:`ddim_step`; S2DM may share the noise of the steps too.
        base_weight: see :func:`vidkern.ops.philox_normal`.
        sample_offset: see :func:`vidkern.ops.philox_normal`.

    Returns:
        x_prev: x_t's shape and dtype, contiguous. Inference only: raises on backward.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, range or device.
    """
    table = _check_step(x_t, model_out, t, t_prev, schedule, "alphas_cumprod", guidance_scale, hold, clip_x0)
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("variance", variance, VARIANCES)
    channels = x_t.shape[2]
    if variance == "learned_range" and model_out.shape[2] != 2 * channels:
        raise ValueError(
            f"model_out must have 2C = {2 * channels} channels with variance='learned_range', got {model_out.shape[2]}"
        )
    weight = _check_noise(x_t, key, sharing, base_weight, sample_offset)
    return _ddpm_step(
        x_t,
        model_out,
        t,
        t_prev,
        table,
        prediction,
        variance,
        key,
        guidance_scale,
        hold,
        clip_x0,
        sharing,
        weight,
        sample_offset,
    )


def flow_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    schedule: Any,
    *,
    prediction: str = "flow",
    guidance_scale: float | None = None,
    hold: Tensor | None = None,
    clip_x0: float | None = None,
) -> Tensor:
    """Take every frame from sigma(t) to sigma(t_prev) by an Euler step of flow matching (Lipman et al. 2023).

        x_prev = x_t + (sigma' - sigma) * v,    x_t = (1 - sigma) * x0 + sigma * n,    v = dx_t/dsigma = n - x0

    Args:
        x_t: see :func:`ddim_step`.
        model_out: (B, F, C or 2C, H, W), batch 2B with ``guidance_scale``, see :func:`ddim_step`.
        t: (B, F) int64 indices into the schedule; -1 is clean (sigma 0), and such a frame comes out as it went in.
        t_prev: (B, F) int64, at most t; -1 makes the frame clean. An index of T or more is not checked.
        schedule: anything with ``sigma``, (T,) float32 (float64 too where x_t is float64).
        prediction: "flow": v, noise minus data; or "x0".
        guidance_scale: see :func:`ddim_step`.
        hold: see :func:`ddim_step`.
        clip_x0: None, or a bound: x0 = x_t - sigma * v is clamped to [-clip_x0, clip_x0].

    Returns:
        x_prev: x_t's shape and dtype, contiguous. Inference only: raises on backward.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, range or device.
    """
    table = _check_step(x_t, model_out, t, t_prev, schedule, "sigma", guidance_scale, hold, clip_x0)
    check_choice("prediction", prediction, FLOW_PREDICTIONS)
    return _flow_step(x_t, model_out, t, t_prev, table, prediction, guidance_scale, hold, clip_x0)


def _check_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    schedule: Any,
    table_name: str,
    guidance_scale: float | None,
    hold: Tensor | None,
    clip_x0: float | None,
) -> Tensor:
    """Check what the three steps share; return the schedule's table."""
    _check.is_tensor("x_t", x_t)
    _check.has_dims("x_t", x_t, "(B, F, C, H, W)")
    _check.has_dtype("x_t", x_t, _check.FLOATS)
    _check_model_out(x_t, model_out, guidance_scale)
    per_frame = {"t": (t, torch.int64), "t_prev": (t_prev, torch.int64)}
    if hold is not None:
        per_frame["hold"] = (hold, torch.bool)
    for name, (value, dtype) in per_frame.items():
        _check.is_tensor(name, value)
        _check.has_shape(name, value, x_t.shape[:2], "(B, F)")
        _check.has_dtype(name, value, (dtype,))
        _check.same_device(name, value, "x_t", x_t)
    if clip_x0 is not None and not clip_x0 > 0:
        raise ValueError(f"clip_x0 must be None or a positive number, got {clip_x0!r}")
    table = getattr(schedule, table_name, None)
    if not isinstance(table, Tensor):
        raise TypeError(f"schedule must have a tensor {table_name!r}, got {type(schedule).__name__} without")
    name = f"schedule.{table_name}"
    _check.has_dims(name, table, "(T)")
    _check.has_dtype(name, table, (torch.float32, torch.float64) if x_t.dtype == torch.float64 else (torch.float32,))
    _check.same_device(name, table, "x_t", x_t)
    return table


def _check_model_out(x_t: Tensor, model_out: Tensor, guidance_scale: float | None) -> None:
    batch, frames, channels, *size = x_t.shape
    _check.is_tensor("model_out", model_out)
    if guidance_scale is None:
        layout = "(B, F, C or 2C, H, W)"
    else:
        batch, layout = 2 * batch, "(2B, F, C or 2C, H, W), as guidance_scale is given,"
    given = channels if model_out.dim() == 5 and model_out.shape[2] == channels else 2 * channels
    _check.has_shape("model_out", model_out, (batch, frames, given, *size), layout)
    _check.has_dtype("model_out", model_out, _check.FLOATS)
    _check.same_device("model_out", model_out, "x_t", x_t)


def _check_noise(
    x_t: Tensor, key: Tensor, sharing: str, base_weight: float | Tensor | None, sample_offset: int
) -> Tensor | None:
    check_key(key)
    _check.same_device("key", key, "x_t", x_t)
    batch, frames, channels, height, width = x_t.shape
    check_counts(batch, frames, channels * height * width, sample_offset)
    return weight_per_frame(sharing, base_weight, batch, frames, x_t.device)


def _supports(x_t: Tensor, model_out: Tensor, *_: Any) -> str | None:
    """Whether the compiled kernels take a call: the public function has checked everything else."""
    wide = torch.float64 in (x_t.dtype, model_out.dtype)
    return "float64 is the reference's" if wide else None


def _kernels(name: str) -> dict[str, Kernel]:
    """Return the kernels of every backend, each found by the operator's name."""
    return {
        "cpu": compiled("cpu", name, _supports),
        "triton": triton_kernel("vidkern.ops.sampling.triton_kernels", name, _supports),
        "cuda": compiled("cuda", name, _supports),
    }


def _x_prev_like(x_t: Tensor, *_: Any) -> Tensor:
    return x_t.new_empty(x_t.shape)


_ddim_step = _library.define(
    "ddim_step(Tensor x_t, Tensor model_out, Tensor t, Tensor t_prev, Tensor alphas_cumprod, str prediction,"
    " float eta, Tensor? key, float? guidance_scale, Tensor? hold, float? clip_x0, str sharing, Tensor? base_weight,"
    " SymInt sample_offset) -> Tensor",
    kernels=_kernels("ddim_step"),
    reference=reference.ddim_step,
    fake=_x_prev_like,
)

_ddpm_step = _library.define(
    "ddpm_step(Tensor x_t, Tensor model_out, Tensor t, Tensor t_prev, Tensor alphas_cumprod, str prediction,"
    " str variance, Tensor key, float? guidance_scale, Tensor? hold, float? clip_x0, str sharing,"
    " Tensor? base_weight, SymInt sample_offset) -> Tensor",
    kernels=_kernels("ddpm_step"),
    reference=reference.ddpm_step,
    fake=_x_prev_like,
)

_flow_step = _library.define(
    "flow_step(Tensor x_t, Tensor model_out, Tensor t, Tensor t_prev, Tensor sigma, str prediction,"
    " float? guidance_scale, Tensor? hold, float? clip_x0) -> Tensor",
    kernels=_kernels("flow_step"),
    reference=reference.flow_step,
    fake=_x_prev_like,
)


def _no_gradient(ctx: Any, *_: Any) -> None:
    raise RuntimeError("the sampler's steps have no gradient: they are for inference")


for _operator in (_ddim_step, _ddpm_step, _flow_step):
    _library.differentiate(_operator, save=lambda *_: None, backward=_no_gradient)

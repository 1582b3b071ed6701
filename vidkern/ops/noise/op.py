"""The noise operators: Philox noise, forward diffusion with a timestep per frame, and the losses on its target."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from vidkern import _library
from vidkern._dispatch import Kernel, compiled, triton_kernel
from vidkern.ops import _check
from vidkern.ops.noise import reference
from vidkern.ops.noise.arguments import (
    check_choice,
    check_counts,
    check_key,
    weight_per_frame,
)

TARGETS = ("epsilon", "v", "flow")
PREDICTIONS = (*TARGETS, "x0")


def philox_normal(
    shape: Sequence[int],
    key: Tensor,
    *,
    sharing: str = "independent",
    base_weight: float | Tensor | None = None,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw standard normal noise for a batch of clips: the same bits on every backend and device.

    The number at (b, f, e) is a function of the key, ``sample_offset + b``, f and e alone, e counting row-major
    over the dimensions after F; so ``philox_normal((8, ...), key)[4:]`` is
    ``philox_normal((4, ...), key, sample_offset=4)``. Philox4x32-10 (Salmon et al. 2011) and Box-Muller: README.md.

    Args:
        shape: (B, F, ...), two dimensions or more.
        key: int64 (2,) = (seed, offset), from :func:`vidkern.rng.next_key` or :class:`vidkern.rng.KeyStream`.
        sharing: "independent": each frame has its own noise; "shared": all frames of a sample have one (S2DM);
            "mixed": sqrt(w) * base + sqrt(1 - w) * own, base common to the frames (VideoFusion; PYoCo's mixed noise);
            "progressive": n_f = sqrt(w) * n_(f-1) + sqrt(1 - w) * own_f, n_0 = own_0 (PYoCo). Each frame's noise is
            standard normal in every mode. PYoCo's a is w = a^2 / (1 + a^2).
        base_weight: w in [0, 1], the share of the variance that is common, for "mixed" and "progressive": a number,
            or a float32 tensor (F,) or (B, F), whose range is not checked (outside it the noise is NaN).
        sample_offset: global index of the batch's first sample.
        dtype: of the result; the float32 noise is rounded to it once.
        device: None or the key's, where the result is.

    Returns:
        Noise of the shape and dtype, contiguous. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, range or device.
    """
    shape = tuple(shape)
    if len(shape) < 2 or any(size < 0 for size in shape):
        raise ValueError(f"shape must be (B, F, ...) with sizes of at least 0, got {shape}")
    batch, frames, *rest = shape
    check_key(key)
    if dtype not in _check.FLOATS:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    if device is not None and not _same_device(torch.device(device), key.device):
        raise ValueError(f"device must be None or the key's ({key.device}), got {device}")
    check_counts(batch, frames, _product(rest), sample_offset)
    weight = weight_per_frame(sharing, base_weight, batch, frames, key.device)
    return _philox_normal(shape, key, sharing, weight, sample_offset, dtype)


@overload
def add_noise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    *,
    sharing: str = ...,
    base_weight: float | Tensor | None = ...,
    target: None = ...,
    sample_offset: int = ...,
) -> Tensor: ...


@overload
def add_noise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    *,
    sharing: str = ...,
    base_weight: float | Tensor | None = ...,
    target: str,
    sample_offset: int = ...,
) -> tuple[Tensor, Tensor]: ...


def add_noise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    *,
    sharing: str = "independent",
    base_weight: float | Tensor | None = None,
    target: str | None = None,
    sample_offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Diffuse clean frames forward, each to its own noise level: x_t = alpha * x0 + sigma * n.

    n is :func:`philox_normal` of x0's shape. alpha, sigma = sqrt(abar), sqrt(1 - abar) is DDPM (Ho et al. 2020) with
    a timestep per frame (FVDM 2.2); 1 - s, s is flow matching (Lipman et al. 2023).

    Args:
        x0: (B, F, C, H, W) clean latents or pixels, any strides.
        alpha: (B, F) float32, any strides (float64 too where x0 is float64).
        sigma: as ``alpha``.
        key: int64 (2,), see :func:`philox_normal`.
        sharing: see :func:`philox_normal`; S2DM trains with "shared".
        base_weight: see :func:`philox_normal`.
        target: None, or what a model regresses on, written in the same pass: "epsilon": n; "v": alpha * n - sigma * x0
            (Salimans & Ho 2022); "flow": n - x0, the velocity of x_t as s grows.
        sample_offset: see :func:`philox_normal`.

    Returns:
        x_t, or (x_t, target): x0's shape and dtype, contiguous. Differentiable in x0, alpha and sigma.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, range or device.
    """
    weight = _check_diffusion(x0, alpha, sigma, key, sharing, base_weight, sample_offset)
    if target is not None:
        check_choice("target", target, TARGETS)
    x_t, regressed = _add_noise(x0, alpha, sigma, key, target, sharing, weight, sample_offset)
    return x_t if target is None else (x_t, regressed)


def diffusion_mse(
    pred: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    *,
    prediction: str = "epsilon",
    weight: Tensor | None = None,
    sharing: str = "independent",
    base_weight: float | Tensor | None = None,
    sample_offset: int = 0,
) -> Tensor:
    """Return each frame's mean squared error against the target that :func:`add_noise` had with the same key.

        loss[b, f] = weight[b, f] * mean over (C, H, W) of (pred - target)^2

    The noise is drawn again from the key instead of read, and the gradient is prepared in the same pass.

    Args:
        pred: (B, F, C, H, W) the model's output, any strides (the first half of a learned-range output is a view);
            float32, float16, bfloat16 or float64.
        x0: (B, F, C, H, W) what was given to :func:`add_noise`; its dtype may differ from pred's.
        alpha: (B, F), as given to :func:`add_noise`.
        sigma: as ``alpha``.
        key: as given to :func:`add_noise`; so are ``sharing``, ``base_weight`` and ``sample_offset``.
        prediction: what pred estimates: "epsilon", "v" or "flow" as in :func:`add_noise`, or "x0".
        weight: None or (B, F) float32.
        sharing: see :func:`philox_normal`.
        base_weight: see :func:`philox_normal`.
        sample_offset: see :func:`philox_normal`.

    Returns:
        (B, F) float32 (float64 where pred or x0 is float64). Differentiable in pred, x0, alpha, sigma and weight;
        the gradient is taken of the residual rounded to pred's dtype.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, range or device.
    """
    shared_weight = _check_diffusion(x0, alpha, sigma, key, sharing, base_weight, sample_offset)
    _check.is_tensor("pred", pred)
    _check.has_shape("pred", pred, x0.shape, "(B, F, C, H, W) as x0")
    _check.has_dtype("pred", pred, _check.FLOATS)
    _check.same_device("pred", pred, "x0", x0)
    check_choice("prediction", prediction, PREDICTIONS)
    if weight is not None:
        _check_level("weight", weight, x0)
    mse = _diffusion_mse(pred, x0, alpha, sigma, key, prediction, sharing, shared_weight, sample_offset)[0]
    return mse if weight is None else weight * mse


def hybrid_loss(
    model_out: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    t: Tensor,
    schedule: Any,
    key: Tensor,
    *,
    prediction: str = "epsilon",
    weight: Tensor | None = None,
    sharing: str = "independent",
    base_weight: float | Tensor | None = None,
    sample_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return both losses of each frame of a model that also predicts its variance (Nichol & Dhariwal 2021).

        mse[b, f] = weight[b, f] * mean over (C, H, W) of (pred - target)^2, as in :func:`diffusion_mse`
        vb[b, f] = mean over (C, H, W), in bits, of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
                   in frames at t > 0, and of -log p(x_0 | x_1) in frames at t = 0
        log std^2 of p = (v + 1)/2 * log beta + (1 - v)/2 * log beta~

    DiT, Latte and FVDM train with mse + vb. The noise is drawn again from the key, neither x_t nor the x_0 that pred
    implies is made, and the gradient is prepared in the same pass.

    Args:
        model_out: (B, F, 2C, H, W), pred and then v, any strides; float32, float16, bfloat16 or float64.
        x0: (B, F, C, H, W) what was given to :func:`add_noise`; its dtype may differ from model_out's. The
            likelihood at t = 0 takes it for 8-bit values in [-1, 1].
        alpha: (B, F), as given to :func:`add_noise`.
        sigma: as ``alpha``.
        t: int64 (B, F), any strides, indices into the schedule; one outside of it counts as the nearest inside.
        schedule: anything with ``posterior_mean_coef``, ``posterior_log_variance`` and ``log_beta``, (T,) float32
            (float64 too where x0 is float64), such as a variance-preserving :class:`vidkern.diffusion.Schedule`.
        key: as given to :func:`add_noise`; so are ``sharing``, ``base_weight`` and ``sample_offset``.
        prediction: what pred estimates: "epsilon", "v", "flow" or "x0", see :func:`diffusion_mse`.
        weight: None or (B, F) float32, of the mse.
        sharing: see :func:`philox_normal`.
        base_weight: see :func:`philox_normal`.
        sample_offset: see :func:`philox_normal`.

    Returns:
        (mse, vb), each (B, F) float32 (float64 where model_out or x0 is float64). mse is differentiable in pred and
        weight, vb in v alone: it does not move the mean. The gradients are taken of factors rounded to model_out's
        dtype.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, range or device; x0, alpha or sigma that
            requires a gradient, which this loss does not have.
    """
    shared_weight = _check_diffusion(x0, alpha, sigma, key, sharing, base_weight, sample_offset)
    for name, constant in (("x0", x0), ("alpha", alpha), ("sigma", sigma)):
        if constant.requires_grad:
            raise ValueError(f"{name} must not require a gradient: hybrid_loss is differentiated by model_out alone")
    batch, frames, channels, *size = x0.shape
    _check.is_tensor("model_out", model_out)
    _check.has_shape("model_out", model_out, (batch, frames, 2 * channels, *size), "(B, F, 2C, H, W)")
    _check.has_dtype("model_out", model_out, _check.FLOATS)
    _check.same_device("model_out", model_out, "x0", x0)
    _check.is_tensor("t", t)
    _check.has_shape("t", t, (batch, frames), "(B, F)")
    _check.has_dtype("t", t, (torch.int64,))
    _check.same_device("t", t, "x0", x0)
    tables = _check_tables(schedule, x0)
    check_choice("prediction", prediction, PREDICTIONS)
    if weight is not None:
        _check_level("weight", weight, x0)
    mse, vb, _, _ = _hybrid_loss(
        model_out, x0, alpha, sigma, t, *tables, key, prediction, sharing, shared_weight, sample_offset
    )
    return (mse if weight is None else weight * mse), vb


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product = product * size
    return product


def _same_device(wanted: torch.device, device: torch.device) -> bool:
    return wanted.type == device.type and wanted.index in (None, device.index)


def _check_level(name: str, level: Any, x0: Tensor) -> None:
    _check.is_tensor(name, level)
    _check.has_shape(name, level, x0.shape[:2], "(B, F)")
    _check.has_dtype(name, level, (torch.float32, x0.dtype) if x0.dtype == torch.float64 else (torch.float32,))
    _check.same_device(name, level, "x0", x0)


def _check_diffusion(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    sharing: str,
    base_weight: float | Tensor | None,
    sample_offset: int,
) -> Tensor | None:
    _check.is_tensor("x0", x0)
    _check.has_dims("x0", x0, "(B, F, C, H, W)")
    _check.has_dtype("x0", x0, _check.FLOATS)
    _check_level("alpha", alpha, x0)
    _check_level("sigma", sigma, x0)
    check_key(key)
    _check.same_device("key", key, "x0", x0)
    batch, frames, *rest = x0.shape
    check_counts(batch, frames, _product(rest), sample_offset)
    return weight_per_frame(sharing, base_weight, batch, frames, x0.device)


def _check_tables(schedule: Any, x0: Tensor) -> list[Tensor]:
    """Check and return the schedule's tables of q(x_{t-1} | x_t, x_0) and of beta."""
    tables: list[Tensor] = []
    for name in ("posterior_mean_coef", "posterior_log_variance", "log_beta"):
        table = getattr(schedule, name, None)
        if not isinstance(table, Tensor):
            raise TypeError(f"schedule must have a tensor {name!r}, got {type(schedule).__name__} without")
        name = f"schedule.{name}"
        _check.has_dims(name, table, "(T)")
        _check.has_shape(name, table, tables[0].shape if tables else table.shape, "(T,)")
        _check.has_dtype(name, table, (torch.float32, x0.dtype) if x0.dtype == torch.float64 else (torch.float32,))
        _check.same_device(name, table, "x0", x0)
        tables.append(table)
    if not tables[0].numel():
        raise ValueError("schedule must have a step, got tables of shape (0,)")
    return tables


def _levels_like(x0: Tensor) -> Tensor:
    return x0.new_empty(x0.shape[:2], dtype=reference.wide_dtype(x0))


def _supports(*args: Any) -> str | None:
    """Whether the compiled kernels take a call: the public function has checked everything else."""
    for arg in args:
        if getattr(arg, "dtype", arg) is torch.float64:
            return "float64 is the reference's"
    return None


def _kernels(name: str) -> dict[str, Kernel]:
    """Return the kernels of every backend, each found by the operator's name."""
    return {
        "cpu": compiled("cpu", name, _supports),
        "triton": triton_kernel("vidkern.ops.noise.triton_kernels", name, _supports),
        "cuda": compiled("cuda", name, _supports),
    }


_philox_normal = _library.define(
    "philox_normal(SymInt[] shape, Tensor key, str sharing, Tensor? base_weight, SymInt sample_offset,"
    " ScalarType dtype) -> Tensor",
    kernels=_kernels("philox_normal"),
    reference=reference.philox_normal,
    fake=lambda shape, key, sharing, base_weight, sample_offset, dtype: key.new_empty(shape, dtype=dtype),
)

_add_noise = _library.define(
    "add_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor key, str? target, str sharing, Tensor? base_weight,"
    " SymInt sample_offset) -> (Tensor x_t, Tensor target)",
    kernels=_kernels("add_noise"),
    reference=reference.add_noise,
    fake=lambda x0, alpha, sigma, key, target, *_: (
        x0.new_empty(x0.shape),
        x0.new_empty(0 if target is None else x0.shape),
    ),
)

_add_noise_backward = _library.define(
    "add_noise_backward(Tensor? dx_t, Tensor? dtarget, Tensor x0, Tensor alpha, Tensor sigma, Tensor key,"
    " str? target, str sharing, Tensor? base_weight, SymInt sample_offset)"
    " -> (Tensor dx0, Tensor dalpha, Tensor dsigma)",
    kernels=_kernels("add_noise_backward"),
    reference=reference.add_noise_backward,
    fake=lambda dx_t, dtarget, x0, *_: (x0.new_empty(x0.shape), _levels_like(x0), _levels_like(x0)),
)

_diffusion_mse = _library.define(
    "diffusion_mse(Tensor pred, Tensor x0, Tensor alpha, Tensor sigma, Tensor key, str prediction, str sharing,"
    " Tensor? base_weight, SymInt sample_offset) -> (Tensor mse, Tensor residual)",
    kernels=_kernels("diffusion_mse"),
    reference=reference.diffusion_mse,
    fake=lambda pred, x0, *_: (
        pred.new_empty(pred.shape[:2], dtype=reference.wide_dtype(pred, x0)),
        pred.new_empty(pred.shape),
    ),
)

_diffusion_mse_backward = _library.define(
    "diffusion_mse_backward(Tensor dmse, Tensor residual) -> Tensor",
    kernels=_kernels("diffusion_mse_backward"),
    reference=reference.diffusion_mse_backward,
    fake=lambda dmse, residual: residual.new_empty(residual.shape),
)

_hybrid_loss = _library.define(
    "hybrid_loss(Tensor model_out, Tensor x0, Tensor alpha, Tensor sigma, Tensor t, Tensor posterior_mean_coef,"
    " Tensor posterior_log_variance, Tensor log_beta, Tensor key, str prediction, str sharing, Tensor? base_weight,"
    " SymInt sample_offset) -> (Tensor mse, Tensor vb, Tensor factors, Tensor slope)",
    kernels=_kernels("hybrid_loss"),
    reference=reference.hybrid_loss,
    fake=lambda model_out, x0, *_: (
        *(model_out.new_empty(x0.shape[:2], dtype=reference.wide_dtype(model_out, x0)) for _ in range(2)),
        model_out.new_empty(model_out.shape),
        model_out.new_empty(x0.shape[:2], dtype=reference.wide_dtype(model_out, x0)),
    ),
)

_hybrid_loss_backward = _library.define(
    "hybrid_loss_backward(Tensor dmse, Tensor dvb, Tensor factors, Tensor slope) -> Tensor",
    kernels=_kernels("hybrid_loss_backward"),
    reference=reference.hybrid_loss_backward,
    fake=lambda dmse, dvb, factors, slope: factors.new_empty(factors.shape),
)


def _save_add_noise(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x0, alpha, sigma, key, target, sharing, base_weight, sample_offset = inputs
    ctx.save_for_backward(x0, alpha, sigma, key, base_weight)
    ctx.options = target, sharing, sample_offset


def _backward_add_noise(ctx: Any, dx_t: Tensor | None, dtarget: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_add_noise_grads(dx_t, dtarget, *ctx.saved_tensors, *ctx.options), None, None, None, None, None)


def _add_noise_grads(
    dx_t: Tensor | None,
    dtarget: Tensor | None,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    base_weight: Tensor | None,
    target: str | None,
    sharing: str,
    sample_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dx0, dalpha, dsigma = _add_noise_backward(
        dx_t, dtarget, x0, alpha, sigma, key, target, sharing, base_weight, sample_offset
    )
    return dx0, dalpha.to(alpha.dtype), dsigma.to(sigma.dtype)


def _save_diffusion_mse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, x0, alpha, sigma, key, prediction, sharing, base_weight, sample_offset = inputs
    residual = output[1]
    ctx.mark_non_differentiable(residual)
    if any(level.requires_grad for level in (x0, alpha, sigma)):  # the target's side needs its inputs again
        ctx.save_for_backward(residual, x0, alpha, sigma, key, base_weight)
        ctx.options = prediction, sharing, sample_offset
    else:
        ctx.save_for_backward(residual)


def _backward_diffusion_mse(ctx: Any, dmse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dmse is None:
        return (None,) * 9
    residual, *target_inputs = ctx.saved_tensors
    dpred = _diffusion_mse_backward(dmse, residual)
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if target_inputs:
        grads = _add_noise_grads(None, -dpred, *target_inputs, *ctx.options)
    return (dpred, *grads, None, None, None, None, None)


def _save_hybrid_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, factors, slope = output
    ctx.mark_non_differentiable(factors, slope)
    ctx.save_for_backward(factors, slope)


def _backward_hybrid_loss(ctx: Any, dmse: Tensor | None, dvb: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dmse is None and dvb is None:
        return (None,) * 13
    factors, slope = ctx.saved_tensors
    dmse, dvb = (torch.zeros_like(slope) if grad is None else grad for grad in (dmse, dvb))
    return (_hybrid_loss_backward(dmse, dvb, factors, slope), *(None,) * 12)


_library.differentiate(_add_noise, save=_save_add_noise, backward=_backward_add_noise)
_library.differentiate(_diffusion_mse, save=_save_diffusion_mse, backward=_backward_diffusion_mse)
_library.differentiate(_hybrid_loss, save=_save_hybrid_loss, backward=_backward_hybrid_loss)

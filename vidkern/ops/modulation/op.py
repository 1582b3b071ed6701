"""The modulation operators: norm, per-frame shift, scale and gate, residual, each in one pass over the tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidkern import _library
from vidkern._dispatch import Kernel, compiled, triton_kernel
from vidkern.ops import _check
from vidkern.ops.modulation import reference

#: Channels that every backend takes: a multiple of GRANULE, at most MAX_CHANNELS.
GRANULE = 8
MAX_CHANNELS = 8192

#: What kernels read; the vectors of float32 tokens come in 16 bits under autocast, and the other way round.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TRITON = "vidkern.ops.modulation.triton_kernels"


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise each token over its channels, then scale and shift by its frame's vectors.

        y = LN(x) * (1 + scale) + shift,    LN(x) = (x - mean(x)) / sqrt(var(x) + eps)

    with the biased variance and no affine parameters: DiT's adaLN (Peebles & Xie 2023) with one vector per frame
    (FVDM, Liu et al. 2024, section 2.3). Statistics and the modulation are computed in float32 and rounded once.

    Args:
        x: (B, F, N, D) tokens, unit stride in D, any other strides; D a multiple of 8, at most 8192.
        shift: (B, F, D) with unit stride in D and any other strides, 0 included; float32, float16 or bfloat16, whatever
            x's dtype (float64 beside float64).
        scale: as ``shift``, in the same dtype.
        eps: added to the variance.

    Returns:
        (B, F, N, D), contiguous, in x's dtype (float32, float16, bfloat16, float64). Differentiable in every tensor.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, stride or device.
    """
    _check_tokens("x", x)
    _check_vectors(x, shift=shift, scale=scale)
    _check_eps(eps)
    return _layer_norm_modulate(x, shift, scale, eps)[0]


def rms_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide each token by its root mean square, then scale and shift by its frame's vectors.

        y = x / sqrt(mean(x^2) + eps) * (1 + scale) + shift

    RMSNorm (Zhang & Sennrich 2019) in the place of :func:`layer_norm_modulate`'s norm; arguments, result and errors
    are the same.
    """
    _check_tokens("x", x)
    _check_vectors(x, shift=shift, scale=scale)
    _check_eps(eps)
    return _rms_norm_modulate(x, shift, scale, eps)[0]


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Add a branch to the residual stream through its frame's gate: z = x + gate * y  (adaLN-Zero, DiT 3.2).

    Args:
        x: (B, F, N, D) residual stream, unit stride in D, any other strides; D a multiple of 8, at most 8192.
        y: the branch, of x's shape and dtype, any strides with unit stride in D.
        gate: (B, F, D) with unit stride in D and any other strides, 0 included; float32, float16 or bfloat16, whatever
            x's dtype (float64 beside float64).

    Returns:
        (B, F, N, D), contiguous, in x's dtype. Differentiable in x, y and gate.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, stride or device.
    """
    _check_tokens("x", x)
    _check_branch(x, y)
    _check_vectors(x, gate=gate)
    return _gate_residual(x, y, gate)


def gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """End one branch and begin the next in one pass: the gated residual, then its norm and modulation.

        z = x + gate * y,    h = LN(z) * (1 + scale) + shift

    The norm is taken of z before it is rounded to x's dtype. Equal otherwise to :func:`gate_residual` followed by
    :func:`layer_norm_modulate`, with two passes over the tokens fewer.

    Args:
        x: (B, F, N, D) residual stream, unit stride in D, any other strides; D a multiple of 8, at most 8192.
        y: the branch, of x's shape and dtype, any strides with unit stride in D.
        gate: (B, F, D) with unit stride in D and any other strides, 0 included; float32, float16 or bfloat16, whatever
            x's dtype (float64 beside float64).
        shift: as ``gate``, in the same dtype: of the next branch.
        scale: as ``gate``, in the same dtype: of the next branch.
        eps: added to the variance.

    Returns:
        (z, h), each (B, F, N, D), contiguous, in x's dtype. Differentiable in every tensor.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, stride or device.
    """
    _check_tokens("x", x)
    _check_branch(x, y)
    _check_vectors(x, gate=gate, shift=shift, scale=scale)
    _check_eps(eps)
    return _gate_residual_modulate(x, y, gate, shift, scale, eps)[:2]


def gate_residual_rms_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`gate_residual_modulate` with RMSNorm in the place of LayerNorm.

    z = x + gate * y,    h = z / sqrt(mean(z^2) + eps) * (1 + scale) + shift
    """
    _check_tokens("x", x)
    _check_branch(x, y)
    _check_vectors(x, gate=gate, shift=shift, scale=scale)
    _check_eps(eps)
    return _gate_residual_rms_modulate(x, y, gate, shift, scale, eps)[:2]


def _check_tokens(name: str, x: Tensor) -> None:
    _check.is_tensor(name, x)
    _check.has_dims(name, x, "(B, F, N, D)")
    _check.has_dtype(name, x, _check.FLOATS)
    _check.unit_stride(name, x)
    channels = x.shape[-1]
    if channels % GRANULE or not 0 < channels <= MAX_CHANNELS:
        raise ValueError(
            f"{name} must have D a multiple of {GRANULE} between {GRANULE} and {MAX_CHANNELS}, got D = {channels}"
        )


def _check_branch(x: Tensor, y: Tensor) -> None:
    _check.like("y", y, x.shape, "(B, F, N, D) as x", (x.dtype,), "x", x)


def _check_vectors(x: Tensor, **vectors: Tensor) -> None:
    batch, frames, _, channels = x.shape
    shape = (batch, frames, channels)
    allowed: tuple[torch.dtype, ...] = (x.dtype,) if x.dtype == torch.float64 else KERNEL_DTYPES
    for name, vector in vectors.items():
        _check.like(name, vector, shape, "(B, F, D)", allowed, "x", x)
        allowed = (vector.dtype,)  # the vectors of one call are chunks of one tensor


def _check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")


def _supports(tokens: Tensor, *_: Any) -> str | None:
    """Whether the compiled and Triton kernels take a call: the public function has checked everything else."""
    return "float64 is the reference's" if tokens.dtype == torch.float64 else None


def _kernels(name: str) -> dict[str, Kernel]:
    """Return the kernels of every backend, each found by the operator's name."""
    return {
        "cpu": compiled("cpu", name, _supports),
        "triton": triton_kernel(_TRITON, name, _supports),
        "cuda": compiled("cuda", name, _supports),
    }


def _statistics_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=reference.accumulator(x.dtype))


def _tokens_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _vector_grad_like(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], x.shape[3]), dtype=reference.accumulator(x.dtype))


def _wide_loads(grad: Tensor) -> Tensor:
    """Return a gradient as kernels read it: autograd also sends expanded ones, with stride 0 in D."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _rounded(grad: Tensor, vector: Tensor) -> Tensor:
    """Return a vector's gradient, summed in float32, in the vector's dtype."""
    return grad if grad.dtype == vector.dtype else grad.to(vector.dtype)


def _modulate_grads_like(x: Tensor) -> tuple[Tensor, ...]:
    return _tokens_like(x), _vector_grad_like(x), _vector_grad_like(x)


def _gate_residual_modulate_grads_like(x: Tensor) -> tuple[Tensor, ...]:
    return (_tokens_like(x), _tokens_like(x), *(_vector_grad_like(x) for _ in range(3)))


_layer_norm_modulate = _library.define(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    kernels=_kernels("layer_norm_modulate"),
    reference=reference.layer_norm_modulate,
    fake=lambda x, shift, scale, eps: (_tokens_like(x), _statistics_like(x), _statistics_like(x)),
)

_layer_norm_modulate_backward = _library.define(
    "layer_norm_modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd)"
    " -> (Tensor dx, Tensor dshift, Tensor dscale)",
    kernels=_kernels("layer_norm_modulate_backward"),
    reference=reference.layer_norm_modulate_backward,
    fake=lambda dy, x, scale, mean, rstd: _modulate_grads_like(x),
)

_rms_norm_modulate = _library.define(
    "rms_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor rstd)",
    kernels=_kernels("rms_norm_modulate"),
    reference=reference.rms_norm_modulate,
    fake=lambda x, shift, scale, eps: (_tokens_like(x), _statistics_like(x)),
)

_rms_norm_modulate_backward = _library.define(
    "rms_norm_modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor rstd)"
    " -> (Tensor dx, Tensor dshift, Tensor dscale)",
    kernels=_kernels("rms_norm_modulate_backward"),
    reference=reference.rms_norm_modulate_backward,
    fake=lambda dy, x, scale, rstd: _modulate_grads_like(x),
)

_gate_residual = _library.define(
    "gate_residual(Tensor x, Tensor y, Tensor gate) -> Tensor",
    kernels=_kernels("gate_residual"),
    reference=reference.gate_residual,
    fake=lambda x, y, gate: _tokens_like(x),
)

_gate_residual_backward = _library.define(
    "gate_residual_backward(Tensor dz, Tensor y, Tensor gate) -> (Tensor dy, Tensor dgate)",
    kernels=_kernels("gate_residual_backward"),
    reference=reference.gate_residual_backward,
    fake=lambda dz, y, gate: (_tokens_like(y), _vector_grad_like(y)),
)

_gate_residual_modulate = _library.define(
    "gate_residual_modulate(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps)"
    " -> (Tensor z, Tensor h, Tensor mean, Tensor rstd)",
    kernels=_kernels("gate_residual_modulate"),
    reference=reference.gate_residual_modulate,
    fake=lambda x, y, gate, shift, scale, eps: (
        _tokens_like(x),
        _tokens_like(x),
        _statistics_like(x),
        _statistics_like(x),
    ),
)

_gate_residual_modulate_backward = _library.define(
    "gate_residual_modulate_backward(Tensor dh, Tensor? dz, Tensor x, Tensor y, Tensor gate, Tensor scale,"
    " Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dshift, Tensor dscale)",
    kernels=_kernels("gate_residual_modulate_backward"),
    reference=reference.gate_residual_modulate_backward,
    fake=lambda dh, dz, x, y, gate, scale, mean, rstd: _gate_residual_modulate_grads_like(x),
)

_gate_residual_rms_modulate = _library.define(
    "gate_residual_rms_modulate(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps)"
    " -> (Tensor z, Tensor h, Tensor rstd)",
    kernels=_kernels("gate_residual_rms_modulate"),
    reference=reference.gate_residual_rms_modulate,
    fake=lambda x, y, gate, shift, scale, eps: (_tokens_like(x), _tokens_like(x), _statistics_like(x)),
)

_gate_residual_rms_modulate_backward = _library.define(
    "gate_residual_rms_modulate_backward(Tensor dh, Tensor? dz, Tensor x, Tensor y, Tensor gate, Tensor scale,"
    " Tensor rstd) -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dshift, Tensor dscale)",
    kernels=_kernels("gate_residual_rms_modulate_backward"),
    reference=reference.gate_residual_rms_modulate_backward,
    fake=lambda dh, dz, x, y, gate, scale, rstd: _gate_residual_modulate_grads_like(x),
)


def _save_modulate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, scale, _ = inputs
    _, *statistics = output  # (mean, rstd) of LayerNorm, (rstd,) of RMSNorm
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(x, scale, *statistics)


def _backward_modulate(operator: _library.Operator) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        x, scale, *statistics = ctx.saved_tensors
        dx, dshift, dscale = operator(_wide_loads(dy), x, scale, *statistics)
        return dx, _rounded(dshift, scale), _rounded(dscale, scale), None

    return backward


def _save_gate_residual(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, y, gate = inputs
    ctx.save_for_backward(y, gate)


def _backward_gate_residual(ctx: Any, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gate_residual_grads(dz, *ctx.saved_tensors)


def _gate_residual_grads(dz: Tensor | None, y: Tensor, gate: Tensor) -> tuple[Tensor | None, ...]:
    if dz is None:
        return None, None, None
    dy, dgate = _gate_residual_backward(_wide_loads(dz), y, gate)
    return dz, dy, _rounded(dgate, gate)


def _save_gate_residual_modulate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, y, gate, _, scale, _ = inputs
    _, _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(x, y, gate, scale, *statistics)


def _backward_gate_residual_modulate(
    operator: _library.Operator,
) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, dz: Tensor | None, dh: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, y, gate, scale, *statistics = ctx.saved_tensors
        if dh is None:  # only z reaches the loss
            return (*_gate_residual_grads(dz, y, gate), None, None, None)
        dz = None if dz is None else _wide_loads(dz)
        dx, dy, *vectors = operator(_wide_loads(dh), dz, x, y, gate, scale, *statistics)
        return (dx, dy, *(_rounded(vector, scale) for vector in vectors), None)

    return backward


_library.differentiate(
    _layer_norm_modulate, save=_save_modulate, backward=_backward_modulate(_layer_norm_modulate_backward)
)
_library.differentiate(
    _rms_norm_modulate, save=_save_modulate, backward=_backward_modulate(_rms_norm_modulate_backward)
)
_library.differentiate(_gate_residual, save=_save_gate_residual, backward=_backward_gate_residual)
_library.differentiate(
    _gate_residual_modulate,
    save=_save_gate_residual_modulate,
    backward=_backward_gate_residual_modulate(_gate_residual_modulate_backward),
)
_library.differentiate(
    _gate_residual_rms_modulate,
    save=_save_gate_residual_modulate,
    backward=_backward_gate_residual_modulate(_gate_residual_rms_modulate_backward),
)

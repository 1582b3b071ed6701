"""GELU (tanh form) in one pass, and the MLP around it, whose backward pass computes the activation again."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vidkern import _library
from vidkern._dispatch import Kernel, compiled, triton_kernel
from vidkern.ops import _check
from vidkern.ops.activation import reference

#: Kernels take rows of a multiple of so many channels.
GRANULE = 8

#: What kernels read; the bias of 16-bit tokens may be float32, and the other way round.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TRITON = "vidkern.ops.activation.triton_kernels"


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The Gaussian error linear unit in its tanh form, of x + bias.

        y = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))),    z = x + bias

    (Hendrycks & Gimpel 2016; the MLP of DiT, Latte and FVDM). Computed in float32 and rounded once.

    Args:
        x: (..., D) in any strides, D above 0; read in place where its rows lie at one distance from each other with
            unit stride in D, as every projection writes them, and made contiguous first otherwise.
        bias: (D,), contiguous; float32, float16 or bfloat16, whatever x's dtype (float64 beside float64). None: zero.

    Returns:
        (..., D), contiguous, in x's dtype (float32, float16, bfloat16, float64). Differentiable in x and bias. Kernels
        take D a multiple of 8; the definition serves others.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, stride or device.
    """
    _check.is_tensor("x", x)
    _check.has_dtype("x", x, _check.FLOATS)
    _check_channels(x)
    if bias is not None:
        allowed = (x.dtype,) if x.dtype == torch.float64 else KERNEL_DTYPES
        _check.like("bias", bias, (x.shape[-1],), "(D,)", allowed, "x", x)
    return _gelu_tanh(_rows(x), bias).view(x.shape)


def gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """A transformer's MLP: Linear, GELU (tanh form), Linear.

        y = GELU(x W1^T + b1) W2^T + b2

    The products are PyTorch's. For the backward pass x and GELU's input are kept, and not its output, a tensor of the
    MLP's inner width: the pass that takes the gradient through GELU computes it again, and sums bias1's gradient.
    Under autocast every argument is cast, as ``nn.Linear`` casts them: once a call.

    Args:
        x: (..., D), float32, float16, bfloat16 or float64, any strides.
        weight1: (I, D), as ``nn.Linear`` has it; I is the inner width. Like all that follow, in x's dtype, or under
            autocast in any of the dtypes that it casts.
        bias1: (I,).
        weight2: (O, I).
        bias2: (O,).

    Returns:
        (..., O) in x's dtype, autocast's under autocast. Differentiable once in every argument.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    _check_mlp(x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    tensors = (x, weight1, bias1, weight2, bias2)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return F.linear(gelu_tanh(F.linear(x, weight1, bias1)), weight2, bias2)
    if _autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight1, bias1, weight2, bias2 = (tensor.to(dtype) for tensor in tensors)
    y = _GeluMlp.apply(_rows(x), weight1, bias1, weight2, bias2)
    return y.view(*x.shape[:-1], weight2.shape[0])


def _rows(x: Tensor) -> Tensor:
    """Return (..., D) as (M, D) with unit stride in D: a view, or a copy where there is none."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_channels(x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., D) with D above 0, got {_check.shape_of(x)}")


def _autocast(x: Tensor) -> bool:
    """Whether autocast would cast x; torch refuses to say so of the meta device, which has none."""
    return not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def _check_mlp(x: Tensor, **parameters: Tensor) -> None:
    _check.is_tensor("x", x)
    _check.has_dtype("x", x, _check.FLOATS)
    _check_channels(x)
    for name, parameter in parameters.items():
        _check.is_tensor(name, parameter)
        _check.has_dtype(name, parameter, KERNEL_DTYPES if _autocast(x) else (x.dtype,))
        _check.same_device(name, parameter, "x", x)
    weight1, bias1, weight2, bias2 = parameters.values()
    _check.has_dims("weight1", weight1, "(I, D)")
    _check.has_dims("weight2", weight2, "(O, I)")
    inner, out = weight1.shape[0], weight2.shape[0]
    _check.has_shape("weight1", weight1, (inner, x.shape[-1]), "(I, D)")
    _check.has_shape("bias1", bias1, (inner,), "(I,)")
    _check.has_shape("weight2", weight2, (out, inner), "(O, I)")
    _check.has_shape("bias2", bias2, (out,), "(O,)")


def _supports(*args: Any) -> str | None:
    """Whether the compiled and Triton kernels take a call: the public functions have checked everything else."""
    x = args[0]
    if x.dtype == torch.float64:
        return "float64 is the reference's"
    return None if x.shape[1] % GRANULE == 0 else f"D must be a multiple of {GRANULE}, got {x.shape[1]}"


def _kernels(name: str) -> dict[str, Kernel]:
    """Return the kernels of every backend, each found by the operator's name."""
    return {
        "cpu": compiled("cpu", name, _supports),
        "triton": triton_kernel(_TRITON, name, _supports),
        "cuda": compiled("cuda", name, _supports),
    }


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _sums_like(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape[-1:] if wanted else (0,), dtype=reference.accumulator(x.dtype))


_gelu_tanh = _library.define(
    "gelu_tanh(Tensor x, Tensor? bias) -> Tensor",
    kernels=_kernels("gelu_tanh"),
    reference=reference.gelu_tanh,
    fake=lambda x, bias: _like(x),
)

_gelu_tanh_backward = _library.define(
    "gelu_tanh_backward(Tensor dy, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)",
    kernels=_kernels("gelu_tanh_backward"),
    reference=reference.gelu_tanh_backward,
    fake=lambda dy, x, bias: (_like(x), _sums_like(x, bias is not None)),
)

_gelu_mlp_backward = _library.define(
    "gelu_mlp_backward(Tensor dy, Tensor x) -> (Tensor dx, Tensor y, Tensor dbias)",
    kernels=_kernels("gelu_mlp_backward"),
    reference=reference.gelu_mlp_backward,
    fake=lambda dy, x: (_like(x), _like(x), _sums_like(x)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if dy is None:
        return None, None
    x, bias = ctx.saved_tensors
    dx, dbias = _gelu_tanh_backward(_rows(dy), x, bias)
    return dx, None if bias is None else dbias.to(bias.dtype)


_library.differentiate(_gelu_tanh, save=_save, backward=_backward)


class _GeluMlp(torch.autograd.Function):
    """The MLP on (M, D) rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        h = F.linear(x, weight1, bias1)
        ctx.save_for_backward(x, h, weight1, weight2)
        return F.linear(_gelu_tanh(h, None), weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight1, weight2 = ctx.saved_tensors
        of_x, of_weight1, of_bias1, of_weight2, of_bias2 = ctx.needs_input_grad
        dh, y, dbias1 = _gelu_mlp_backward(dy @ weight2, h)
        return (
            dh @ weight1 if of_x else None,
            dh.t() @ x if of_weight1 else None,
            dbias1.to(h.dtype) if of_bias1 else None,
            dy.t() @ y if of_weight2 else None,
            dy.sum(0) if of_bias2 else None,
        )

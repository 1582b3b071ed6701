"""Causal 3D convolution, whole or in a stream of chunks, and the norm and SiLU that write its padded input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidkern import _library
from vidkern._dispatch import Kernel, tell, triton_kernel
from vidkern.ops import _check
from vidkern.ops.conv3d import assembler, choice, cpu_library, cuda_library, reference

#: (kT, kH, kW) that kernels are written for.
KERNEL_SIZES = ((3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1), (2, 2, 2))
STRIDES = (1, 2)
TIME_PADS = ("zeros", "first_frame")
SPACE_PADS = ("zeros", "replicate", "reflect")
NORMS = ("rms", "group")

_TRITON = "vidkern.ops.conv3d.triton_kernels"


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    time_pad: str = "zeros",
    space_pad: str = "zeros",
    cache: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve a video so that no frame sees a later one (the video VAEs of CogVideoX and Wan; VDM's (2+1)D).

        y[b, o, t, h, w] = bias[o] + residual[b, o, t, h, w]
            + sum over c, i, j, l of weight[o, c, i, j, l] * x'[b, c, sT*t + dT*i, sH*h + dH*j, sW*w + dW*l]

    x' is x with (kT - 1) * dT frames before it and (k - 1) * d positions around it in height and width (half before,
    half after; the odd one of an even kernel after), so y has ceil(F / sT), ceil(H / sH), ceil(W / sW) positions.

    Args:
        x: (B, Cin, F, H, W) in channels_last_3d: unit stride in Cin, any other strides. Another layout is converted
            once (VIDKERN_LOG=dispatch says so).
        weight: (Cout, Cin, kT, kH, kW) with a kernel of 3x3x3, 3x1x1, 1x3x3, 1x1x1 or 2x2x2, in x's dtype.
        bias: (Cout,) in x's dtype.
        stride: 1 or 2, or (time, height, width) of them.
        dilation: a positive number, or (time, height, width) of them.
        time_pad: what comes before the first frame: "zeros" (Wan) or the "first_frame" again (CogVideoX).
        space_pad: "zeros", "replicate" (the edge) or "reflect" (mirrored at the edge; needs a size above the padding).
        cache: (B, Cin, (kT - 1) * dT, H, W), the input frames before x; then nothing is padded in time. With a time
            stride of 2 it may be one frame shorter: see :func:`causal_conv3d_stream`, which makes it.
        residual: of y's shape and dtype, added to y.

    Returns:
        (B, Cout, F', H', W') in channels_last_3d, in x's dtype. Differentiable in every tensor.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device, or a size that is not offered.
    """
    stride, dilation = _check_convolution(x, weight, bias, stride, dilation, time_pad, space_pad)
    _check_cache(cache, x, reference.extent(weight.shape[2], dilation[0]), stride[0])
    if residual is not None:
        wanted = reference.output_shape(x, weight, cache, stride, dilation)
        _check_companion("residual", residual, x, wanted, "(B, Cout, F', H', W')")
        residual = _channels_last("residual", residual)
    x = _channels_last("x", x)
    cache = None if cache is None else _channels_last("cache", cache)
    return _causal_conv3d(x, weight, bias, cache, residual, stride, dilation, time_pad, space_pad)


def causal_conv3d_stream(
    x: Tensor,
    cache: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    time_pad: str = "zeros",
    space_pad: str = "zeros",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve the next frames of a video: :func:`causal_conv3d` in chunks of any length.

        y_1, cache = causal_conv3d_stream(x_1, None, weight)
        y_2, cache = causal_conv3d_stream(x_2, cache, weight)

    The chunks' results, one after another, are those of the whole clip, bit for bit in float32. A chunk gives an
    output frame for each stride that it completes, possibly none.

    Args:
        x: (B, Cin, F, H, W), the next F frames, as :func:`causal_conv3d` takes them; 0 frames give 0 frames.
        cache: what the chunk before returned; None for the first, which is padded in time as ``time_pad`` says.
        weight, bias, stride, dilation, time_pad, space_pad, residual: as :func:`causal_conv3d` takes them.

    Returns:
        (y, cache'): cache' (B, Cin, (kT - 1) * dT, H, W) holds the last frames, which the next output reads too; with a
        time stride of 2 it is one frame shorter when the next chunk's first frame completes no stride.

    Raises:
        TypeError, ValueError: as :func:`causal_conv3d`; also an odd number of frames where kT = 1 and the time stride
            is 2 (an empty cache cannot tell the next chunk where it stands), and an empty first chunk with
            time_pad="first_frame".
    """
    y = causal_conv3d(
        x,
        weight,
        bias,
        stride=stride,
        dilation=dilation,
        time_pad=time_pad,
        space_pad=space_pad,
        cache=cache,
        residual=residual,
    )
    before = reference.extent(weight.shape[2], _triple("dilation", dilation)[0])
    return y, _next_cache(x, cache, y.shape[2] * _triple("stride", stride)[0], before, time_pad)


def norm_silu_pad(
    x: Tensor,
    weight: Tensor,
    cache: Tensor | None = None,
    *,
    norm: str,
    groups: int = 1,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    kernel: int | Sequence[int] = 3,
    dilation: int | Sequence[int] = 1,
    time_pad: str = "zeros",
    space_pad: str = "zeros",
) -> Tensor:
    """Normalise, apply SiLU and pad: the input of a causal convolution in one pass (the road by way of cuDNN).

        padded = pad(silu(norm(x) * weight + bias))
        y = torch.nn.functional.conv3d(padded, conv_weight, conv_bias, stride, 0, dilation)
          = causal_conv3d(silu(norm(x) * weight + bias), conv_weight, conv_bias, ...)

    "rms" divides each position by the root mean square of its channels, sqrt(mean(x^2) + eps): Wan's RMS_norm, which
    is x / |x| * sqrt(C). "group" is GroupNorm: mean and biased variance over (C / groups, F, H, W) of this very x,
    as CogVideoX takes them of each chunk. Computed in float32, rounded once.

    The next chunk's cache is ``padded[:, :, F:, top : top + H, left : left + W]``, where top and left are the padding
    before: the last (kT - 1) * dT activated frames (a view: clone it to let go of padded).

    Args:
        x: (B, C, F, H, W) in channels_last_3d; another layout is converted once (VIDKERN_LOG=dispatch says so).
        weight: (C,), the norm's, in x's dtype or float32.
        cache: (B, C, (kT - 1) * dT, H, W), the activated frames before x, in x's dtype; None pads as ``time_pad`` says.
        norm: "rms" or "group".
        groups: of "group"; divides C. 1 for "rms".
        bias: (C,), the norm's, in weight's dtype.
        eps: added to the mean square or the variance.
        kernel: the following convolution's kernel size: 3 for 3x3x3, or (kT, kH, kW).
        dilation: the following convolution's.
        time_pad: "zeros" or "first_frame", as :func:`causal_conv3d`; of the activated frames.
        space_pad: "zeros", "replicate" or "reflect", as :func:`causal_conv3d`.

    Returns:
        (B, C, F + (kT - 1) * dT, H + (kH - 1) * dH, W + (kW - 1) * dW) in channels_last_3d, in x's dtype.
        Differentiable in x, weight, bias and cache.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device, or a size that is not offered.
    """
    _check_video(x)
    sizes, dilation = _check_kernel(kernel), _check_steps("dilation", dilation)
    _check_pads(x, sizes, dilation, time_pad, space_pad)
    _check_norm(x, weight, bias, norm, groups, eps)
    before = reference.extent(sizes[0], dilation[0])
    _check_cache(cache, x, before, 1)
    if cache is None:
        _check_first_frame(x, before, time_pad)
    x = _channels_last("x", x)
    cache = None if cache is None else _channels_last("cache", cache)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return _norm_silu_pad(x, weight, bias, cache, norm, groups, eps, sizes, dilation, time_pad, space_pad)[0]


def _next_cache(x: Tensor, cache: Tensor | None, used: int, before: int, time_pad: str) -> Tensor:
    """Return the frames from number ``used`` on, of the cache or time padding followed by x."""
    if cache is None:
        _check_first_frame(x, before, time_pad)
        shape = (*x.shape[:2], before, *x.shape[3:])
        cache = x[:, :, :1].expand(shape) if time_pad == "first_frame" and before else x.new_zeros(shape)
    left = cache.shape[2] + x.shape[2] - used
    if left < 0:
        raise ValueError(
            "x must have an even number of frames to stream a kernel of kT = 1 with a time stride of 2,"
            f" got {x.shape[2]}"
        )
    if left <= x.shape[2]:
        return x[:, :, x.shape[2] - left :].clone(memory_format=torch.channels_last_3d)
    return torch.cat((cache[:, :, used:], x), 2).contiguous(memory_format=torch.channels_last_3d)


def _channels_last(name: str, x: Tensor) -> Tensor:
    """Return x with unit stride in its channels, converted if need be."""
    if x.stride(1) == 1 or x.shape[1] <= 1:
        return x
    if not torch.compiler.is_compiling():
        tell(f"conv3d: {name} is not in channels_last_3d and is converted")
    return x.contiguous(memory_format=torch.channels_last_3d)


def _triple(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    if isinstance(value, int):
        return value, value, value
    if not isinstance(value, Sequence) or len(value) != 3 or not all(isinstance(n, int) for n in value):
        raise TypeError(f"{name} must be an int or (time, height, width), got {value!r}")
    time, height, width = value
    return time, height, width


def _check_steps(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    steps = _triple(name, value)
    if min(steps) < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return steps


def _check_kernel(kernel: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = _triple("kernel", kernel)
    if sizes not in KERNEL_SIZES:
        offered = ", ".join("x".join(map(str, size)) for size in KERNEL_SIZES)
        raise ValueError(f"kernel must be one of {offered}, got {'x'.join(map(str, sizes))}")
    return sizes


def _check_video(x: Tensor) -> None:
    _check.is_tensor("x", x)
    _check.has_dims("x", x, "(B, C, F, H, W)")
    _check.has_dtype("x", x, _check.FLOATS)


def _check_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    time_pad: str,
    space_pad: str,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Check the arguments that the whole clip and a stream share, and return (stride, dilation) as triples."""
    _check_video(x)
    _check.is_tensor("weight", weight)
    _check.has_dims("weight", weight, "(Cout, Cin, kT, kH, kW)")
    kernel = _check_kernel(tuple(weight.shape[2:]))
    if weight.shape[1] != x.shape[1] or 0 in weight.shape[:2]:
        raise ValueError(f"weight must be (Cout, Cin = {x.shape[1]}, kT, kH, kW), got {_check.shape_of(weight)}")
    _check.has_dtype("weight", weight, (x.dtype,))
    _check.same_device("weight", weight, "x", x)
    if bias is not None:
        _check_companion("bias", bias, x, (weight.shape[0],), "(Cout,)")
    steps, spread = _check_steps("stride", stride), _check_steps("dilation", dilation)
    if max(steps) > max(STRIDES):
        raise ValueError(f"stride must be 1 or 2 along each axis, got {stride}")
    _check_pads(x, kernel, spread, time_pad, space_pad)
    return steps, spread


def _check_companion(name: str, value: Tensor, x: Tensor, shape: Sequence[int], layout: str) -> None:
    _check.is_tensor(name, value)
    _check.has_shape(name, value, shape, layout)
    _check.has_dtype(name, value, (x.dtype,))
    _check.same_device(name, value, "x", x)


def _check_pads(
    x: Tensor, kernel: tuple[int, int, int], dilation: tuple[int, int, int], time_pad: str, space_pad: str
) -> None:
    for name, value, offered in (("time_pad", time_pad, TIME_PADS), ("space_pad", space_pad, SPACE_PADS)):
        if value not in offered:
            raise ValueError(f"{name} must be one of {', '.join(offered)}, got {value!r}")
    if space_pad == "zeros":
        return
    for axis, size, k, d in zip(("height", "width"), x.shape[3:], kernel[1:], dilation[1:], strict=True):
        _, after = reference.around(k, d)
        least = after + 1 if space_pad == "reflect" else 1
        if after and size < least:
            raise ValueError(
                f"x must have a {axis} of at least {least} to be padded by {space_pad} for a kernel of {k}, got {size}"
            )


def _check_cache(cache: Tensor | None, x: Tensor, before: int, time_stride: int) -> None:
    if cache is None:
        return
    _check.is_tensor("cache", cache)
    _check.has_dims("cache", cache, "(B, C, frames, H, W)")
    shorter = time_stride > 1 and before > 0 and cache.shape[2] == before - 1
    frames = before - 1 if shorter else before
    _check_companion("cache", cache, x, (*x.shape[:2], frames, *x.shape[3:]), "(B, C, (kT - 1) * dT, H, W)")


def _check_first_frame(x: Tensor, before: int, time_pad: str) -> None:
    if time_pad == "first_frame" and before and x.shape[2] == 0:
        raise ValueError("x must have at least one frame for time_pad='first_frame', got 0")


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, groups: int, eps: float) -> None:
    channels = x.shape[1]
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if groups < 1 or channels % groups or channels == 0:
        raise ValueError(f"groups must divide the C = {channels} channels of x, got {groups}")
    if norm == "rms" and groups != 1:
        raise ValueError(f"groups must be 1 for norm='rms', got {groups}")
    if not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    allowed: tuple[torch.dtype, ...] = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    vectors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, value in vectors.items():
        _check.is_tensor(name, value)
        _check.has_shape(name, value, (channels,), "(C,)")
        _check.has_dtype(name, value, allowed)
        _check.same_device(name, value, "x", x)
        allowed = (value.dtype,)


def _video_like(x: Tensor, *sizes: int | torch.SymInt) -> Tensor:
    """Return an uninitialised channels-last video of x's batch and channels, and (F, H, W) where no other is given."""
    shape = (*x.shape[:2], *(sizes or x.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def _cache_grad_like(x: Tensor, cache: Tensor | None) -> Tensor:
    return x.new_empty(0) if cache is None else _video_like(cache)


def _padded_like(x: Tensor, kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    extents = map(reference.extent, kernel, dilation)
    return _video_like(x, *(n + more for n, more in zip(x.shape[2:], extents, strict=True)))


def _convolution_grads_like(
    x: Tensor, weight: Tensor, cache: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    nothing = x.new_empty(0)
    return (
        _video_like(x) if wanted[0] else nothing,
        weight.new_empty(weight.shape) if wanted[1] else nothing.clone(),
        weight.new_empty(weight.shape[0]) if wanted[2] else nothing.clone(),
        _cache_grad_like(x, cache) if wanted[3] else nothing.clone(),
    )


def _statistics_like(x: Tensor, norm: str, groups: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    if norm == "rms":
        return x.new_empty(0, dtype=dtype), x.new_empty((x.shape[0], *x.shape[2:]), dtype=dtype)
    shape = (x.shape[0], groups)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _norm_grads_like(x: Tensor, cache: Tensor | None) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    vectors = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return _video_like(x), *vectors, _cache_grad_like(x, cache)


def _cpu_supports(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _nothing_to_do(x, weight, *args) or cpu_library.supports(x, weight)


def _triton_supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, residual: Tensor | None, *_: Any
) -> str | None:
    if x.dtype == torch.float64:
        return "float64 is the reference's"
    return _unit_stride(x=x, cache=cache, residual=residual)


def _triton_supports_backward(dy: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, *_: Any) -> str | None:
    if x.dtype == torch.float64:
        return "float64 is the reference's"
    return _unit_stride(dy=dy, x=x, cache=cache)


def _unit_stride(**videos: Tensor | None) -> str | None:
    for name, video in videos.items():
        if video is not None and video.stride(1) != 1 and video.shape[1] > 1:
            return f"{name} is not in channels_last_3d"
    return None


def _cuda_supports(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _nothing_to_do(x, weight, *args) or cuda_library.supports(x, weight)


def _nothing_to_do(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    *_: Any,
) -> str | None:
    empty = 0 in reference.output_shape(x, weight, cache, stride, dilation)
    return "an empty result is the reference's" if empty else None


def _cpu_supports_backward(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> str | None:
    if x.dtype == torch.float32:  # oneDNN's sums, in either layout, are up to three times as far off as in the other
        return "float32 gradients are the reference's, which sums them in float64"
    return "an empty gradient is the reference's" if dy.numel() == 0 else cpu_library.supports(x, weight)


def _cuda_supports_backward(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> str | None:
    return "an empty gradient is the reference's" if dy.numel() == 0 else cuda_library.supports(x, weight)


_causal_conv3d = _library.define(
    "causal_conv3d(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, Tensor? residual, int[] stride,"
    " int[] dilation, str time_pad, str space_pad) -> Tensor",
    kernels={
        "cpu": Kernel(cpu_library.causal_conv3d, _cpu_supports),
        "triton": triton_kernel(_TRITON, "causal_conv3d", _triton_supports),
        "cuda": Kernel(cuda_library.causal_conv3d, _cuda_supports, cuda_library.unavailable()),
    },
    prefer=lambda x, weight, *_: choice.road(x, weight),
    reference=reference.causal_conv3d,
    fake=lambda x, weight, bias, cache, residual, stride, dilation, time_pad, space_pad: reference.empty_output(
        x, weight, cache, stride, dilation
    ),
)

_causal_conv3d_backward = _library.define(
    "causal_conv3d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? cache, int[] stride, int[] dilation,"
    " str time_pad, str space_pad, bool[] wanted) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dcache)",
    kernels={
        "cpu": Kernel(cpu_library.causal_conv3d_backward, _cpu_supports_backward),
        "triton": triton_kernel(_TRITON, "causal_conv3d_backward", _triton_supports_backward),
        "cuda": Kernel(cuda_library.causal_conv3d_backward, _cuda_supports_backward, cuda_library.unavailable()),
    },
    prefer=lambda dy, x, weight, *_: choice.road(x, weight),
    reference=reference.causal_conv3d_backward,
    fake=lambda dy, x, weight, cache, stride, dilation, time_pad, space_pad, wanted: _convolution_grads_like(
        x, weight, cache, wanted
    ),
)

_norm_silu_pad = _library.define(
    "norm_silu_pad(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, str norm, int groups, float eps,"
    " int[] kernel, int[] dilation, str time_pad, str space_pad) -> (Tensor padded, Tensor mean, Tensor rstd)",
    kernels=assembler.kernels("norm_silu_pad"),
    reference=reference.norm_silu_pad,
    fake=lambda x, weight, bias, cache, norm, groups, eps, kernel, dilation, time_pad, space_pad: (
        _padded_like(x, kernel, dilation),
        *_statistics_like(x, norm, groups),
    ),
)

_norm_silu_pad_backward = _library.define(
    "norm_silu_pad_backward(Tensor dpadded, Tensor x, Tensor weight, Tensor? bias, Tensor? cache, Tensor mean,"
    " Tensor rstd, str norm, int groups, int[] kernel, int[] dilation, str time_pad, str space_pad)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dcache)",
    kernels=assembler.kernels("norm_silu_pad_backward"),
    reference=reference.norm_silu_pad_backward,
    fake=lambda dpadded, x, weight, bias, cache, *_: _norm_grads_like(x, cache),
)


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, cache, residual, *ctx.options = inputs
    ctx.wanted = [tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, cache)]
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, weight, cache)


def _backward_convolution(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, weight, cache = ctx.saved_tensors
    grads = _causal_conv3d_backward(_channels_last("a gradient", dy), x, weight, cache, *ctx.options, ctx.wanted)
    dx, dweight, dbias, dcache = (grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True))
    return dx, dweight, dbias, dcache, dy if ctx.has_residual else None, None, None, None, None


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, cache, ctx.norm, ctx.groups, _, *ctx.options = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, cache, mean, rstd)


def _backward_norm(ctx: Any, dpadded: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dpadded is None:
        return (None,) * 11
    x, weight, bias, cache, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias, dcache = _norm_silu_pad_backward(
        _channels_last("a gradient", dpadded), x, weight, bias, cache, mean, rstd, ctx.norm, ctx.groups, *ctx.options
    )
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias, None if cache is None else dcache, *(None,) * 7


_library.differentiate(_causal_conv3d, save=_save_convolution, backward=_backward_convolution)
_library.differentiate(_norm_silu_pad, save=_save_norm, backward=_backward_norm)

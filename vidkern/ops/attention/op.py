"""The attention operators: over frames, over the tokens of a frame, over both."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vidkern import _library
from vidkern._dispatch import Kernel, compiled, triton_kernel
from vidkern.ops import _check
from vidkern.ops.attention import cpu_library, cuda_library, reference

#: Frames and head sizes that temporal attention's kernels are written for.
MAX_FRAMES = 256
TEMPORAL_HEAD_SIZES = (32, 64, 72, 80, 96, 128)

#: (B, F, N, 3, H, d) as the projection writes it, or (q, k, v), each (B, F, N, H, d).
QKV: TypeAlias = Tensor | tuple[Tensor, Tensor, Tensor]


def temporal_attention(
    qkv: QKV,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
) -> Tensor:
    """Attend over the frames, at each token position and head (TimeSformer's divided attention; Latte; VDM).

        o[b, :, n, h] = softmax(scale * R(q) R(k)^T + bias[h]) v        with q, k, v = qkv[b, :, n, :, h]: F x d each

    R rotates neighbouring pairs of channels (x[2i], x[2i+1]) by the frame's angles:

        R(x)[2i]     = x[2i]   * cos[f, 2i]   - x[2i+1] * sin[f, 2i]
        R(x)[2i + 1] = x[2i+1] * cos[f, 2i+1] + x[2i]   * sin[f, 2i+1]

    the interleaved pairing of RoFormer (Su et al. 2021), VDM, CogVideoX and Wan; a table with cos = 1 and sin = 0 in
    its last channels rotates a part of the head. Scores, rotation and sums are float32, rounded once. The backward
    pass computes the probabilities again and saves nothing but the inputs.

    Args:
        qkv: (B, F, N, 3, H, d), or (q, k, v), each (B, F, N, H, d); unit stride in d, any other strides. F at most
            256, d one of 32, 64, 72, 80, 96, 128.
        scale: of the scores; 1 / sqrt(d) by default.
        bias: (H, F, F) added to the scores [head, query frame, key frame], in qkv's dtype or float32. -inf masks a
            key; a query whose keys are all masked gives 0 and no gradient.
        rope: (cos, sin), each (F, d), float32 or qkv's dtype; constants, without a gradient.
        causal: a frame attends only to itself and the frames before it.

    Returns:
        (B, F, N, H, d), contiguous, in qkv's dtype. Differentiable in qkv (one packed gradient) and bias.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, stride or device.
    """
    first = check_qkv(qkv)
    frames, (heads, d) = first.shape[1], first.shape[-2:]
    if frames > MAX_FRAMES:
        raise ValueError(f"qkv must have at most {MAX_FRAMES} frames, got F = {frames}")
    if d not in TEMPORAL_HEAD_SIZES:
        raise ValueError(f"qkv must have a head size d of {_listed(TEMPORAL_HEAD_SIZES)}, got d = {d}")
    _check_bias(bias, first, (heads, frames, frames))
    cos, sin = _check_rope(rope, first, (frames, d))
    scale = head_scale(scale, d)
    if isinstance(qkv, Tensor):
        return _temporal_attention_packed(qkv, bias, cos, sin, scale, causal)
    return _temporal_attention(*qkv, bias, cos, sin, scale, causal)


def spatial_attention(qkv: QKV, *, scale: float | None = None) -> Tensor:
    """Attend over the tokens of each frame: o[b, f, :, h] = softmax(scale * q k^T) v at [b, f, :, h].

    Served by the best library present, on views of qkv: nothing is copied. Where batch and frames cannot be merged
    into one stride (some frames of a longer clip), it is called once for each sample.

    Args:
        qkv: (B, F, N, 3, H, d), or (q, k, v), each (B, F, N, H, d); unit stride in d, any other strides.
        scale: of the scores; 1 / sqrt(d) by default.

    Returns:
        (B, F, N, H, d), contiguous, in qkv's dtype. Differentiable in qkv (one packed gradient).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, stride or device.
    """
    first = check_qkv(qkv)
    scale = head_scale(scale, first.shape[-1])
    return each_frame(lambda *parts: attend(*parts, scale=scale), parts_of(qkv))


def joint_attention(qkv: QKV, *, scale: float | None = None) -> Tensor:
    """Attend over all tokens of all frames of a clip: o[b, :, :, h] = softmax(scale * q k^T) v over F * N.

    Served by the best library present, on views of qkv: nothing is copied.

    Args:
        qkv: (B, F, N, 3, H, d), or (q, k, v), each (B, F, N, H, d); unit stride in d, and frames and tokens that
            lie evenly (stride of F = N * stride of N), so that F * N is one dimension.
        scale: of the scores; 1 / sqrt(d) by default.

    Returns:
        (B, F, N, H, d), contiguous, in qkv's dtype. Differentiable in qkv (one packed gradient).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, stride or device.
    """
    first = check_qkv(qkv)
    parts = parts_of(qkv)
    for name, part in zip(_names(qkv), parts, strict=True):
        if not _mergeable(part, 1):
            raise ValueError(
                f"{name} must have frames and tokens in one run (stride of F = N * stride of N),"
                f" got shape {_check.shape_of(part)} with strides {tuple(part.stride())}"
            )
    o = attend(*(part.flatten(1, 2) for part in parts), scale=head_scale(scale, first.shape[-1]))
    return o.unflatten(1, first.shape[1:3])


def _names(qkv: QKV) -> tuple[str, ...]:
    return ("qkv",) if isinstance(qkv, Tensor) else ("q", "k", "v")


def parts_of(qkv: QKV) -> tuple[Tensor, ...]:
    """Return (qkv,) or (q, k, v)."""
    return (qkv,) if isinstance(qkv, Tensor) else tuple(qkv)


def each_frame(function: Callable[..., Tensor], parts: tuple[Tensor, ...]) -> Tensor:
    """Call a function of groups of tokens (G, N, ...) with the frames (B, F, N, ...) as groups, copying nothing.

    Where batch and frames do not merge into one stride, it is called once for each sample.
    """
    if all(_mergeable(part, 0) for part in parts):
        return function(*(part.flatten(0, 1) for part in parts)).unflatten(0, parts[0].shape[:2])
    samples = zip(*(part.unbind(0) for part in parts), strict=True)
    return torch.stack([function(*sample) for sample in samples])


def attend(*parts: Tensor, scale: float) -> Tensor:
    """Attend over L: of one qkv (G, L, 3, H, d), or of q, k, v (G, L, H, d)."""
    operator = _attention_packed if len(parts) == 1 else _attention
    return operator(*parts, scale)[0]


def _mergeable(x: Tensor, dim: int) -> bool:
    """Whether dimensions dim and dim + 1 can be viewed as one."""
    outer, inner = x.shape[dim], x.shape[dim + 1]
    return outer == 1 or inner == 1 or x.numel() == 0 or x.stride(dim) == inner * x.stride(dim + 1)


def head_scale(scale: float | None, d: int) -> float:
    """Return the scale given, or 1 / sqrt(d)."""
    if scale is None:
        return 1 / math.sqrt(d)
    if not abs(scale) < math.inf:
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return scale


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"


def check_qkv(qkv: QKV) -> Tensor:
    """Check the tokens and return qkv, or q where they are given apart."""
    if isinstance(qkv, Tensor):
        _check.has_dims("qkv", qkv, "(B, F, N, 3, H, d)")
        if qkv.shape[3] != 3:
            raise ValueError(f"qkv must be (B, F, N, 3, H, d), got {_check.shape_of(qkv)}")
        _check.has_dtype("qkv", qkv, _check.FLOATS)
        _check.unit_stride("qkv", qkv)
        _check_heads("qkv", qkv)
        return qkv
    if not isinstance(qkv, tuple | list) or len(qkv) != 3:
        raise TypeError(f"qkv must be a torch.Tensor or a tuple (q, k, v), got {type(qkv).__name__}")
    q = qkv[0]
    for name, part in zip(_names(qkv), qkv, strict=True):
        _check.is_tensor(name, part)
        _check.has_dims(name, part, "(B, F, N, H, d)")
        _check.has_shape(name, part, q.shape, "(B, F, N, H, d) as q")
        _check.has_dtype(name, part, _check.FLOATS if part is q else (q.dtype,))
        _check.same_device(name, part, "q", q)
        _check.unit_stride(name, part)
    _check_heads("q", q)
    return q


def _check_heads(name: str, x: Tensor) -> None:
    if 0 in x.shape[-2:]:
        raise ValueError(f"{name} must have at least one head of at least one channel, got {_check.shape_of(x)}")


def _check_bias(bias: Tensor | None, of: Tensor, shape: tuple[int, int, int]) -> None:
    if bias is None:
        return
    _check.is_tensor("bias", bias)
    _check.has_shape("bias", bias, shape, "(H, F, F)")
    _check.has_dtype("bias", bias, _table_dtypes(of))
    _check.same_device("bias", bias, "qkv", of)
    _check.unit_stride("bias", bias)


def _check_rope(
    rope: tuple[Tensor, Tensor] | None, of: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if rope is None:
        return None, None
    if not isinstance(rope, tuple | list) or len(rope) != 2:
        raise TypeError(f"rope must be a tuple (cos, sin), got {type(rope).__name__}")
    cos, sin = rope
    for name, table in (("rope's cos", cos), ("rope's sin", sin)):
        _check.is_tensor(name, table)
        _check.has_shape(name, table, shape, "(F, d)")
        _check.has_dtype(name, table, _table_dtypes(of) if table is cos else (cos.dtype,))
        _check.same_device(name, table, "qkv", of)
        _check.unit_stride(name, table)
        if table.requires_grad:
            raise ValueError(f"{name} must be a constant, got a tensor that requires a gradient")
    return cos, sin


def _table_dtypes(of: Tensor) -> tuple[torch.dtype, ...]:
    return (of.dtype,) if of.dtype == torch.float64 else (of.dtype, torch.float32)


def _float32_up(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _temporal_grads_like(q: Tensor, bias: Tensor | None, bias_grad: bool) -> tuple[Tensor, ...]:
    return *(q.new_empty(q.shape) for _ in range(3)), _bias_grad_like(q, bias, bias_grad)


def _bias_grad_like(x: Tensor, bias: Tensor | None, bias_grad: bool) -> Tensor:
    shape = bias.shape if bias is not None and bias_grad else (0,)
    return x.new_empty(shape, dtype=_float32_up(x.dtype))


def _without_three(qkv: Tensor) -> tuple[int, ...]:
    return (*qkv.shape[:-3], *qkv.shape[-2:])


def _attention_like(shape: tuple[int, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    groups, length, heads, _ = shape
    return x.new_empty(shape), x.new_empty((groups, heads, length), dtype=_float32_up(x.dtype))


def _temporal_supports(first: Tensor, *_: Any) -> str | None:
    """Whether the kernels take a call: the public function has checked everything else."""
    return "float64 is the reference's" if first.dtype == torch.float64 else None


def _temporal_kernels(name: str) -> dict[str, Kernel]:
    """Return the kernels of every backend, each found by the operator's name."""
    return {
        "cpu": compiled("cpu", name, _temporal_supports),
        "triton": triton_kernel("vidkern.ops.attention.triton_kernels", name, _temporal_supports),
        "cuda": compiled("cuda", name, _temporal_supports),
    }


_temporal_attention = _library.define(
    "temporal_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cos, Tensor? sin, float scale,"
    " bool causal) -> Tensor",
    kernels=_temporal_kernels("temporal_attention"),
    reference=reference.temporal_attention,
    fake=lambda q, k, v, bias, cos, sin, scale, causal: q.new_empty(q.shape),
)

_temporal_attention_backward = _library.define(
    "temporal_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cos, Tensor? sin,"
    " float scale, bool causal, bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    kernels=_temporal_kernels("temporal_attention_backward"),
    reference=reference.temporal_attention_backward,
    fake=lambda do, q, k, v, bias, cos, sin, scale, causal, bias_grad: _temporal_grads_like(q, bias, bias_grad),
)

_temporal_attention_packed = _library.define(
    "temporal_attention_packed(Tensor qkv, Tensor? bias, Tensor? cos, Tensor? sin, float scale, bool causal) -> Tensor",
    kernels=_temporal_kernels("temporal_attention_packed"),
    reference=reference.temporal_attention_packed,
    fake=lambda qkv, bias, cos, sin, scale, causal: qkv.new_empty(_without_three(qkv)),
)

_temporal_attention_packed_backward = _library.define(
    "temporal_attention_packed_backward(Tensor do, Tensor qkv, Tensor? bias, Tensor? cos, Tensor? sin, float scale,"
    " bool causal, bool bias_grad) -> (Tensor dqkv, Tensor dbias)",
    kernels=_temporal_kernels("temporal_attention_packed_backward"),
    reference=reference.temporal_attention_packed_backward,
    fake=lambda do, qkv, bias, cos, sin, scale, causal, bias_grad: (
        qkv.new_empty(qkv.shape),
        _bias_grad_like(qkv, bias, bias_grad),
    ),
)

_no_cuda = cuda_library.unavailable()

_attention = _library.define(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor o, Tensor lse)",
    kernels={
        "cpu": Kernel(cpu_library.attention, lambda q, *_: cpu_library.supports(q)),
        "cuda": Kernel(cuda_library.attention, lambda q, k, v, scale: cuda_library.supports(q, k, v), _no_cuda),
    },
    reference=reference.attention,
    fake=lambda q, k, v, scale: _attention_like(q.shape, q),
)

_attention_backward = _library.define(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    kernels={
        "cpu": Kernel(cpu_library.attention_backward, lambda do, *_: cpu_library.supports(do)),
        "cuda": Kernel(
            cuda_library.attention_backward,
            lambda do, q, k, v, o, lse, scale: cuda_library.supports(q, k, v),
            _no_cuda,
        ),
    },
    reference=reference.attention_backward,
    fake=lambda do, q, k, v, o, lse, scale: tuple(q.new_empty(q.shape) for _ in range(3)),
)

_attention_packed = _library.define(
    "attention_packed(Tensor qkv, float scale) -> (Tensor o, Tensor lse)",
    kernels={
        "cpu": Kernel(cpu_library.attention_packed, lambda qkv, scale: cpu_library.supports(qkv)),
        "cuda": Kernel(
            cuda_library.attention_packed,
            lambda qkv, scale: cuda_library.supports(*qkv.unbind(2)),
            _no_cuda,
        ),
    },
    reference=reference.attention_packed,
    fake=lambda qkv, scale: _attention_like(_without_three(qkv), qkv),
)

_attention_packed_backward = _library.define(
    "attention_packed_backward(Tensor do, Tensor qkv, Tensor o, Tensor lse, float scale) -> Tensor",
    kernels={
        "cpu": Kernel(cpu_library.attention_packed_backward, lambda do, *_: cpu_library.supports(do)),
        "cuda": Kernel(
            cuda_library.attention_packed_backward,
            lambda do, qkv, o, lse, scale: cuda_library.supports(*qkv.unbind(2)),
            _no_cuda,
        ),
    },
    reference=reference.attention_packed_backward,
    fake=lambda do, qkv, o, lse, scale: qkv.new_empty(qkv.shape),
)


def _wide_loads(grad: Tensor) -> Tensor:
    """Return a gradient as kernels read it: autograd also sends expanded ones, with stride 0 in d."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _save_temporal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scale, causal = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale, ctx.causal = scale, causal


def _backward_temporal(operator: _library.Operator) -> Any:
    def backward(ctx: Any, do: Tensor | None) -> tuple[Tensor | None, ...]:
        *tokens, bias, cos, sin = ctx.saved_tensors
        if do is None:
            return (None,) * (len(tokens) + 5)
        bias_grad = bias is not None and bias.requires_grad
        *grads, dbias = operator(_wide_loads(do), *tokens, bias, cos, sin, ctx.scale, ctx.causal, bias_grad)
        return (*grads, dbias.to(bias.dtype) if bias_grad else None, None, None, None, None)

    return backward


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale


def _backward_attention(ctx: Any, do: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if do is None:
        return None, None, None, None
    return (*_attention_backward(_wide_loads(do), *ctx.saved_tensors, ctx.scale), None)


def _backward_attention_packed(ctx: Any, do: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if do is None:
        return None, None
    return _attention_packed_backward(_wide_loads(do), *ctx.saved_tensors, ctx.scale), None


_library.differentiate(
    _temporal_attention, save=_save_temporal, backward=_backward_temporal(_temporal_attention_backward)
)
_library.differentiate(
    _temporal_attention_packed,
    save=_save_temporal,
    backward=_backward_temporal(_temporal_attention_packed_backward),
)
_library.differentiate(_attention, save=_save_attention, backward=_backward_attention)
_library.differentiate(_attention_packed, save=_save_attention, backward=_backward_attention_packed)

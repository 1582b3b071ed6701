"""Attention along the axes of a clip and within parts of it, composed of the operators of op.py."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vidkern.ops.attention.op import (
    QKV,
    attend,
    check_qkv,
    each_frame,
    head_scale,
    parts_of,
    spatial_attention,
    temporal_attention,
)


def axial_attention(
    qkv: QKV, size: tuple[int, int], *, heads: tuple[int, int, int] | None = None, scale: float | None = None
) -> Tensor:
    """Attend along one axis of the clip in each head: frames, columns of a frame, or rows of a frame.

    With the tokens as (B, F, height, width), the first ``heads[0]`` heads attend over F, the next ``heads[1]`` over
    height, the last ``heads[2]`` over width; all else is batch. Axial attention (Ho et al. 2019) gives a layer to an
    axis, TimeSformer's "T+W+H" (Bertasius et al. 2021) one after another: ``heads=(H, 0, 0)`` and so on are these
    layers. A mixture of heads is all three axes in one pass, without another projection.

    Args:
        qkv: (B, F, N, 3, H, d), or (q, k, v), each (B, F, N, H, d); unit stride in d, any other strides.
        size: (height, width) of a frame in tokens, N = height * width, row by row.
        heads: how many heads attend over frames, height and width; by default a third each, the rest over frames.
        scale: of the scores; 1 / sqrt(d) by default.

    Returns:
        (B, F, N, H, d), contiguous, in qkv's dtype. Differentiable in qkv.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, stride or device; F or height beyond what
            :func:`temporal_attention` takes, which serves them.
    """
    first = check_qkv(qkv)
    _check_size(size, first)
    total = first.shape[-2]
    if heads is None:
        heads = (total - 2 * (total // 3), total // 3, total // 3)
    _check_heads(heads, total, "(frames, height, width)")
    scale = head_scale(scale, first.shape[-1])

    def over_height(*parts: Tensor) -> Tensor:  # a column's tokens take the place of the frames
        rows = tuple(part.unflatten(1, size) for part in parts)
        return temporal_attention(_qkv(rows), scale=scale).flatten(1, 2)

    def over_width(*parts: Tensor) -> Tensor:
        rows = tuple(part.unflatten(1, size) for part in parts)
        return spatial_attention(_qkv(rows), scale=scale).flatten(1, 2)

    def over_frames(*parts: Tensor) -> Tensor:
        return temporal_attention(_qkv(parts), scale=scale)

    return _by_heads(
        parts_of(qkv),
        heads,
        (
            over_frames,
            lambda *parts: each_frame(over_height, parts),
            lambda *parts: each_frame(over_width, parts),
        ),
    )


def local_global_attention(
    qkv: QKV,
    size: tuple[int, int],
    *,
    window: tuple[int, int, int],
    stride: tuple[int, int, int],
    local_heads: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend to the neighbours in some heads, and to a sparse grid over the whole clip in the others.

    With the tokens as (F, height, width), a local head attends within blocks of ``window`` tokens that tile the clip;
    a global head attends to every token whose position differs by a multiple of ``stride`` in each axis. Together
    they approximate joint attention: TimeSformer's "L+G" (Bertasius et al. 2021), with the tiling and the grid
    defined as MaxViT's block and grid attention (Tu et al. 2022). ``local_heads=H`` or ``0`` is one of the two alone.
    Each group of tokens is gathered first and its result put back: one copy of qkv and one of o.

    Args:
        qkv: (B, F, N, 3, H, d), or (q, k, v), each (B, F, N, H, d); unit stride in d, any other strides.
        size: (height, width) of a frame in tokens, N = height * width, row by row.
        window: (frames, height, width) of a block; each divides the clip's.
        stride: (frames, height, width) between the tokens of a grid; each divides the clip's.
        local_heads: how many heads, the first ones, are local; half of them by default.
        scale: of the scores; 1 / sqrt(d) by default.

    Returns:
        (B, F, N, H, d), contiguous, in qkv's dtype. Differentiable in qkv.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, stride or device.
    """
    first = check_qkv(qkv)
    _check_size(size, first)
    clip = (first.shape[1], *size)
    _check_divides("window", window, clip)
    _check_divides("stride", stride, clip)
    total = first.shape[-2]
    if local_heads is None:
        local_heads = total - total // 2
    _check_heads((local_heads, total - local_heads), total, "(local_heads, H - local_heads)")
    scale = head_scale(scale, first.shape[-1])

    def local(*parts: Tensor) -> Tensor:
        return _within_groups(parts, size, window, strided=False, scale=scale)

    def sparse(*parts: Tensor) -> Tensor:
        return _within_groups(parts, size, stride, strided=True, scale=scale)

    return _by_heads(parts_of(qkv), (local_heads, total - local_heads), (local, sparse))


def _qkv(parts: tuple[Tensor, ...]) -> QKV:
    if len(parts) == 1:
        return parts[0]
    q, k, v = parts
    return q, k, v


def _by_heads(parts: tuple[Tensor, ...], counts: Sequence[int], functions: Sequence[Callable[..., Tensor]]) -> Tensor:
    """Give every function its number of heads and put their results side by side."""
    if max(counts) == sum(counts):
        return functions[counts.index(max(counts))](*parts)
    shares = zip(*(part.split(list(counts), -2) for part in parts), strict=True)
    return torch.cat(
        [function(*share) for function, share, count in zip(functions, shares, counts, strict=True) if count > 0],
        -2,
    )


def _within_groups(
    parts: tuple[Tensor, ...],
    size: tuple[int, int],
    cell: tuple[int, int, int],
    *,
    strided: bool,
    scale: float,
) -> Tensor:
    """Attend within blocks of ``cell`` tokens or, strided, among the tokens that are ``cell`` apart."""
    batch, frames = parts[0].shape[:2]
    counts = [extent // step for extent, step in zip((frames, *size), cell, strict=True)]
    inside, outside = (counts, cell) if strided else (cell, counts)
    groups = (2, 4, 6) if strided else (1, 3, 5)
    members = (1, 3, 5) if strided else (2, 4, 6)
    order = (0, *groups, *members)

    def gather(part: Tensor) -> Tensor:  # (B, F, N, ...) -> (groups, members, ...)
        x = part.unflatten(2, size)
        for axis in range(3):
            x = x.unflatten(1 + 2 * axis, (counts[axis], cell[axis]))
        return x.permute(*order, *range(7, x.dim())).flatten(4, 6).flatten(0, 3)

    o = attend(*map(gather, parts), scale=scale)
    o = o.unflatten(0, (batch, *outside)).unflatten(4, inside)
    back = [order.index(axis) for axis in range(7)]
    return o.permute(*back, 7, 8).reshape(batch, frames, size[0] * size[1], *o.shape[-2:])


def _check_size(size: tuple[int, int], tokens: Tensor) -> None:
    if len(size) != 2 or size[0] * size[1] != tokens.shape[2] or size[0] < 0:
        raise ValueError(f"size must be (height, width) with height * width = N = {tokens.shape[2]}, got {size}")


def _check_divides(name: str, cell: tuple[int, int, int], clip: tuple[int, int, int]) -> None:
    if len(cell) != 3 or min(cell) < 1 or any(extent % step for extent, step in zip(clip, cell, strict=True)):
        raise ValueError(f"{name} must divide the clip's (frames, height, width) = {clip}, got {cell}")


def _check_heads(counts: tuple[int, ...], total: int, wanted: str) -> None:
    if min(counts) < 0 or sum(counts) != total:
        raise ValueError(f"{wanted} must be numbers of heads that add up to H = {total}, got {counts}")

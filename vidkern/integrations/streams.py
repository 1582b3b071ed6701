"""What the patched video VAEs share: convolutions with their caches, and a clip's assembly from chunks and tiles."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkern import ops
from vidkern.integrations import patching
from vidkern.nn.prepared import channels_inside, prepared
from vidkern.ops.conv3d import choice, cuda_library

CHANNELS_LAST = torch.channels_last_3d
#: Decodes or encodes the tile that begins at (top, left): a new tensor (B, C, F, h, w).
Tile = Callable[[int, int], Tensor]


def channels_last(x: Tensor) -> Tensor:
    """Return x (B, C, F, H, W) with its channels innermost."""
    return x.contiguous(memory_format=CHANNELS_LAST)


def frames_of(x: Tensor) -> Tensor:
    """Return (B, C, F, H, W) as images (B * F, C, H, W), a view in channels_last_3d."""
    return x.transpose(1, 2).flatten(0, 1)


def clip_of(images: Tensor, batch: int) -> Tensor:
    """Return images (B * F, C, H, W) as a clip (B, C, F, H, W), a view."""
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast convolves x, or None where it is off."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def parameters(
    x: Tensor, conv: nn.Conv2d | nn.Conv3d, prepare: Callable[[Tensor], Tensor] = channels_inside
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (x, prepared weight, bias) for a convolution, in autocast's dtype where autocast is on."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, prepared(conv, conv.weight.dtype, prepare), conv.bias
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return x.to(dtype), prepared(conv, dtype, prepare), bias


def convolve(
    x: Tensor, conv: nn.Conv3d, cache: Tensor | None, residual: Tensor | None = None, time_pad: str = "zeros"
) -> tuple[Tensor, Tensor]:
    """Convolve the next chunk of a clip with a causal convolution's parameters; return (y, the next cache)."""
    x, weight, bias = parameters(x, conv)
    fused = residual if residual is not None and residual.dtype == x.dtype else None
    y, cache = ops.causal_conv3d_stream(
        x, cache, weight, bias, stride=_triple(conv.stride), time_pad=time_pad, residual=fused
    )
    return (y if residual is None or fused is not None else y + residual), cache


def norm_convolve(
    x: Tensor,
    norm: dict[str, Any],
    conv: nn.Conv3d,
    cache: Tensor | None,
    residual: Tensor | None = None,
    time_pad: str = "zeros",
    dropout: nn.Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm, SiLU and convolve the next chunk; return (y, the next cache).

    The activation is written once: padded for cuDNN, or as it is for a kernel to which padding is an index rule.

    Args:
        x: (B, C, F, H, W).
        norm: what ``ops.norm_silu_pad`` takes to say which norm: weight, bias, norm, groups, eps.
        conv: a convolution without padding of its own.
        cache: the activated frames before x.
        residual: of y's shape, added to it.
        time_pad: what is before the first chunk.
        dropout: between SiLU and the convolution.
    """
    drops = dropout is not None and dropout.training and dropout.p > 0
    if drops or not _by_cudnn(x, conv):
        activated = ops.norm_silu_pad(x, kernel=1, **norm)
        return convolve(activated if dropout is None else dropout(activated), conv, cache, residual, time_pad)
    kernel = _triple(conv.kernel_size)
    padded = ops.norm_silu_pad(x, cache=cache, kernel=kernel, time_pad=time_pad, **norm)
    top, left = (kernel[1] - 1) // 2, (kernel[2] - 1) // 2
    inside = padded[:, :, x.shape[2] :, top : top + x.shape[3], left : left + x.shape[4]]
    y = F.conv3d(*parameters(padded, conv))
    if residual is not None:
        y = y.add_(residual) if residual.dtype == y.dtype else y + residual
    return y, inside.clone(memory_format=CHANNELS_LAST)


def _by_cudnn(x: Tensor, conv: nn.Conv3d) -> bool:
    """Return whether a chunk's convolution is cuDNN's; a compiled graph leaves that to the operator."""
    if torch.compiler.is_compiling() or choice.road(x, conv.weight) != "cuda":
        return False
    return cuda_library.supports(x, conv.weight) is None


def check_upsampling(conv: Any, where: str) -> None:
    """Require a convolution that :func:`upsample_convolve` can stand for.

    Raises:
        ValueError: it is another, or somebody else has changed it.
    """
    patching.check_class(conv, "torch.nn.modules.conv.Conv2d", where)
    patching.check_unhooked(conv, where)
    if (conv.kernel_size, conv.stride, conv.padding) != ((3, 3), (1, 1), (1, 1)):
        raise ValueError(f"{where} must be a 3x3 convolution of stride 1 that pads by 1, got {conv}")


def upsample_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Double x (B, C, F, H, W) in height and width and convolve each frame with a 3x3 convolution's parameters."""
    return ops.upsample_conv(*parameters(x, conv, ops.upsample_phases))


def gather(chunks: Iterable[Tensor], frames: int) -> Tensor:
    """Return chunks of a clip, made one by one, as one clip of so many frames, each written as soon as it is there.

    Gradients take one concatenation of all in its place.
    """
    if torch.is_grad_enabled():
        return torch.cat(list(chunks), 2)
    clip, start = None, 0
    for chunk in chunks:
        if clip is None:
            clip = chunk.new_empty((*chunk.shape[:2], frames, *chunk.shape[3:]))
        clip[:, :, start : start + chunk.shape[2]] = chunk
        start += chunk.shape[2]
    assert clip is not None
    return clip


def blend_tiles(
    tile: Tile, starts: tuple[range, range], blend: tuple[int, int], step: tuple[int, int], out: Tensor
) -> Tensor:
    """Fill ``out`` with overlapping tiles, each faded into the one above and then into the one on its left.

    Of the tiles before, only the edges that others fade into are kept.

    Args:
        tile: makes the tile that begins at (top, left).
        starts: the tiles' tops and lefts, as ``tile`` takes them.
        blend: rows and columns of overlap.
        step: rows and columns of ``out`` that a tile fills.
        out: (B, C, F, H, W), where C may be several dimensions; what would go beyond is dropped.
    """
    above: list[Tensor] = []
    row = 0
    for i, top in enumerate(starts[0]):
        edges: list[Tensor] = []
        left_edge, column = None, 0
        for j, left in enumerate(starts[1]):
            piece = tile(top, left)
            if i > 0:
                _fade(above[j], piece, blend[0], dim=3)
            if left_edge is not None:
                _fade(left_edge, piece, blend[1], dim=4)
            left_edge = _edge(piece, blend[1], dim=4)
            edges.append(_edge(piece, blend[0], dim=3))
            place = out[..., row : row + step[0], column : column + step[1]]
            height, width = (min(sizes) for sizes in zip(place.shape[-2:], piece.shape[-2:], strict=True))
            place[..., :height, :width] = piece[..., :height, :width].unflatten(1, out.shape[1:-3])
            column += width
        above, row = edges, row + height
    return out


def _edge(piece: Tensor, extent: int, dim: int) -> Tensor:
    size = min(extent, piece.shape[dim])
    return piece.narrow(dim, piece.shape[dim] - size, size).clone()


def _fade(before: Tensor, piece: Tensor, extent: int, dim: int) -> None:
    """Fade the last ``extent`` rows (dim 3) or columns (dim 4) of ``before`` into the first of ``piece``, in place."""
    extent = min(before.shape[dim], piece.shape[dim], extent)
    weight = (torch.arange(extent, dtype=torch.float64) / extent).to(before.device, before.dtype)
    weight = weight.view([extent, 1] if dim == 3 else [extent])
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    new = piece.narrow(dim, 0, extent)
    new.copy_(old * (1 - weight) + new * weight)


def _triple(value: Sequence[int]) -> tuple[int, int, int]:
    time, height, width = value
    return time, height, width

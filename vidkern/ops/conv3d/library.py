"""What the roads by way of oneDNN and cuDNN share: the gradients of a convolution of the padded input."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidkern.ops.conv3d import assembler


def convolution_backward(
    backend: str,
    dy: Tensor,
    padded: Tensor,
    weight: Tensor,
    cache: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    pads: tuple[str, str],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias, dcache) by ATen, from the input that was padded for ``kernel``."""
    want_x, want_weight, want_bias, want_cache = wanted
    dpadded, dweight, dbias = torch.ops.aten.convolution_backward(
        dy,
        padded,
        weight,
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0, 0],
        1,
        [want_x or want_cache, want_weight, want_bias],
    )
    nothing = dy.new_empty(0)
    dx, dcache = nothing, nothing
    if dpadded is not None:
        dpadded = dpadded.contiguous(memory_format=torch.channels_last_3d)
        dx, dcache = assembler.pad_backward(backend, dpadded, cache, kernel, dilation, *pads)
    return (
        dx.contiguous(memory_format=torch.channels_last_3d) if want_x else nothing,
        dweight.contiguous() if want_weight else nothing.clone(),
        dbias if want_bias else nothing.clone(),
        dcache.contiguous(memory_format=torch.channels_last_3d) if want_cache else nothing.clone(),
    )

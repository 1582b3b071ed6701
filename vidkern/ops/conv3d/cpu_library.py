"""The causal convolution on the CPU: float32 by our own kernel, 16 bits and their gradients by oneDNN.

oneDNN sums float32 in an order that depends on the shape: the bits of a stream, and the accuracy, would depend on how
many frames come at once. In 16 bits it has instructions that our kernel has not; a frame is one conv2d of its window.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkern._dispatch import compiled
from vidkern.ops.conv3d import assembler, library, reference

_FLOAT32 = compiled("cpu", "causal_conv3d", lambda *_: None)


def supports(x: Tensor, weight: Tensor) -> str | None:
    """Say why this road cannot take x and weight."""
    if x.dtype == torch.float64:
        return "float64 is the reference's"
    return _FLOAT32.unavailable if x.dtype == torch.float32 else None


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> Tensor:
    """Return y (B, Cout, F', H', W'), channels last."""
    if x.dtype == torch.float32:
        bias = None if bias is None else bias.contiguous()
        return _FLOAT32.run(x, weight, bias, cache, residual, stride, dilation, time_pad, space_pad)
    y = reference.empty_output(x, weight, cache, stride, dilation)
    flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    kernel = tuple(weight.shape[2:])
    frames, padding = _frames(x, cache, kernel, dilation, time_pad, space_pad)
    for b in range(y.shape[0]):
        for j in range(y.shape[2]):
            taps = [frames[j * stride[0] + i * dilation[0]][b : b + 1] for i in range(kernel[0])]
            window = torch.cat(taps, 1) if len(taps) > 1 else taps[0]
            y[b, :, j] = F.conv2d(window, flat, bias, stride[1:], padding, dilation[1:])[0]
    return y if residual is None else y.add_(residual)


def _frames(
    x: Tensor,
    cache: Tensor | None,
    kernel: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> tuple[Sequence[Tensor], tuple[int, int]]:
    """Return the frames (B, C, H, W) that windows are made of, as views, and the padding left to oneDNN."""
    pads = [reference.around(k, d) for k, d in zip(kernel[1:], dilation[1:], strict=True)]
    if any(before != after for before, after in pads) or (space_pad != "zeros" and any(before for before, _ in pads)):
        return assembler.pad("cpu", x, cache, kernel, dilation, time_pad, space_pad).unbind(2), (0, 0)
    first = x[:, :, 0] if time_pad == "first_frame" else torch.zeros_like(x[:, :, 0])
    before = [first] * reference.extent(kernel[0], dilation[0]) if cache is None else cache.unbind(2)
    return [*before, *x.unbind(2)], (pads[0][0], pads[1][0])


def causal_conv3d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cache: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias, dcache); ``wanted`` says which of them, and the others are empty."""
    kernel, pads = tuple(weight.shape[2:]), (time_pad, space_pad)
    padded = assembler.pad("cpu", x, cache, kernel, dilation, *pads)
    return library.convolution_backward(
        "cpu", dy, padded, weight, cache, stride, (0, 0, 0), kernel, dilation, pads, wanted
    )

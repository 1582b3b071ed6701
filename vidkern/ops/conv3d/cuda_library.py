"""The causal convolution on CUDA by cuDNN, on an input that the assembler pads in one pass.

Space is left to cuDNN where zeros surround it evenly, so that nothing is copied for kT = 1. TF32 is used where
``torch.backends.cudnn.allow_tf32`` says so.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkern.ops.conv3d import assembler, library, reference

#: cuDNN counts elements in 32 bits.
_MAX_ELEMENTS = 2**31


def unavailable() -> str | None:
    """Say why cuDNN cannot run on this machine."""
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def supports(x: Tensor, weight: Tensor) -> str | None:
    """Say why this road cannot take x and weight."""
    if x.dtype == torch.float64:
        return "float64 is the reference's"
    largest = max(x.shape[1], weight.shape[0]) * x.numel() // x.shape[1]
    return f"cuDNN counts in 32 bits, and there are {largest} elements" if largest >= _MAX_ELEMENTS else None


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
    padded, padding = _assembled(x, weight, cache, dilation, time_pad, space_pad)[:2]
    if x.dtype == torch.float32:
        y = _frame_by_frame(padded, weight, bias, stride, padding, dilation)
    else:
        y = F.conv3d(padded, weight, bias, stride, padding, dilation).contiguous(memory_format=torch.channels_last_3d)
    return y if residual is None else y.add_(residual)


def _frame_by_frame(
    padded: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolve each output frame's window on its own: one shape, so one algorithm and the bits of any other split."""
    length = reference.extent(weight.shape[2], dilation[0]) + 1
    frames = [
        F.conv3d(padded[:, :, first : first + length], weight, bias, stride, padding, dilation)
        for first in range(0, padded.shape[2] - length + 1, stride[0])
    ]
    return torch.cat(frames, 2).contiguous(memory_format=torch.channels_last_3d)


def _assembled(
    x: Tensor, weight: Tensor, cache: Tensor | None, dilation: Sequence[int], time_pad: str, space_pad: str
) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
    """Return the padded input, the padding that is left to cuDNN, and the kernel size that the input is padded for."""
    kernel = weight.shape[2:]
    pads = [reference.around(k, d) for k, d in zip(kernel[1:], dilation[1:], strict=True)]
    even = all(before == after for before, after in pads)
    if even and (space_pad == "zeros" or not any(before for before, _ in pads)):
        padding, assembled = (0, pads[0][0], pads[1][0]), (kernel[0], 1, 1)
    else:
        padding, assembled = (0, 0, 0), (kernel[0], kernel[1], kernel[2])
    if assembled == (1, 1, 1):
        return x, padding, assembled
    return assembler.pad("cuda", x, cache, assembled, dilation, time_pad, space_pad), padding, assembled


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
    padded, padding, kernel = _assembled(x, weight, cache, dilation, time_pad, space_pad)
    pads = (time_pad, space_pad)
    return library.convolution_backward(
        "cuda", dy, padded, weight, cache, stride, padding, kernel, dilation, pads, wanted
    )

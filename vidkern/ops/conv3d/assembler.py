"""The padded input of a convolution, written in one pass over (cache, x) by a compiled library."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidkern._dispatch import Kernel, compiled
from vidkern.ops.conv3d import reference

#: CUDA kernels read eight channels at a time, and a warp holds a position.
CUDA_GRANULE = 8
CUDA_MAX_CHANNELS = 1024
#: A norm over fewer channels would leave the vectors of the CPU empty, and each rounding counts for more.
NORM_CHANNELS = 8


def kernels(name: str) -> dict[str, Kernel]:
    """Return the compiled kernels, by backend, of an operator whose first argument is a video."""
    on_cpu = _cpu_supports_norm if name.startswith("norm") else _cpu_supports
    return {"cpu": compiled("cpu", name, on_cpu), "cuda": compiled("cuda", name, _cuda_supports)}


def _cpu_supports(x: Tensor, *_: Any) -> str | None:
    return "float64 is the reference's" if x.dtype == torch.float64 else None


def _cpu_supports_norm(x: Tensor, *args: Any) -> str | None:
    if x.shape[1] < NORM_CHANNELS:
        return f"a norm over fewer than {NORM_CHANNELS} channels is the reference's"
    return _cpu_supports(x, *args)


def _cuda_supports(x: Tensor, *args: Any) -> str | None:
    if x.shape[1] % CUDA_GRANULE or x.shape[1] > CUDA_MAX_CHANNELS:
        return f"C = {x.shape[1]} is not a multiple of {CUDA_GRANULE} up to {CUDA_MAX_CHANNELS}"
    return _cpu_supports(x, *args)


_PAD, _PAD_BACKWARD = kernels("causal_pad"), kernels("causal_pad_backward")


def _serves(kernel: Kernel, x: Tensor) -> bool:
    return kernel.unavailable is None and kernel.supports(x) is None


def pad(
    backend: str,
    x: Tensor,
    cache: Tensor | None,
    kernel: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> Tensor:
    """Return ``reference.pad(x, cache, ...)``, channels last, by the kernel of "cpu" or "cuda" where it serves."""
    if _serves(_PAD[backend], x):
        return _PAD[backend].run(x, cache, kernel, dilation, time_pad, space_pad)
    padded = reference.pad(x, cache, kernel, dilation, time_pad, space_pad)
    return padded.contiguous(memory_format=torch.channels_last_3d)


def pad_backward(
    backend: str,
    dpadded: Tensor,
    cache: Tensor | None,
    kernel: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> tuple[Tensor, Tensor]:
    """Return (dx, dcache) from the gradient of :func:`pad`: copies are summed in float32; no dcache without a cache."""
    if _serves(_PAD_BACKWARD[backend], dpadded):
        return _PAD_BACKWARD[backend].run(dpadded, cache, kernel, dilation, time_pad, space_pad)
    wide = dpadded.to(torch.promote_types(dpadded.dtype, torch.float32))
    dx, dcache = reference.pad_backward(wide, cache, kernel, dilation, time_pad, space_pad)
    return dx.to(dpadded.dtype), dcache.to(dpadded.dtype)

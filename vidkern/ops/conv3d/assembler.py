"""The padded input of a convolution without padding, written in one pass over (cache, x): an operator of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidkern import _library
from vidkern._dispatch import Kernel, compiled
from vidkern.ops.conv3d import reference

#: CUDA kernels read eight channels at a time, and a warp holds a position.
CUDA_GRANULE = 8
CUDA_MAX_CHANNELS = 2048


def supports(backend: str, x: Tensor) -> str | None:
    """Say why the compiled kernels of "cpu" or "cuda" cannot pad x, with or without a norm before."""
    if x.dtype == torch.float64:
        return "float64 is the reference's"
    if backend == "cuda" and (x.shape[1] % CUDA_GRANULE or x.shape[1] > CUDA_MAX_CHANNELS):
        return f"C = {x.shape[1]} is not a multiple of {CUDA_GRANULE} up to {CUDA_MAX_CHANNELS}"
    return None


def kernels(name: str) -> dict[str, Kernel]:
    """Return the compiled kernels of an operator whose first argument is the video."""
    return {
        backend: compiled(backend, name, lambda x, *_, backend=backend: supports(backend, x))
        for backend in ("cpu", "cuda")
    }


def video_like(x: Tensor, frames: int | torch.SymInt, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
    """Return an uninitialised channels-last video of x's batch and channels."""
    shape = (*x.shape[:2], frames, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def cache_grad_like(x: Tensor, cache: Tensor | None) -> Tensor:
    """Return an uninitialised gradient of the cache: empty without one."""
    return x.new_empty(0) if cache is None else video_like(cache, *cache.shape[2:])


def padded_like(x: Tensor, cache: Tensor | None, kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Return the padded video, uninitialised."""
    before, *around = map(reference.extent, kernel, dilation)
    before = before if cache is None else cache.shape[2]
    sizes = (n + more for n, more in zip(x.shape[2:], (before, *around), strict=True))
    return video_like(x, *sizes)


def _grads_like(dpadded: Tensor, cache: Tensor | None, kernel: Sequence[int], dilation: Sequence[int]) -> Any:
    before, *around = map(reference.extent, kernel, dilation)
    before = before if cache is None else cache.shape[2]
    sizes = (n - more for n, more in zip(dpadded.shape[2:], (before, *around), strict=True))
    return video_like(dpadded, *sizes), cache_grad_like(dpadded, cache)


def _pad(x: Tensor, *args: Any) -> Tensor:
    return reference.pad(x, *args).clone(memory_format=torch.channels_last_3d)


def _pad_backward(dpadded: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wide = dpadded.to(torch.promote_types(dpadded.dtype, torch.float32))
    dx, dcache = reference.pad_backward(wide, *args)
    narrow = dpadded.dtype
    return tuple(
        grad.to(narrow, copy=True, memory_format=torch.channels_last_3d if grad.dim() == 5 else torch.preserve_format)
        for grad in (dx, dcache)
    )


#: (x, cache, kernel, dilation, time_pad, space_pad) -> padded; a cache of any number of frames.
causal_pad = _library.define(
    "causal_pad(Tensor x, Tensor? cache, int[] kernel, int[] dilation, str time_pad, str space_pad) -> Tensor",
    kernels=kernels("causal_pad"),
    reference=_pad,
    fake=lambda x, cache, kernel, dilation, *_: padded_like(x, cache, kernel, dilation),
)

#: Each copy's gradient goes back to where it was copied from, in float32; dcache is empty without a cache.
causal_pad_backward = _library.define(
    "causal_pad_backward(Tensor dpadded, Tensor? cache, int[] kernel, int[] dilation, str time_pad, str space_pad)"
    " -> (Tensor dx, Tensor dcache)",
    kernels=kernels("causal_pad_backward"),
    reference=_pad_backward,
    fake=lambda dpadded, cache, kernel, dilation, *_: _grads_like(dpadded, cache, kernel, dilation),
)

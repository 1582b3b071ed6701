"""A convolution's weight in the form that its kernel reads: made once, and kept until the weight changes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Where a module keeps (what the weight was, its prepared form), outside the state_dict.
SLOT = "_vidkern_prepared"


def prepared(module: nn.Conv2d | nn.Conv3d, dtype: torch.dtype, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``prepare(module.weight.to(dtype))``, kept for the next call where no gradient is recorded.

    Args:
        module: holds the weight; one module is always asked with the same ``prepare``.
        dtype: in which the weight is wanted.
        prepare: a differentiable function of the weight.
    """
    weight = module.weight
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return prepare(weight.to(dtype))
    version = 0 if weight.is_inference() else weight._version
    key = weight.data_ptr(), version, weight.device, dtype
    held: tuple[object, Tensor] | None = module.__dict__.get(SLOT)
    if held is not None and held[0] == key:
        return held[1]
    ready = prepare(weight.to(dtype))
    if ready is not weight:
        module.__dict__[SLOT] = key, ready
    return ready


def channels_inside(weight: Tensor) -> Tensor:
    """Return a 3D convolution's weight as kernels on a GPU read it: unit stride in Cin; the CPU's read any."""
    return weight.contiguous(memory_format=torch.channels_last_3d) if weight.is_cuda else weight

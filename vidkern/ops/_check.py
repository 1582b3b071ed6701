"""Argument checks shared by the operators: each raises one error with the name, what was got, what was wanted."""

from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_tensor(name: str, value: Any) -> None:
    """Require a torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def has_dims(name: str, value: torch.Tensor, layout: str) -> None:
    """Require as many dimensions as the layout names, e.g. "(B, F, N, D)"."""
    wanted = layout.count(",") + 1
    if value.dim() != wanted:
        raise ValueError(f"{name} must be {layout}, got {value.dim()} dimensions: {shape_of(value)}")


def has_shape(name: str, value: torch.Tensor, wanted: Sequence[int | torch.SymInt], layout: str) -> None:
    """Require an exact shape; the layout names its dimensions in the message."""
    if value.shape != tuple(wanted):
        raise ValueError(f"{name} must be {layout} = {tuple(wanted)}, got {shape_of(value)}")


def has_dtype(name: str, value: torch.Tensor, wanted: Sequence[torch.dtype]) -> None:
    """Require one of some dtypes."""
    if value.dtype not in wanted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(wanted))
        raise TypeError(f"{name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")


def same_device(name: str, value: torch.Tensor, of: str, other: torch.Tensor) -> None:
    """Require the device of another argument."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {of} ({other.device}), got {value.device}")


def unit_stride(name: str, value: torch.Tensor) -> None:
    """Require the last dimension to be contiguous, as every kernel reads it in wide loads."""
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tuple(value.stride())}")


def like(
    name: str,
    value: Any,
    shape: Sequence[int | torch.SymInt],
    layout: str,
    dtypes: Sequence[torch.dtype],
    of: str,
    other: torch.Tensor,
) -> None:
    """Require all of the above at once, beside another argument: one test where all is well."""
    if (
        isinstance(value, torch.Tensor)
        and value.shape == shape
        and value.dtype in dtypes
        and value.device == other.device
        and value.stride(-1) == 1
    ):
        return
    is_tensor(name, value)
    has_shape(name, value, shape, layout)
    has_dtype(name, value, dtypes)
    same_device(name, value, of, other)
    unit_stride(name, value)


def shape_of(value: torch.Tensor) -> tuple[int, ...]:
    """Return the shape as a plain tuple, as messages show it."""
    return tuple(value.shape)

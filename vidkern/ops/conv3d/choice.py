"""Which road serves a convolution: the faster one where it was measured on this device, else a rule."""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Measured roads, a table per device, written by benchmarks/conv3d_roads.py.
TABLE = Path(__file__).with_name("roads.json")

#: From so many channels on, in and out, cuDNN is near a GPU's peak.
LIBRARY_CHANNELS = 256


class Layer(NamedTuple):
    """What a road is chosen by."""

    dtype: str
    kernel: tuple[int, ...]
    cin: int
    cout: int


def road(x: Tensor, weight: Tensor) -> str | None:
    """Return the backend to ask first; None on a device that has but one road."""
    if not x.is_cuda:
        return None
    layer = Layer(str(x.dtype).removeprefix("torch."), tuple(weight.shape[2:]), x.shape[1], weight.shape[0])
    return _chosen(_device_name(x.device), layer)


@functools.cache
def _chosen(device: str, layer: Layer) -> str:
    return measured(device).get(layer) or rule(layer)


def rule(layer: Layer) -> str:
    """Return the road on a GPU that nobody measured."""
    return "cuda" if min(layer.cin, layer.cout) >= LIBRARY_CHANNELS else "triton"


def measured(device: str) -> dict[Layer, str]:
    """Return the faster road of each layer that was measured on a device."""
    rows = _table().get(device, [])
    return {Layer(row["dtype"], tuple(row["kernel"]), row["cin"], row["cout"]): row["backend"] for row in rows}


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(TABLE.read_text())
    return found


@functools.cache
def _device_name(device: torch.device) -> str:
    """Return the name that results are filed under, e.g. "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")

"""A family's kernels by backend, without dispatch and autograd: what the kernel tests call."""

import importlib
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.emulator import build
from vidkern import _extension


class Kernels(NamedTuple):
    """One backend's operators by name, and where their tensors must lie."""

    find: Callable[[str], Callable[..., Any]]
    device: str


def kernels_of(family: str, backend: str) -> Kernels:
    """Return a backend's kernels; without a GPU, CUDA runs on the emulator and Triton in its interpreter."""
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    if backend == "triton":
        holder = importlib.import_module(f"vidkern.ops.{family}.triton_kernels")
    elif backend == "cuda" and device == "cpu":
        holder = _emulator(family)
    else:
        assert _extension.missing[backend] is None, _extension.missing[backend]
        holder = getattr(torch.ops, f"vidkern_{backend}")
    return Kernels(lambda name: getattr(holder, name), device)


@cache
def _emulator(family: str) -> Any:
    sources = sorted((build.ROOT / "csrc/cuda").glob(f"{family}*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        build.load(sources, f"vidkern_emulator_{family}", Path(folder))
    return getattr(torch.ops, f"vidkern_emulator_{family}")

"""The MLP and its activation: Linear, GELU (tanh form), Linear at Latte's shapes, and GELU alone at its inner width."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import default_device
from benchmarks.harness import AUTOMATIC, Problem
from benchmarks.sample_clock import sample_clock
from benchmarks.shapes import TINY, Tokens, video_tokens
from vidkern import ops

pytestmark = pytest.mark.benchmark(group="mlp", timer=sample_clock)

RATIO = 4  # the inner width over D
SHAPES = {name: shape for name, shape in video_tokens(default_device()).items() if name.startswith("Latte")}


def plain_gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def plain_gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def gelu_problem(shape: Tokens, dtype: torch.dtype, backward: bool) -> Problem:
    """Return GELU alone of the inner width: read x, write y; read dy and x, write dx."""
    inner = (*shape.shape[:-1], RATIO * shape.channels)
    return Problem(
        family="activation",
        operator="gelu_tanh",
        shape_name=shape.name,
        shape=inner,
        dtype=dtype,
        backward=backward,
        ours=ops.gelu_tanh,
        plain=plain_gelu_tanh,
        make_inputs=lambda device: [torch.randn(inner, device=device).to(dtype)],
        traffic_bytes=(5 if backward else 2) * torch.Size(inner).numel() * dtype.itemsize,
    )


def mlp_problem(shape: Tokens, dtype: torch.dtype, backward: bool, operator: str = "gelu_mlp") -> Problem:
    """Return the MLP, with the gradients of x and of every parameter."""
    d, inner, rows = shape.channels, RATIO * shape.channels, torch.Size(shape.shape[:-1]).numel()

    def make_inputs(device: torch.device) -> list[Tensor]:
        made = [
            torch.randn(shape.shape, device=device),
            torch.randn(inner, d, device=device) / d**0.5,
            torch.randn(inner, device=device),
            torch.randn(d, inner, device=device) / inner**0.5,
            torch.randn(d, device=device),
        ]
        return [tensor.to(dtype) for tensor in made]

    return Problem(
        family="activation",
        operator=operator,
        shape_name=shape.name,
        shape=shape.shape,
        dtype=dtype,
        backward=backward,
        ours=ops.gelu_mlp,
        plain=plain_gelu_mlp,
        make_inputs=make_inputs,
        flops=(3 if backward else 1) * 2 * 2 * rows * d * inner,
        backends=(AUTOMATIC,),
    )


def problems() -> list[Problem]:
    """Return what is timed, the most telling first: a run may be cut short."""
    both = [True, False]
    dtypes = [torch.bfloat16, torch.float32]
    xl, *_, small = SHAPES.values()
    found = [make(shape, dtype, backward) for dtype in dtypes for shape in (xl, small)
             for make in (mlp_problem, gelu_problem) for backward in both]  # fmt: skip
    others = [shape for shape in SHAPES.values() if shape not in (xl, small)]
    return found + [mlp_problem(shape, torch.bfloat16, backward) for shape in others for backward in both]


def small_problems() -> list[Problem]:
    """Return a small, ragged case of every kernel: what compute-sanitizer runs.

    The MLP goes by the name of the operator that it is built on: it is itself no registered operator.
    """
    shapes = [Tokens(f"ragged-{d}", 1, 3, 7, d) for d in (40, 290)]
    dtypes = (torch.float32, torch.bfloat16)
    gelu = [gelu_problem(shape, dtype, True) for shape in shapes for dtype in dtypes]
    return gelu + [mlp_problem(shape, dtype, True, "gelu_tanh") for shape in shapes for dtype in dtypes]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("make", [gelu_problem, mlp_problem], ids=["gelu_tanh", "gelu_mlp"])
def test_call_overhead(make: Any, backward: bool, measured: Any) -> None:
    measured(make(TINY, torch.float32, backward), overhead=True, rounds=100)


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_speed(problem: Problem, measured: Any) -> None:
    measured(problem)

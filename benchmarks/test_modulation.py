"""The modulation family: norm, per-frame modulation, gate and residual, at Latte's and Wan's token shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import default_device
from benchmarks.harness import Problem
from benchmarks.sample_clock import sample_clock
from benchmarks.shapes import TINY, Tokens, video_tokens
from vidkern import ops

pytestmark = pytest.mark.benchmark(group="modulation", timer=sample_clock)

EPS = 1e-6
SHAPES = video_tokens(default_device())


def plain_layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def plain_rms_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def plain_gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(2) * y


def plain_gate_residual_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Any:
    z = plain_gate_residual(x, y, gate)
    return z, plain_layer_norm_modulate(z, shift, scale)


def plain_gate_residual_rms_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Any:
    z = plain_gate_residual(x, y, gate)
    return z, plain_rms_norm_modulate(z, shift, scale)


@dataclass(frozen=True)
class Operator:
    """An operator: its plain writing, its numbers of (B, F, N, D) and (B, F, D) inputs, and its passes over X."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    tokens: int
    vectors: int
    forward_passes: int
    backward_passes: int

    @property
    def name(self) -> str:
        return self.ours.__name__

    def problem(self, shape: Tokens, dtype: torch.dtype, backward: bool) -> Problem:
        def make_inputs(device: torch.device) -> list[Tensor]:
            tokens = [torch.randn(shape.shape, device=device).to(dtype) for _ in range(self.tokens)]
            wide = torch.randn(shape.batch, shape.frames, self.vectors * shape.channels, device=device).to(dtype)
            return [*tokens, *wide.chunk(self.vectors, -1)]

        passes = self.forward_passes + backward * self.backward_passes
        return Problem(
            family="modulation",
            operator=self.name,
            shape_name=shape.name,
            shape=shape.shape,
            dtype=dtype,
            backward=backward,
            ours=self.ours,
            plain=self.plain,
            make_inputs=make_inputs,
            traffic_bytes=passes * torch.Size(shape.shape).numel() * dtype.itemsize,
        )


OPERATORS = [
    Operator(ops.layer_norm_modulate, plain_layer_norm_modulate, 1, 2, 2, 3),
    Operator(ops.gate_residual_modulate, plain_gate_residual_modulate, 2, 3, 4, 6),
    Operator(ops.gate_residual, plain_gate_residual, 2, 1, 3, 3),
    Operator(ops.rms_norm_modulate, plain_rms_norm_modulate, 1, 2, 2, 3),
    Operator(ops.gate_residual_rms_modulate, plain_gate_residual_rms_modulate, 2, 3, 4, 6),
]


def problems() -> list[Problem]:
    """Return what is timed, the most telling first: a run may be cut short.

    Every operator at Latte-XL in both dtypes; the two that fill a block at every other shape too, in bfloat16.
    """
    both = [True, False]
    xl, *others = SHAPES.values()
    found = [op.problem(xl, torch.bfloat16, backward) for op in OPERATORS for backward in both]
    found += [
        op.problem(shape, torch.bfloat16, backward) for shape in others for op in OPERATORS[:2] for backward in both
    ]
    return found + [op.problem(xl, torch.float32, backward) for op in OPERATORS for backward in both]


def small_problems() -> list[Problem]:
    """Return a small, ragged case of every kernel, narrow to wide: what compute-sanitizer runs."""
    shapes = [Tokens(f"ragged-{d}", 2, 3, 7, d) for d in (1160, 4104, 8192)]
    dtypes = (torch.float32, torch.bfloat16)
    return [op.problem(shape, dtype, True) for op in OPERATORS for shape in shapes for dtype in dtypes]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_call_overhead(operator: Operator, backward: bool, measured: Any) -> None:
    measured(operator.problem(TINY, torch.float32, backward), overhead=True, rounds=100)


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_speed(problem: Problem, measured: Any) -> None:
    measured(problem)

"""Every Triton kernel is launched on its tensors' device: Triton itself takes the current one, which may be another."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

import vidkern
from benchmarks.harness import Problem, evaluate, make_set
from benchmarks.sanitize import small_cases
from benchmarks.suites import SUITES
from vidkern import _extension, _library

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def served_by_triton() -> list[Problem]:
    """Return a small problem of each operator that Triton serves."""
    by_operator = {(problem.operator, problem.ours): problem for problem in small_cases(SUITES)}
    return [p for p in by_operator.values() if _library.operators[p.operator].why_not("triton", DEVICE.type) is None]


@pytest.fixture
def launches(monkeypatch) -> list[bool]:
    """Record, in the place of every launch, whether it is within torch.cuda.device_of."""
    guards, found = [], []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        guards.append(tensor.device)
        yield
        guards.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launcher = (GridExecutor, "__call__") if _extension.interpreting() else (JITFunction, "run")
    monkeypatch.setattr(*launcher, lambda *args, **options: found.append(DEVICE.type in [g.type for g in guards]))
    return found


def test_every_operator_of_triton_is_here():
    operators = {problem.operator for problem in served_by_triton()}
    named = {"add_noise", "causal_conv3d", "gate_residual", "gelu_tanh", "temporal_attention_packed", "ddpm_step"}
    assert named <= operators


@pytest.mark.parametrize("problem", served_by_triton(), ids=str)
def test_a_launch_is_on_the_device_of_its_tensors(launches: list[bool], problem: Any):
    buffers = make_set(problem, DEVICE)
    with vidkern.backend("triton"):
        evaluate(problem.ours, buffers)
    assert launches
    assert all(launches)

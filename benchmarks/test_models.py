"""Whole steps of Latte and FVDM: training and DDIM sampling, in plain PyTorch and by the library."""

from typing import Any

import pytest
import torch

from benchmarks.environment import default_device
from benchmarks.harness import Problem
from benchmarks.results import Run
from benchmarks.sample_clock import replay, sample_clock
from benchmarks.steps.measure import measure
from benchmarks.steps.variants import SAMPLING, TRAINING, Setting

pytestmark = pytest.mark.benchmark(group="models", timer=sample_clock)

#: XL's width and heads, in four blocks on 64 tokens a frame.
NARROW = (("depth", 4), ("input_size", 16))
#: Deeper networks are not compiled on a CPU: that takes minutes, and what it gains the shallow one tells.
SHALLOW = 4


def cases() -> list[tuple[Setting, str]]:
    """Return what is measured, the most telling first: XL/2 on a GPU, S/2 and a short XL/2 on a CPU."""
    if default_device().type == "cuda":
        networks = [Setting(name, batch) for batch in (4, 1, 8) for name in ("Latte-XL/2", "FVDM-XL/2")]
        return [(setting, task) for setting in networks for task in (TRAINING, SAMPLING)]
    small = [Setting(name, 1) for name in ("Latte-S/2", "FVDM-S/2")]
    found = [(setting, task) for task in (TRAINING, SAMPLING) for setting in small]
    return [*found, (Setting("Latte-XL/2", 1, NARROW), TRAINING)]


def small_problems() -> list[Problem]:
    """Return none: the operators that the networks call have small cases in suites of their own."""
    return []


@pytest.mark.parametrize(("setting", "task"), cases(), ids=str)
def test_speed(setting: Setting, task: str, run: Run, device: torch.device, benchmark: Any) -> None:
    compiled = device.type == "cuda" or setting.config.depth <= SHALLOW
    result, samples = measure(setting, task, device, compiled)
    run.add(result)
    wrong = {name: v for name, v in result["variants"].items() if v["ours"] and not v["correct"]}
    assert not wrong, f"the library's result is wrong, so its speed is not reported: {wrong}"
    replay(benchmark, samples[result["ours"]])

"""Whole steps of Latte and FVDM: training and DDIM sampling, in plain PyTorch and by the library."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.environment import default_device
from benchmarks.harness import Problem
from benchmarks.results import Run
from benchmarks.sample_clock import replay, sample_clock
from benchmarks.steps.measure import measure
from benchmarks.steps.variants import SAMPLING, TRAINING, Setting

pytestmark = [pytest.mark.benchmark(group="models", timer=sample_clock), pytest.mark.timeout(3600)]

#: XL's width and heads, in four blocks on 64 tokens a frame.
NARROW = (("depth", 4), ("input_size", 16))
#: Batches that are measured where --batch names none, the most telling first.
BATCHES = {"cuda": (4, 1, 8), "cpu": (1,)}


def cases(device: str, batches: Sequence[int]) -> list[tuple[Setting, str]]:
    """Return what is measured, the most telling first: XL/2 on a GPU, S/2 and a short XL/2 on a CPU."""
    if device == "cuda":
        networks = [Setting(name, batch) for batch in batches for name in ("Latte-XL/2", "FVDM-XL/2")]
        return [(setting, task) for setting in networks for task in (TRAINING, SAMPLING)]
    found = []
    for batch in batches:
        small = [Setting(name, batch) for name in ("Latte-S/2", "FVDM-S/2")]
        found += [(setting, task) for task in (TRAINING, SAMPLING) for setting in small]
        found.append((Setting("Latte-XL/2", batch, NARROW), TRAINING))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Measure the batches of --batch."""
    device = default_device().type
    batches = metafunc.config.getoption("--batch") or BATCHES[device]
    metafunc.parametrize(("setting", "task"), cases(device, batches), ids=str)


def small_problems() -> list[Problem]:
    """Return none: the operators that the networks call have small cases in suites of their own."""
    return []


def test_speed(setting: Setting, task: str, run: Run, device: torch.device, benchmark: Any) -> None:
    result, samples = measure(setting, task, device)
    run.add(result)
    wrong = {name: v for name, v in result["variants"].items() if v["ours"] and not v["correct"]}
    assert not wrong, f"the library's result is wrong, so its speed is not reported: {wrong}"
    replay(benchmark, samples[result["ours"]])

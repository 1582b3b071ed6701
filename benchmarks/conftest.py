"""What the suites share: the run's record, the fixture that measures, and the tables after the last test."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ceilings import measure_ceilings
from benchmarks.environment import default_device, environment
from benchmarks.harness import Problem, measure
from benchmarks.report import run_report
from benchmarks.results import JSON_VARIABLE, Run, figures, result_path
from benchmarks.sample_clock import replay
from vidkern._resources import launched

RUN = pytest.StashKey[Run]()

Measure = Callable[..., None]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return default_device()


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Run]:
    described = environment(device)
    path = Path(os.environ.get(JSON_VARIABLE) or result_path(described))
    request.config.stash[RUN] = run = Run(path, described, measure_ceilings(device))
    yield run
    kernels, _ = launched()
    if kernels:
        run.kernels = [dataclasses.asdict(kernel) for kernel in kernels]
        run.write()


@pytest.fixture
def measured(run: Run, device: torch.device, benchmark: Any) -> Measure:
    """A function that measures a problem and records it in the run and in pytest-benchmark's table.

    It fails where our result is wrong.
    """

    def measure_and_record(problem: Problem, **options: Any) -> None:
        result, samples = measure(problem, device, **options)
        run.add(result)
        ours = result["variants"][result["ours"]]
        assert ours["correct"], f"{problem}: {result['ours']} is wrong, so its speed is not reported: {ours}"
        replay(benchmark, samples[result["ours"]])
        benchmark.extra_info.update(figures(result, run.ceilings))

    return measure_and_record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the run's tables and name its file."""
    run = terminalreporter.config.stash.get(RUN, None)
    if run is not None and run.results:
        terminalreporter.write_line("\n" + run_report(run))
        terminalreporter.write_line(f"\nwritten to {run.path}")

"""A suite under `pytest --benchmark`, from the command line to its JSON file and both tables."""

import os
import subprocess
import sys

from benchmarks.environment import ROOT
from benchmarks.results import JSON_VARIABLE, Run, figures


def test_a_suite_leaves_a_record_and_shows_the_harness_samples(tmp_path):
    path = tmp_path / "run.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--benchmark", "-p", "no:cacheprovider", "-k", "overhead and [gate_residual-"],
        cwd=ROOT,
        env={**os.environ, JSON_VARIABLE: str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    run = Run.read(path)
    assert [result["passes"] for result in run.results] == ["forward", "forward+backward"]
    assert {"device", "commit", "date", "torch", "cache_bytes", "threads"} <= run.environment.keys()
    assert run.ceilings["copy_gigabytes_per_second"] > 0.1
    assert run.ceilings["product_teraflops"] > 1e-4
    assert all(figures(result, run.ceilings)["times_eager"] > 0 for result in run.results)
    assert "test_call_overhead[gate_residual-forward]" in done.stdout
    assert f"written to {path}" in done.stdout
    assert "| gate_residual | tiny  | float32 | forward " in done.stdout

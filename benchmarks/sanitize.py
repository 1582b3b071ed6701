"""Runs a small, ragged case of every CUDA kernel, forward and backward: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
"""

import argparse
import importlib
import sys
from collections.abc import Iterable, Sequence

import torch

from benchmarks.harness import Problem, Variant, check, make_set, serving_backends
from benchmarks.suites import SUITES


def run_case(problem: Problem, device: torch.device, backend: str) -> str:
    """Run one case on one backend; return "right", "wrong: ...", or why the backend cannot serve it."""
    if backend not in serving_backends(problem.operator, problem.backward, device):
        return f"not served by {backend}"
    checked = check(problem, {backend: Variant(problem.ours, backend)}, make_set(problem, device))[backend]
    return "right" if checked["correct"] else f"wrong: {checked}"


def small_cases(suites: Iterable[str]) -> list[Problem]:
    """Return the small problems of the suites."""
    return [
        problem for suite in suites for problem in importlib.import_module(f"benchmarks.test_{suite}").small_problems()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 when a result is wrong or no kernel ran, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, action="append")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"compute-sanitizer needs a CUDA GPU, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    outcomes = []
    for problem in small_cases(options.suite or SUITES):
        outcomes.append(run_case(problem, torch.device("cuda"), "cuda"))
        print(f"{problem}: {outcomes[-1]}", flush=True)
    ran_right = "right" in outcomes and not any(outcome.startswith("wrong") for outcome in outcomes)
    return 0 if ran_right else 1


if __name__ == "__main__":
    sys.exit(main())

"""Checks a small, ragged case of every kernel of a backend, forward and backward; compute-sanitizer watches it, too.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
"""

import argparse
import importlib
import sys
from collections.abc import Iterable, Sequence

import torch

from benchmarks.harness import Problem, Variant, check, make_set, serving_backends
from benchmarks.suites import SUITES
from vidkern import _library
from vidkern._dispatch import NOT_WRITTEN


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


def of_backend(problems: Iterable[Problem], backend: str) -> list[Problem]:
    """Return the problems for whose operators a backend has kernels, whether they can run here or not."""
    return [p for p in problems if _library.operators[p.operator].why_not(backend, "cuda") != NOT_WRITTEN]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 when a result is wrong or no kernel ran that there is, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, action="append", help="check this suite alone; may be repeated")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"compute-sanitizer needs a CUDA GPU, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    problems, outcomes = of_backend(small_cases(options.suite or SUITES), options.backend), []
    for problem in problems:
        outcomes.append(run_case(problem, torch.device("cuda"), options.backend))
        print(f"{problem}: {outcomes[-1]}", flush=True)
    ran = not outcomes or "right" in outcomes
    return 0 if ran and not any(outcome.startswith("wrong") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Measures how far every operator's results are from float64, and renders the table of docs/accuracy.md.

python -m benchmarks.accuracy --measure --into docs/accuracy.md
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import default_device, environment
from benchmarks.report import markdown, put_into
from tests.ops.backends import kernels_of

FOLDER = Path(__file__).resolve().parent / "accuracy"


def measure() -> dict[str, Any]:
    """Return how far every operator on every backend is from float64, in the cases that the tests hold it to."""
    if not torch.cuda.is_available():
        importlib.import_module("tests.triton_interpreter").enable()
    cases = importlib.import_module("tests.ops.modulation_cases")
    torch.set_num_threads(1)  # libraries sum in another order on another number of threads
    results = [
        {
            "operator": name,
            "backend": backend,
            "kind": case.kind,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "deviations": {
                key: {whose: float(f"{distance:.3g}") for whose, distance in deviation._asdict().items()}
                for key, deviation in cases.deviations(kernels_of("modulation", backend), name, case).items()
            },
        }
        for backend in cases.BACKENDS
        for name in cases.OPERATORS
        for case in cases.CASES
    ]
    return {"environment": environment(default_device()), "results": results}


def table(record: dict[str, Any]) -> str:
    """Return one device's table: the worst result of every kind of input, in units of what the contract allows."""
    results = record["results"]
    backends = list(dict.fromkeys(result["backend"] for result in results))
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["operator"], result["kind"], result["dtype"]), []).append(result)
    rows = [
        [*key, _worst(group, "plain"), *(_worst([r for r in group if r["backend"] == b], "ours") for b in backends)]
        for key, group in groups.items()
    ]
    env = record["environment"]
    title = f"**{env['device']}**, commit {env['commit']}, {env['date'][:10]}:"
    versions = f"torch {env['torch']}, triton {env['triton']}."
    return "\n".join(
        [f"{title} {versions}", "", *markdown(["operator", "input", "dtype", "plain PyTorch", *backends], rows)]
    )


def _worst(group: Sequence[dict[str, Any]], whose: str) -> str:
    found = [
        (deviation[whose] / deviation["bound"], key)
        for result in group
        for key, deviation in result["deviations"].items()
        if deviation["bound"] > 0
    ]
    units, key = max(found)
    return f"{units:.2f} {key}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure on this machine first")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the folder that holds <device>.json")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write between the markers of this page")
    options = parser.parse_args(arguments)
    if options.measure:
        record = measure()
        path = options.folder / f"{record['environment']['device']}.json"
        path.write_text(json.dumps(record) + "\n")
    report = "\n\n".join(table(json.loads(path.read_text())) for path in sorted(options.folder.glob("*.json")))
    if options.into is None:
        print(report)
    else:
        put_into(options.into, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The accuracy table: the worst result of each kind of input, in units of the bound, between a page's markers."""

import json

import torch

from benchmarks import accuracy
from benchmarks.report import BEGIN, END
from tests.ops import modulation_cases as cases
from tests.ops.backends import kernels_of

RECORD = {
    "environment": {
        "device": "cpu-x",
        "commit": "abc",
        "date": "2026-11-21T00:00:00",
        "torch": "2.13",
        "triton": "3.7",
    },
    "results": [
        {
            "operator": "gate_residual",
            "backend": backend,
            "kind": "random",
            "shape": [1, 1, 1, 8],
            "dtype": "float32",
            "deviations": {
                "z": {"ours": ours, "plain": 1e-6, "bound": 4e-6},
                "dgate": {"ours": 1e-6, "plain": 2e-6, "bound": 4e-6},
                "dy": {"ours": 0.0, "plain": 0.0, "bound": 0.0},
            },
        }
        for backend, ours in (("cpu", 3e-6), ("cuda", 0.0))
    ],
}


def test_the_table_shows_the_worst_result_of_every_backend(tmp_path):
    (tmp_path / "cpu-x.json").write_text(json.dumps(RECORD))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert accuracy.main(["--folder", str(tmp_path), "--into", str(page)]) == 0
    row = page.read_text().splitlines()[-3]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("gate_residual", "random", "float32"),
        *("0.50 dgate", "0.75 z", "0.25 dgate"),
    ]
    assert page.read_text().startswith(f"before\n{BEGIN}\n**cpu-x**, commit abc, 2026-11-21: torch 2.13")


def test_the_measured_cases_are_the_tests_own():
    case = next(case for case in cases.CASES if case.dtype == torch.bfloat16)
    found = cases.deviations(kernels_of("modulation", "cpu"), "gate_residual_modulate", case)
    assert list(found) == ["z", "h", "dx", "dy", "dgate", "dshift", "dscale"]
    assert all(0 <= deviation.ours <= deviation.bound for deviation in found.values())
    assert all(deviation.plain > 0 for deviation in found.values())

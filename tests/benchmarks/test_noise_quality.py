"""The page on noise: random cases are the same on every device, wrong bits are seen, and the tables hold the record."""

import json

import pytest
import torch

from benchmarks import noise_quality
from benchmarks.noise_quality import OPERATORS, Random
from benchmarks.report import BEGIN, END
from tests.ops.backends import Kernels, kernels_of

DTYPE = torch.float32


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Return the page of a quick run, and its record."""
    folder = tmp_path_factory.mktemp("noise")
    path = folder / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--measure", "--quick", "--folder", str(folder / "records"), "--into", str(path)]
    assert noise_quality.main(arguments) == 0
    (record,) = (folder / "records").iterdir()
    return path.read_text(), json.loads(record.read_text())


def test_the_page_has_every_table(page):
    text, record = page
    assert text.startswith(f"before\n{BEGIN}\n### {record['environment']['device']}, commit ")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text.splitlines()
    for operator in OPERATORS:
        assert f"| {operator} " in text
    for title in ("statistic ", "quantity ", "launches "):
        assert f"| {title}" in text
    assert "correlation: frames one apart" in text
    assert "normals, tail: radius 4 and more" in text
    assert "| noise and loss " in text


def test_launches_are_counted_anew_without_the_rest(page, tmp_path):
    stale = page[1] | {"launches": {"commit": "old", "network": "", "counted_by": "", "steps": []}}
    path = tmp_path / f"{stale['environment']['device']}.json"
    path.write_text(json.dumps(stale))
    assert noise_quality.main(["--launches", "--quick", "--folder", str(tmp_path)]) == 0
    found = json.loads(path.read_text())
    assert found["launches"]["steps"] == page[1]["launches"]["steps"]
    assert found | {"launches": None} == page[1] | {"launches": None}


def test_every_backend_has_the_definitions_bits(page):
    rows = page[1]["equality"]
    assert {row["backend"] for row in rows} == {"cpu", "triton", "cuda"}
    assert all(row["equal"] == row["cases"] > 0 for row in rows)
    assert all(row["numbers"] > 0 for row in rows)


def test_the_polynomials_are_as_near_as_the_readme_says(page):
    errors = {row["quantity"].split(":")[0]: row["error"] for row in page[1]["polynomials"]}
    assert 0 < errors["radius"] < 5.8e-7
    assert 0 < errors["cosine and sine"] < 2e-7
    assert 0 < errors["normals, body"] < 1.1e-6
    assert 0 < errors["normals, tail"] < 2e-6


@pytest.mark.parametrize("name", OPERATORS)
def test_one_wrong_bit_is_seen(name):
    cpu = kernels_of(OPERATORS[name].family, "cpu")

    def spoilt(operator):
        def run(*args):
            results = cpu.find(operator)(*args)
            first = OPERATORS[name].exact(noise_quality._listed(results))[0]
            first[(0,) * first.dim()].view(torch.int32).bitwise_xor_(1)
            return results

        return run

    sharing = OPERATORS[name].sharing[0]
    assert noise_quality._same_bits(cpu, name, sharing, DTYPE, 3)[0]
    assert not noise_quality._same_bits(Kernels(spoilt, "cpu"), name, sharing, DTYPE, 3)[0]


@pytest.mark.parametrize("name", OPERATORS)
def test_cases_are_random_and_repeatable(name):
    def tensors(seed: int) -> list[torch.Tensor]:
        made = OPERATORS[name].arguments(Random(seed, "cpu"), OPERATORS[name].sharing[-1], DTYPE)
        return [argument for argument in made if isinstance(argument, torch.Tensor)]

    assert all(map(torch.equal, tensors(5), tensors(5)))
    shapes = {tuple(tensors(seed)[0].shape) for seed in range(8)} | {str(tensors(seed)[0]) for seed in range(8)}
    assert len(shapes) > 8

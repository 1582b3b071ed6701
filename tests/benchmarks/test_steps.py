"""Whole steps: every way computes the same, parts and predictions are those of the work, tables tell what was found."""

import dataclasses
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import roofline
from benchmarks.report import run_report, summary
from benchmarks.results import Run
from benchmarks.steps import measure as measuring
from benchmarks.steps.flops import flops_of
from benchmarks.steps.measure import measure
from benchmarks.steps.parts import ATTENTION, COPIES, DIFFUSION, EMA, MLP, MODULATION, OPTIMISER, PARTS, parts_of
from benchmarks.steps.prediction import Machine, Recorded, Work, counted, memory_share, predict, works_of
from benchmarks.steps.variants import DDIM_STEPS, SAMPLING, TRAINING, Setting, Variants, Way, ways
from benchmarks.test_models import BATCHES, cases
from tests.benchmarks.problems import CEILINGS, CPU, environment_of

SMALL = (("input_size", 8), ("hidden_size", 64), ("num_heads", 2), ("num_frames", 4), ("depth", 2))
MACHINE = Machine("some", 1e9, 4e9, 2e9, 1e-3)


@pytest.fixture(params=["Latte-S/2", "FVDM-S/2"])
def setting(request):
    return Setting(request.param, 1, SMALL)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(measuring, "ROUNDS", {"cpu": {TRAINING: 2, SAMPLING: 2}})
    monkeypatch.setattr(measuring, "_products", lambda _: {"float32": 0.1, "bfloat16": 0.2})
    monkeypatch.setattr(measuring, "_compiled", lambda *_: None)


@pytest.mark.parametrize("task", [TRAINING, SAMPLING])
def test_every_way_is_right_and_timed(setting, task):
    result, samples = measure(setting, task, CPU)
    assert all(variant["correct"] for variant in result["variants"].values()), result["variants"]
    errors = {name: variant["error"] for name, variant in result["variants"].items()}
    assert all(0 < error < 1e-4 for name, error in errors.items() if "float32" in name), errors
    assert all(error > 1e-4 for name, error in errors.items() if "bfloat16" in name), errors
    assert samples.keys() == result["variants"].keys() == {way.name for way in ways(CPU, task == TRAINING)}
    for variant in result["variants"].values():
        assert variant["peak_bytes"] > 0 < variant["launches"]
        assert variant["parts"][ATTENTION] > 0 < variant["parts"][MLP]
        assert (variant["parts"][OPTIMISER] > 0) == (task == TRAINING)
        assert sum(variant["parts"].values()) == pytest.approx(variant["watched_seconds"])
    assert result["variants"]["ours bfloat16"]["launches"] < result["variants"]["SDPA bfloat16"]["launches"]
    told = run_report(Run(None, environment_of(), CEILINGS, [result]))
    assert f"**{setting.name}**, {task}" in told
    assert "| ms of a profiled step" in told
    assert f"| {setting.name}, batch 1" in summary([Run(None, environment_of(), CEILINGS, [result])])


def test_the_cases_are_of_the_batches_asked_for():
    assert {setting.batch for setting, _ in cases("cpu", BATCHES["cpu"])} == {1}
    asked = cases("cpu", [4, 8])
    assert [setting.batch for setting, _ in asked] == [4] * 5 + [8] * 5
    assert len(set(asked)) == len(asked)
    assert str(cases("cuda", BATCHES["cuda"])[0][0]) == "Latte-XL/2 batch 4"


def test_a_wrong_variant_is_not_timed(monkeypatch):
    made = Variants.make

    def spoilt(self, way):
        variant = made(self, way)
        if not way.ours:
            return variant
        return dataclasses.replace(variant, loss=lambda *args: 1.01 * variant.loss(*args))

    monkeypatch.setattr(Variants, "make", spoilt)
    result, samples = measure(Setting("Latte-S/2", 1, SMALL), TRAINING, CPU)
    assert not result["variants"]["ours float32"]["correct"]
    assert result["variants"]["ours float32"]["error"] == pytest.approx(0.01, rel=0.01)
    assert "ours float32" not in samples
    assert "SDPA float32" in samples


def test_no_step_changes_the_weights(setting):
    made = Variants(setting, CPU)
    before = {name: p.detach().clone() for name, p in made.run.model.named_parameters()}
    for way in ways(CPU):
        made.make(way).train(*setting.clips())
    assert all(torch.equal(before[name], p) for name, p in made.run.model.named_parameters())


def test_saved_bytes_count_activations_and_not_weights():
    setting = Setting("Latte-S/2", 1, SMALL)
    made = Variants(setting, CPU)
    plain, ours = (
        measuring.saved_bytes(made.make(way), setting, CPU)
        for way in (Way(False, torch.float32), Way(True, torch.float32))
    )
    activation = math.prod((4, 16, 64)) * 4
    assert 10 * activation < ours < plain < 60 * activation


def test_saved_bytes_keep_no_activation():
    setting = Setting("Latte-S/2", 1, SMALL)
    variant = Variants(setting, CPU).make(Way(False, torch.float32, "softmax"))
    outputs = []
    for block in variant.network.get_submodule("blocks").children():
        block.register_forward_hook(lambda _, __, output: outputs.append(weakref.ref(output)))
    measuring.saved_bytes(variant, setting, CPU)
    gc.collect()
    assert len(outputs) == 2
    assert not any(output() is not None for output in outputs)


def test_the_work_of_a_product_belongs_to_its_part_forward_and_backward():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.Linear(8, 16), "mlp": nn.Linear(16, 4)})])

        def forward(self, x):
            block = self.blocks[0]
            return block["mlp"](block["attn"](x))

    network = Blocks()
    with Recorded() as recorded, parts_of(network):
        network(torch.randn(32, 8)).sum().backward()
    flops = {part: sum(w.flops for w in recorded.works if w.part == part) for part in PARTS}
    assert flops[ATTENTION] == 2 * 2 * 32 * 8 * 16  # x needs no gradient
    assert flops[MLP] == 3 * 2 * 32 * 16 * 4
    linear = next(w for w in recorded.works if w.part == ATTENTION and w.flops)
    assert linear == Work(ATTENTION, 4 * (32 * 8 + 8 * 16 + 16 + 32 * 16), 2 * 32 * 8 * 16, False)


def test_a_works_seconds_by_hand():
    assert Work(MLP, 3_000_000, 4_000_000, True).seconds(MACHINE) == pytest.approx(3e-3 + 1e-3)
    assert Work(MLP, 1_000_000, 4_000_000, False).seconds(MACHINE) == pytest.approx(2e-3 + 1e-3)
    assert Work(MLP, 3_000_000, 4_000_000, True).memory_bound(MACHINE)
    assert not Work(MLP, 1_000_000, 4_000_000, False).memory_bound(MACHINE)


def test_two_shallow_networks_tell_of_a_deep_one():
    deep = Setting("Latte-S/2", 1, (*SMALL[:-1], ("depth", 6)))
    way = Way(True, torch.bfloat16)
    exact, told = works_of(deep, way, TRAINING), counted(deep, way, TRAINING)
    assert sum(w.flops for w in exact) == pytest.approx(sum(n * w.flops for w, n in told))
    assert sum(w.bytes for w in exact) == pytest.approx(sum(n * w.bytes for w, n in told), rel=1e-3)


@pytest.mark.parametrize("task", [TRAINING, SAMPLING])
def test_the_prediction_knows_the_work(setting, task):
    ours, plain = Way(True, torch.float32), Way(False, torch.float32, "softmax")
    flops = sum(n * w.flops for w, n in counted(setting, ours, task))
    steps = 1 if task == TRAINING else DDIM_STEPS
    assert flops * steps == pytest.approx(flops_of(setting, task), rel=0.02)
    mine, theirs = (predict(setting, way, task, MACHINE) for way in (ours, plain))
    assert sum(mine.values()) < sum(theirs.values())
    assert mine[MODULATION] < theirs[MODULATION]
    assert mine.get(COPIES, 0) < theirs[COPIES]
    assert 0 < memory_share(setting, ours, task, MACHINE) < 1
    if task == TRAINING:
        assert theirs[EMA] > 0 < theirs[DIFFUSION]


def test_the_page_of_predictions_says_that_nothing_is_measured(monkeypatch, tmp_path):
    forecast = roofline.forecast
    monkeypatch.setattr(forecast, "curves", lambda: {"batch": [("1", Setting("Latte-S/2", 1, SMALL))]})
    setting = Setting("Latte-S/2", 1, SMALL)
    monkeypatch.setattr(forecast, "NETWORKS", ("Latte-S/2",))
    result, _ = measure(setting, TRAINING, CPU)
    on_cpu = Run(None, {**environment_of("cpu")}, CEILINGS, [result])
    del on_cpu.environment["capability"]
    told = roofline.step_report([on_cpu])
    assert told.startswith("Predicted, not measured: ")
    assert "| A100, predicted ms" in told
    assert "measured over predicted" in told
    roofline.draw_steps(tmp_path, [on_cpu])
    sizes = [path.stat().st_size for path in tmp_path.glob("*.png")]
    assert len(sizes) == 4
    assert max(sizes) < 200_000


def step_result() -> dict[str, Any]:
    """A training step of two clips: ours in 1 s, the public code in 3 s, SDPA in 2 s and in bfloat16 in 1.5 s."""

    def variant(letter: str, dtype: str, seconds: float, peak: int) -> dict[str, Any]:
        return {
            "letter": letter,
            "ours": letter in "de",
            "dtype": dtype,
            "correct": True,
            "error": 1e-3,
            "seconds": seconds,
            "peak_bytes": peak * 2**20,
        }

    return {
        "family": "models",
        "operator": "Latte-XL/2",
        "shape_name": "batch 2",
        "shape": [2, 16, 4, 32, 32],
        "passes": TRAINING,
        "traffic_bytes": 0,
        "flops": 8 * 10**11,
        "samples": 5,
        "steps_taken": 1,
        "product_teraflops": {"float32": 1.0, "bfloat16": 2.0},
        "ours": "ours bfloat16",
        "variants": {
            "public float32": variant("a", "float32", 3.0, 90) | {"parts": dict.fromkeys(PARTS, 0.3)},
            "SDPA float32": variant("b", "float32", 2.0, 80),
            "SDPA bfloat16": variant("b", "bfloat16", 1.5, 50),
            "SDPA bfloat16 compiled": {**variant("c", "bfloat16", 0, 0), "correct": False},
            "ours bfloat16": variant("d", "bfloat16", 1.0, 25),
        },
    }


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_tell_the_faster_precision_and_what_no_gpu_has_run():
    failed = step_result()
    del failed["variants"]["SDPA bfloat16 compiled"]["seconds"]
    on_gpu = Run(None, environment_of(), CEILINGS, [failed])
    on_cpu = Run(None, environment_of("cpu"), CEILINGS, [failed])
    del on_cpu.environment["capability"]
    row = cells(summary([on_gpu]).splitlines()[-1])
    assert row[1:] == ["Latte-XL/2, batch 2", TRAINING, "2, bfloat16", "3.00x", "1.50x", "", "2.00x"]
    assert "not yet been run on a GPU" not in summary([on_gpu])
    assert summary([on_cpu]).endswith("`make gpu SUITE=models` does that.")
    lines = run_report(on_gpu).splitlines()
    rows = {cells(line)[1]: cells(line) for line in lines if line.startswith("| ") and len(cells(line)) > 2}
    assert rows["ours bfloat16"][2:6] == ["1", "2", "40%", "1.00x"]
    assert rows["public float32"][2:6] == ["3", "0.667", "27%", "3.00x"]
    assert rows["SDPA bfloat16 compiled"][2] == "wrong result"
    assert cells(lines[-1])[:2] == ["public float32", "300.0"]

"""Two processes train as one does with the same batch: the same losses and gradient norms, to float32 rounding."""

from pathlib import Path
from typing import Any

import pytest

from tests.models.runs import Child, options, read_metrics, run_world

STEPS = 8
ROUNDING = 2e-6  # relative; both quantities were within 6e-7 for every network, and 3e-7 for these

# parts of unequal size and clipping; every kind of draw that a step makes for the whole batch
COMMON = {"steps": STEPS, "batch_size": 8, "optim__max_grad_norm": 0.1}
LATTE = {
    "model__num_classes": 10,
    "model__class_dropout": 0.4,
    "diffusion__timesteps": "ptss",
    "diffusion__ptss_probability": 0.5,
}
GIVEN = {"model__image_condition": "concat"}
S2DM = {
    "network": "s2dm",
    "s2dm__input_size": 16,
    "s2dm__in_channels": 1,
    "s2dm__num_frames": 2,
    "s2dm__block_out_channels": (8, 16),
    "s2dm__layers_per_block": 1,
    "s2dm__num_heads": 2,
    "s2dm__cross_attention_dim": 16,
    "s2dm__norm_groups": 4,
    "s2dm__text_width": None,
    "s2dm__reference": True,
    "s2dm__reference_dropout": 0.0,
    "s2dm__motion_dropout": 0.4,
    "s2dm__token_grid": 2,
    "s2dm__encoder_channels": 8,
    "diffusion__noise": "shared",
}


def in_one_process(run_dir: Path, overrides: dict[str, Any]) -> None:
    child = Child(options(run_dir, **overrides), run_dir.with_suffix(".log"))
    assert child.wait() == 0, child.log.read_text()


def in_two_processes(run_dir: Path, overrides: dict[str, Any], **faults: Any) -> None:
    both = run_world(2, options(run_dir, micro_batch_size=3, **overrides), run_dir.with_suffix(".log"), **faults)
    assert [child.wait() for child in both] == [0, 0], both[0].log.read_text()


def largest_difference(a: Path, b: Path) -> float:
    """Of the losses and of the gradient norms of two runs, relative."""
    one, two = read_metrics(a), read_metrics(b)
    assert len(one) == len(two) >= STEPS
    return max(abs(x[name] / y[name] - 1) for x, y in zip(one, two, strict=True) for name in ("loss", "grad_norm"))


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("latte") / "one"
    in_one_process(run_dir, {**COMMON, **LATTE})
    return run_dir


def test_replicas_of_latte_and_a_checkpoint_of_theirs(latte: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    in_two_processes(two, {**COMMON, **LATTE})
    assert largest_difference(latte, two) < ROUNDING

    # what two processes saved is one process's to go on from
    further = {**COMMON, **LATTE, "steps": STEPS + 2}
    in_one_process(two, further)
    in_one_process(tmp_path / "one", further)
    assert largest_difference(tmp_path / "one", two) < ROUNDING


def test_shards_of_latte(latte: Path, tmp_path: Path) -> None:
    in_two_processes(tmp_path / "two", {**COMMON, **LATTE, "strategy": "fsdp"})
    assert largest_difference(latte, tmp_path / "two") < ROUNDING


def test_draws_of_each_process_s_own_would_show(latte: Path, tmp_path: Path) -> None:
    in_two_processes(tmp_path / "two", {**COMMON, **LATTE}, own_draws=True)
    assert largest_difference(latte, tmp_path / "two") > 1000 * ROUNDING


@pytest.mark.parametrize("network", [GIVEN, S2DM], ids=["image-to-video", "s2dm"])
def test_replicas_of_other_networks(network: dict[str, Any], tmp_path: Path) -> None:
    """Given frames, of which the parts of a batch have different numbers, count nowhere; S2DM's frames share noise."""
    in_one_process(tmp_path / "one", {**COMMON, **network})
    in_two_processes(tmp_path / "two", {**COMMON, **network})
    assert largest_difference(tmp_path / "one", tmp_path / "two") < ROUNDING

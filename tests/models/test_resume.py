"""A run that is killed at any moment, or whose disk is full, goes on as if nothing had happened."""

import random
from pathlib import Path

import pytest
import torch

from models.training import checkpointing
from tests.models.runs import EVERYTHING, FILE_LIMIT, Child, assert_same_state, newest, options, read_metrics

STEPS = 12
WHOLE = {"steps": STEPS, **EVERYTHING, "log__keep": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    child = Child(options(run_dir, **WHOLE), run_dir / "log")
    assert child.wait() == 0, child.log.read_text()
    return run_dir


def assert_as_uninterrupted(run_dir: Path, uninterrupted: Path) -> None:
    assert (run_dir / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    assert_same_state(newest(run_dir), newest(uninterrupted))
    names = [path.name for path in sorted((run_dir / "checkpoints").iterdir())]
    assert [name for name in names if not name.endswith(".damaged")] == ["step_00000009.pt", "step_00000012.pt"]


def test_the_uninterrupted_run_trains(uninterrupted: Path) -> None:
    rows = read_metrics(uninterrupted)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert len({row["loss"] for row in rows}) == STEPS
    state = newest(uninterrupted)
    moved = [name for name in state["model"] if not torch.equal(state["model"][name], state["ema"][name])]
    assert len(moved) > 20


def test_killed_at_chosen_moments(uninterrupted: Path, tmp_path: Path) -> None:
    moments = [
        ("in a step", 2),
        ("while a checkpoint is written", 1),
        ("before a checkpoint is renamed", 2),  # the first is that of config.yaml
        ("after a checkpoint is renamed", 2),
        ("in a step", 2),
        ("while metrics are written", 1),
        ("while metrics are written", 3),
        ("while a checkpoint is written", 1),
        ("while old checkpoints are deleted", 1),
    ]
    argv = options(tmp_path, **WHOLE)
    for moment in moments:
        assert Child(argv, tmp_path / "log", kill=moment).wait() == -9, moment
    last = Child(argv, tmp_path / "log")
    assert last.wait() == 0, last.log.read_text()
    assert "going on after step" in last.lines[0]
    assert_as_uninterrupted(tmp_path, uninterrupted)


def test_killed_at_random_moments_with_a_loading_worker(uninterrupted: Path, tmp_path: Path) -> None:
    argv = options(tmp_path, **WHOLE, data__workers=1)
    delays = random.Random(5)
    for _ in range(4):
        Child(argv, tmp_path / "log").kill_after(delays.uniform(0.1, 2))
    last = Child(argv, tmp_path / "log")
    assert last.wait() == 0, last.log.read_text()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()


def test_a_full_disk_costs_a_line_and_nothing_else(uninterrupted: Path, tmp_path: Path) -> None:
    first = Child([*options(tmp_path, **WHOLE), "--steps", "6"], tmp_path / "log")
    assert first.wait() == 0
    before = checkpointing.paths(tmp_path / "checkpoints")
    contents = [path.read_bytes() for path in before]

    full = Child(options(tmp_path, **WHOLE), tmp_path / "log", file_limit=FILE_LIMIT)
    assert full.wait() == 1
    warnings = [line for line in full.lines if "step_00000009.pt" in line or "step_00000012.pt" in line]
    assert len(warnings) == 2
    assert all("File too large; the older checkpoints stay" in line for line in warnings)
    assert "Traceback" not in full.log.read_text()
    assert sorted((tmp_path / "checkpoints").iterdir()) == before
    assert [path.read_bytes() for path in before] == contents

    again = Child(options(tmp_path, **WHOLE), tmp_path / "log")
    assert again.wait() == 0, again.log.read_text()
    assert_as_uninterrupted(tmp_path, uninterrupted)


def test_a_damaged_newest_checkpoint_is_passed_over(uninterrupted: Path, tmp_path: Path) -> None:
    assert Child([*options(tmp_path, **WHOLE), "--steps", "6"], tmp_path / "log").wait() == 0
    damaged = tmp_path / "checkpoints" / "step_00000006.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    again = Child(options(tmp_path, **WHOLE), tmp_path / "log")
    assert again.wait() == 0, again.log.read_text()
    assert "cannot read the checkpoint" in again.lines[0]
    assert "after step 3" in again.lines[1]
    assert_as_uninterrupted(tmp_path, uninterrupted)


def test_one_line_when_a_checkpoint_is_of_another_network(tmp_path: Path) -> None:
    assert Child(options(tmp_path, steps=3), tmp_path / "log").wait() == 0
    other = Child(options(tmp_path, steps=6, model__hidden_size=128), tmp_path / "log")
    assert other.wait() == 2
    assert other.lines == ["models.train: error: the checkpoint is of another network: model.hidden_size: 64 -> 128"]

"""Runs studies cell by cell. What is done is kept, so that a killed run goes on where it stopped."""

import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.ablations.arms import Cell, measure_cell, train_network
from models.ablations.digit_network import digit_network
from models.ablations.material import Material
from models.ablations.measures import DigitJudge, Judge, VideoJudge
from models.ablations.studies import Scale, Study
from models.command_line import read_yaml
from models.config import TrainConfig
from models.data.frames import to_float, to_uint8
from models.training.checkpointing import atomic_file

PROG = "models.ablations"
CELLS = "cells"  # folder of the records


@dataclasses.dataclass(frozen=True)
class Workplace:
    """Where and at which size studies are run."""

    out: Path
    scale: Scale
    videos: str | None
    """Videos to learn; None: three real clips."""

    def material(self, data: str, network: str) -> Material:
        """The data of a kind of training."""
        config = self.scale.config(data, network)
        return Material(config, self.out / data, videos=self.videos, vae=self.scale.vae)

    def judge(self, data: str, network: str) -> Judge:
        """What measures clips of these data."""
        if data == "digits":
            frames = read_yaml(TrainConfig, self.scale.config(data, network)).network_config.num_frames
            return DigitJudge(digit_network(frames, self.out / data))
        return VideoJudge(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def run(place: Workplace, studies: Sequence[Study], data: Sequence[str], minutes: float | None) -> bool:
    """Run what is not done yet, every arm with a seed before the next seed; nothing begins after `minutes`.

    Returns whether all is done.
    """
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    judge = functools.cache(place.judge)
    for cell in cells(place, studies, data):
        if _is_done(place, cell):
            continue
        for work in (train_network, lambda cell: _measure(place, cell, judge(cell.data, cell.training.network))):
            if time.monotonic() > end:
                print(f"{PROG}: the {minutes:g} minutes are over before {cell.name}", file=sys.stderr)
                return False
            work(cell)
    return True


def cells(place: Workplace, studies: Sequence[Study], data: Sequence[str]) -> Iterator[Cell]:
    """The cells of some studies in the order in which they are run."""
    trainings, material = place.scale.trainings(), functools.cache(place.material)
    for seed in range(max(place.scale.seeds.values())):
        for kind, study in itertools.product(data, studies):
            for arm, task in itertools.product(study.arms, study.tasks):
                if seed >= place.scale.seeds[kind]:
                    continue
                training = trainings[arm.training]
                run = place.out / kind / "runs" / f"{training.name}_seed{seed}"
                yield Cell(study.name, kind, arm, task, seed, training, material(kind, training.network), run)


def records(out: Path) -> list[dict[str, Any]]:
    """The records of the cells that are done, with their files' names as "name"."""
    return [json.loads(path.read_text()) | {"name": path.stem} for path in sorted((out / CELLS).glob("*.json"))]


def pictured(out: Path, name: str) -> Tensor:
    """The kept clips of a cell, float32 (n, F, C, H, W) in [-1, 1]."""
    return to_float(torch.load(out / CELLS / f"{name}.pt", weights_only=True))


def _is_done(place: Workplace, cell: Cell) -> bool:
    path = place.out / CELLS / f"{cell.name}.json"
    return path.exists() and json.loads(path.read_text())["settings"] == cell.settings(place.scale)


def _measure(place: Workplace, cell: Cell, judge: Judge) -> None:
    record, clips = measure_cell(cell, place.scale, judge)
    path = place.out / CELLS / f"{cell.name}.json"
    with atomic_file(path.with_suffix(".pt")) as temporary:
        torch.save(to_uint8(clips), temporary)
    with atomic_file(path) as temporary:  # last: it says that the cell is done
        temporary.write_text(json.dumps(record, indent=1) + "\n")

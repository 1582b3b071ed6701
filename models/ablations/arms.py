"""A cell of a study: one arm trained with one seed, its clips for one task, and what they measure."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from models import train
from models.ablations.material import Material
from models.ablations.measures import Drawn, Judge, measure, measure_real
from models.ablations.studies import Arm, Scale, Training
from models.command_line import to_dict
from models.config import TrainConfig, parse_train_config
from models.networks import Network
from models.sampling.codec import Codec, make_codec
from models.sampling.draw import draw_clips, sampler_of
from models.sampling.network import load_network
from vidkern.diffusion import TASKS, make_schedule

PICTURED = 2  # clips of a cell that are kept to be looked at


class TrainingFailed(RuntimeError):
    """A training did not come to its end. What it printed says why; the same command goes on with it."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm of a study for one set of data, task and seed; `run` is the folder of its training."""

    study: str
    data: str
    arm: Arm
    task: str
    seed: int
    training: Training
    material: Material
    run: Path

    @property
    def name(self) -> str:
        """A name for files."""
        arm = "".join(c if c.isalnum() or c == "." else "_" for c in self.arm.name)
        return f"{self.study}-{self.data}-{arm}-{self.task}-{self.seed}"

    @property
    def options(self) -> list[str]:
        """Options of models.train for the cell's training."""
        return [*self.material.options(), *self.training.options, f"--run_dir={self.run}", f"--seed={self.seed}"]

    def settings(self, scale: Scale) -> dict[str, Any]:
        """All that the cell's numbers follow from, as plain values."""
        training = to_dict(parse_train_config(self.options))
        del training["run_dir"]
        return json.loads(json.dumps({"training": training, "arm": to_dict(self.arm), "scale": to_dict(scale)}))


def train_network(cell: Cell) -> None:
    """Train by models.train's own command: a training that was stopped goes on, one that is done stays as it is."""
    if train.main(cell.options):
        raise TrainingFailed(f"the training in {cell.run} failed")


def measure_cell(cell: Cell, scale: Scale, judge: Judge) -> tuple[dict[str, Any], Tensor]:
    """Draw the cell's clips and measure them: its record, and the first few clips, pixels (n, F, C, H, W)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, config = load_network(cell.run)
    codec = make_codec(config, scale.vae, device)
    begin = time.perf_counter()
    drawn = draw(cell, scale, network.to(device), config, codec, device)
    seconds = time.perf_counter() - begin
    record = {
        "study": cell.study,
        "data": cell.data,
        "arm": cell.arm.name,
        "task": cell.task,
        "seed": cell.seed,
        "clips": len(drawn.clips),
        "frames": drawn.clips.shape[1],
        "parameters": sum(p.numel() for p in network.parameters()),
        "drawing_seconds": seconds,
        "measures": {name: dataclasses.asdict(found) for name, found in measure(drawn, judge).items()},
        "real": {name: dataclasses.asdict(found) for name, found in measure_real(drawn, judge).items()},
        "training": {"steps": config.steps, "batch_size": config.batch_size},
        "settings": cell.settings(scale),
        "environment": environment(device),
    }
    return record, drawn.clips[:PICTURED]


def draw(cell: Cell, scale: Scale, network: Network, config: TrainConfig, codec: Codec, device: torch.device) -> Drawn:
    """Draw the cell's clips: as many as the scale says, or one for each held clip whose frames or motion are given."""
    classes, task = config.network_config.num_classes, TASKS[cell.task]
    hold = task(torch.zeros(1, dtype=torch.int64), config.network_config.num_frames)[1][0]
    conditions: dict[str, Tensor] = {}
    if cell.task == "standard" and cell.arm.motion is None:
        count, truth = scale.clips[cell.data], None
        real, real_labels = cell.material.real(count)
        labels = torch.arange(count) % (classes or 1)
    else:
        truth, labels, conditions = cell.material.held(scale.held, device)
        count, real, real_labels = len(truth), truth, labels
        conditions.pop("y", None)  # the labels
    motion = conditions.get("motion")
    if cell.arm.motion is not None:
        conditions["motion"] = other_motion(conditions["motion"], cell.arm.motion)
    clips = draw_clips(
        network,
        make_schedule(config.diffusion.schedule, config.diffusion.num_steps, device),
        count,
        batch_size=scale.batch,
        seed=cell.seed,
        num_steps=cell.arm.steps or scale.steps,
        task=task,
        labels=None if classes is None else labels,
        conditions=conditions,
        known=truth if hold.any() else None,
        precision=config.precision,
        progress=True,
        variance="learned_range" if config.network_config.learn_sigma else "fixed_small",
        sampler=sampler_of(config),
        prediction=config.diffusion.prediction,
        sharing=cell.arm.sharing,
    )

    def pixels(stack: Tensor) -> Tensor:
        return torch.stack([codec.decode(clip.cpu()).clamp(-1, 1) for clip in stack])

    return Drawn(
        clips=pixels(clips),
        real=pixels(real),
        given=hold,
        truth=None if truth is None else pixels(truth),
        labels=labels,
        real_labels=real_labels,
        motion=None if motion is None else motion.cpu(),
    )


def other_motion(motion: Tensor, kind: str) -> Tensor:
    """The motion (N, F, 3, h, w) that clips are rendered with: their "own", "zero" and all visible, or an "other"'s."""
    if kind == "zero":
        still = torch.zeros_like(motion)
        still[:, :, 2] = 1
        return still
    return motion.roll(len(motion) // 2, 0) if kind == "other" else motion

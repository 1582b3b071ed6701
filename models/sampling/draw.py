"""Draws any number of clips in batches; a clip does not depend on how they are split."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models.config import TrainConfig
from models.networks import Network
from vidkern.diffusion import TASKS, Schedule, Task, sample, sample_long_video


def draw_clips(
    network: Network,
    schedule: Schedule,
    count: int,
    *,
    batch_size: int,
    seed: int,
    num_steps: int,
    task: Task = TASKS["standard"],
    labels: Tensor | None = None,
    known: Tensor | None = None,
    chunks: int = 1,
    overlap: int = 0,
    precision: str = "float32",
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Draw `count` clips of the network's frames, float32 (count, F, C, H, W) on the CPU.

    Args:
        network: on the schedule's device.
        seed: of the noise. Clip i is the same for every `batch_size`, up to the rounding of the network.
        task: which frames are given; a long video has its own pattern.
        labels: (count,) int64, for a class-conditional network.
        known: (F, C, H, W), whose given frames every clip shares; with `chunks` > 1, the first window.
        chunks: windows of a long video, of which each is given the last `overlap` frames of the one before.
        precision: "bfloat16" runs the network under autocast.
        progress: show a bar of all steps.
        **options: of `vidkern.diffusion.sample`.
    """
    device, config = schedule.device, network.config
    shape = (config.num_frames, config.in_channels, *config.frame_size)
    drawn = chunks - (1 if chunks > 1 and known is not None else 0)
    splits = torch.arange(count).split(batch_size)
    clips = []
    with (
        tqdm(total=len(splits) * num_steps * drawn, unit="step", disable=not progress, dynamic_ncols=True) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        for split in splits:
            window = None if known is None else known.to(device).expand(len(split), *shape)
            draw: Callable[..., Tensor] = functools.partial(sample, task=task, known=window)
            if chunks > 1:
                draw = functools.partial(sample_long_video, chunks=chunks, given=overlap, first=window)
            clip = draw(
                network,
                (len(split), *shape),
                schedule,
                torch.tensor([seed, 0], device=device),
                num_steps=num_steps,
                y=None if labels is None else labels[split].to(device),
                y_null=config.num_classes,
                sample_offset=int(split[0]),
                progress=lambda *_: bar.update(),
                **options,
            )
            clips.append(clip.cpu())
    return torch.cat(clips)


def sampler_of(config: TrainConfig) -> str:
    """The sampler that suits the schedule of a run."""
    return "flow" if config.diffusion.schedule == "flow" else "ddim"

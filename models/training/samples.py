"""Sample clips of a run, for the eye: a GIF of each set, a contact sheet, and TensorBoard's image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.config import TrainConfig
from models.data import contact_sheet, write_gif
from models.networks import Network, noise_options
from models.sampling.codec import Codec
from models.sampling.draw import draw_clips, sampler_of
from models.training.distributed import World
from models.training.metrics import Board
from vidkern.diffusion import TASKS, Schedule

SEED = 0  # the same noise each time shows the progress


def write_samples(
    ema: Network,
    codec: Codec,
    schedule: Schedule,
    config: TrainConfig,
    step: int,
    world: World,
    board: Board | None,
    real: tuple[Tensor, dict[str, Tensor]],
) -> None:
    """Draw `log.sample_clips` clips of the averaged weights; every process draws, the main one writes.

    Classes come in turn; any other condition, and the first frame that a network for image-to-video is given, are those
    of the clips `real`, (x0, conditions) as `Batches.first` returns them.

    Files are samples/step_{step:08d}.gif, the clips side by side, and .png, the contact sheet.
    """
    network, count = config.network_config, config.log.sample_clips
    classes, (x0, conditions) = network.num_classes, real
    given: dict[str, Any] = {}
    if "given" in network.conditions:
        given = {"task": TASKS["image-to-video"], "known": x0}
    clips = draw_clips(
        ema,
        schedule,
        count,
        batch_size=config.batch_size,
        seed=SEED,
        num_steps=config.log.sample_steps,
        labels=None if classes is None else torch.arange(count) % classes,
        conditions=conditions if classes is None else None,
        **given,
        precision=config.precision,
        sampler=sampler_of(config),
        prediction=config.diffusion.prediction,
        **noise_options(config, schedule.device),
    )
    if not world.is_main or board is None:
        return
    pixels = [codec.decode(clip) for clip in clips]
    path = Path(config.run_dir) / "samples" / f"step_{step:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gif(path.with_suffix(".gif"), torch.cat(pixels, dim=-1), fps=config.log.fps)
    contact_sheet(path.with_suffix(".png"), pixels)
    with Image.open(path.with_suffix(".png")) as sheet:
        board.image("samples", torch.from_numpy(np.array(sheet)), step)

"""Clips drawn from a checkpoint for an evaluation, kept as drawn, so that an interrupted one goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from models.array_files import write_array
from models.command_line import UsageError, differences, to_dict
from models.config import TrainConfig
from models.data.frames import to_float, to_uint8
from models.digest import sha256_of
from models.networks import Network
from models.sampling.codec import Codec
from models.sampling.draw import check_finite, draw_clips, process_of, sampler_of
from vidkern.diffusion import Task, make_schedule

_SETTINGS = "drawing.json"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How clips are drawn. `source` names the real clips of a task that is given frames, else it is empty.

    `vae` is the autoencoder that was asked for; None where it follows from the configuration.
    """

    network: Network
    config: TrainConfig
    codec: Codec
    task: Task
    task_name: str
    hold: Tensor
    source: str
    vae: str | None
    steps: int
    cfg_scale: float | None
    seed: int
    batch_size: int
    device: torch.device

    def settings(self) -> dict[str, Any]:
        """What the clips follow from, as plain values."""
        names = ("task_name", "source", "vae", "steps", "cfg_scale", "seed")
        return {
            "weights": sha256_of(self.network.state_dict()),
            "diffusion": to_dict(self.config.diffusion),
            "given": self.hold.nonzero()[:, 0].tolist(),
            **{name: getattr(self, name) for name in names},
        }


class DrawnClips(Dataset[Tensor]):
    """Clips float32 (F, 3, height, width) in [-1, 1], rounded to 8 bits, read from a folder that `draw` fills."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        """The number of clips."""
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        """Clip `index`; grey becomes three equal channels."""
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in [0, {self.count}), got {index}")
        return to_float(torch.from_numpy(np.load(self.path(index)))).expand(-1, 3, -1, -1)

    def path(self, index: int) -> Path:
        """The clip's file, uint8 (F, C, height, width)."""
        return self.folder / f"{index:06d}.npy"


def draw(folder: Path, drawing: Drawing, count: int, real: Dataset[Tensor] | None = None) -> DrawnClips:
    """Draw `count` clips into `folder`, but for those that are there; `real` gives the frames of a task that takes any.

    Raises UsageError where the folder's clips were drawn in another way, ValueError where a clip is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder / _SETTINGS, drawing.settings())
    clips = DrawnClips(folder, count)
    network = drawing.network.to(drawing.device)
    with tqdm(total=count, desc="drawing", unit="clip", dynamic_ncols=True) as bar:
        for numbers in torch.arange(count).split(drawing.batch_size):
            if not all(clips.path(i).exists() for i in numbers.tolist()):
                known = None
                if real is not None:
                    known = torch.stack([drawing.codec.encode(real[i]) for i in numbers.tolist()])
                for i, clip in zip(numbers.tolist(), _draw(network, drawing, numbers, known), strict=True):
                    write_array(clips.path(i), to_uint8(drawing.codec.decode(clip)).numpy())
            bar.update(len(numbers))
    return clips


def _draw(network: Network, drawing: Drawing, numbers: Tensor, known: Tensor | None) -> Tensor:
    """The clips with these numbers."""
    config, classes = drawing.config, drawing.config.network_config.num_classes
    clips = draw_clips(
        network,
        make_schedule(config.diffusion.schedule, config.diffusion.num_steps, drawing.device),
        len(numbers),
        batch_size=len(numbers),
        seed=drawing.seed,
        first=int(numbers[0]),
        num_steps=drawing.steps,
        labels=None if classes is None else numbers % classes,
        known=known,
        task=drawing.task,
        cfg_scale=drawing.cfg_scale,
        sampler=sampler_of(config),
        **process_of(config, drawing.device),
    )
    check_finite(clips, first=int(numbers[0]))
    return clips


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or compare them with those that are there."""
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n")
    elif changed := differences(json.loads(path.read_text()), settings):
        raise UsageError(f"{path.parent} has clips drawn in another way ({'; '.join(changed)}): choose another --out")

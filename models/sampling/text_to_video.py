"""Two-stage text-to-video: a VDM draws motion from a text and a first frame, and S2DM renders it from one noise."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import TrainConfig
from models.networks import Network
from models.sampling.draw import draw_clips, process_of
from models.sampling.guidance import guide
from models.sampling.inversion import invert
from vidkern.diffusion import Schedule

#: Further evaluations in each step of an inversion; see models.sampling.inversion.
REFINEMENTS = 3


@dataclasses.dataclass(frozen=True)
class Stage:
    """A network and how it is sampled.

    Attributes:
        network: on the schedule's device.
        config: that it was trained with.
        schedule: of that configuration.
        scales: of guidance, by condition.
        options: of `models.sampling.draw.draw_clips`: batch_size, seed, num_steps, ...
    """

    network: Network
    config: TrainConfig
    schedule: Schedule
    scales: Mapping[str, float]
    options: Mapping[str, Any]

    def draw(self, conditions: Mapping[str, Tensor], **options: Any) -> Tensor:
        """As many clips as the conditions (count, ...) have, float32 (count, F, C, H, W) on the CPU."""
        count = len(next(iter(conditions.values())))
        process = process_of(self.config, self.schedule.device)
        settings: dict[str, Any] = {"scales": self.scales, **process, **self.options, **options}
        return draw_clips(self.network, self.schedule, count, conditions=conditions, **settings)


def at_rest(count: int, frames: int, size: tuple[int, int]) -> Tensor:
    """Motion (count, frames, 3, *size) of clips in which nothing moves: flow 0, all visible."""
    return torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand(count, frames, 3, *size)


def draw_first_frames(renderer: Stage, conditions: Mapping[str, Tensor], count: int, size: tuple[int, int]) -> Tensor:
    """First frames (count, C, H, W): clips of one frame at rest, as `render` begins them for the same seed.

    `conditions` (count, ...) are those of the clips but motion, with a pose (count, 1, ...) of that frame alone. A
    condition that is the first frame itself is unknown yet, and dropped: it enters as zeros with a scale of 0.
    """
    network = renderer.config.network_config
    shapes = {"reference": (network.in_channels, *network.frame_size), "image": (1, getattr(network, "image_width", 0))}
    unknown = {name: torch.zeros(count, *shapes[name]) for name in shapes if name in network.conditions}
    scales = {name: scale for name, scale in renderer.scales.items() if name not in unknown}
    return renderer.draw(
        {**conditions, **unknown, "motion": at_rest(count, 1, size)},
        scales={**scales, **dict.fromkeys(unknown, 0.0)},
        frames=1,
    )[:, 0]


def noise_of(renderer: Stage, first: Tensor, conditions: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """The noise (count, 1, C, H, W) from which `render` draws the first frames (count, C, H, W), by DDIM inversion."""
    device = renderer.schedule.device
    told = {**conditions, "motion": at_rest(len(first), 1, size)}
    noise = invert(
        guide(renderer.network, {name: value.to(device) for name, value in told.items()}, renderer.scales),
        first[:, None].to(device),
        renderer.schedule,
        renderer.options["num_steps"],
        prediction=renderer.config.diffusion.prediction,
        refinements=REFINEMENTS,
    )
    return noise.cpu()


def draw_motion(artist: Stage, conditions: Mapping[str, Tensor]) -> Tensor:
    """Motion (count, F, 3, h, w) in the network's form; the first frame is put at rest, which is what it is."""
    motion = artist.draw(conditions)
    motion[:, 0] = at_rest(1, 1, (motion.shape[-2], motion.shape[-1]))[0, 0]
    return motion


def resized(motion: Tensor, size: tuple[int, int]) -> Tensor:
    """Motion (count, F, 3, h, w) at another `size` (height, width); its values are relative and stay."""
    if motion.shape[-2:] == size:
        return motion
    return F.interpolate(motion.flatten(0, 1), size, mode="bilinear", antialias=True).unflatten(0, motion.shape[:2])


def render(
    renderer: Stage, motion: Tensor, conditions: Mapping[str, Tensor], noise: Tensor | None = None, **options: Any
) -> Tensor:
    """Clips (count, F, C, H, W) that move so: every frame of a clip is drawn from one noise.

    Args:
        renderer: S2DM.
        motion: (count, F, 3, h, w).
        conditions: (count, ...), the others.
        noise: (count or 1, 1, C, H, W); None: drawn, one for each clip.
        **options: of `models.sampling.draw.draw_clips`.
    """
    frames = motion.shape[1]
    start = None if noise is None else noise.expand(len(motion), frames, -1, -1, -1).contiguous()
    return renderer.draw({**conditions, "motion": motion}, start=start, frames=frames, **options)

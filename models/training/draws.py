"""What a training step draws at random for each clip of the whole batch: the same in every process of a run."""

import dataclasses

import torch
from torch import Tensor

from models.conditions import draw_dropped
from models.config import TrainConfig
from models.image_to_video import draw_given
from vidkern.diffusion import sample_timesteps


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of B clips of F frames."""

    t: Tensor
    """Timesteps, int64 (B,) or (B, F)."""
    dropped: dict[str, Tensor]
    """The clips that lose a condition, bool (B,) by the condition's name. All conditions are there, even one that is
    never dropped: its null then takes part in the backward pass, as DDP wants of every weight."""
    given: Tensor | None
    """The frames that a network for image-to-video is given, bool (B, F)."""

    def part(self, clips: slice) -> "Draws":
        """The draws of some of the clips."""
        return Draws(
            self.t[clips],
            {name: samples[clips] for name, samples in self.dropped.items()},
            None if self.given is None else self.given[clips],
        )

    def weight(self, clips: slice) -> Tensor | float:
        """How many of the frames that count in the loss belong to `clips`, as a share of all."""
        if self.given is None:
            return (clips.stop - clips.start) / len(self.t)
        counted = (~self.given).sum(1)
        return counted[clips].sum() / counted.sum()


def draw(config: TrainConfig, frames: int, generator: torch.Generator) -> Draws:
    """The draws of a step's whole batch of clips of `frames` frames, on the generator's device, without a wait."""
    batch, diffusion, network = config.batch_size, config.diffusion, config.network_config
    t = sample_timesteps(
        batch,
        frames,
        diffusion.num_steps,
        mode=diffusion.timesteps,
        p=diffusion.ptss_probability,
        generator=generator,
    )
    never = torch.zeros(batch, dtype=torch.bool, device=generator.device)
    dropped = draw_dropped(network.dropouts, batch, generator=generator)
    given = draw_given(batch, frames, generator=generator) if "given" in network.conditions else None
    return Draws(t, {name: dropped.get(name, never) for name in network.dropouts}, given)

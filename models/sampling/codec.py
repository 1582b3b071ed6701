"""Pixels to and from the space in which a network works: pixels themselves, latents, or motion, which is shown."""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from models.command_line import UsageError
from models.config import NetworkConfig, TrainConfig
from models.motion.colour_wheel import colour_wheel
from models.motion.forms import from_network


class Codec(Protocol):
    """Encodes and decodes one clip; pixels are float32 (F, C, height, width) in [-1, 1]."""

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        ...

    @property
    def channels(self) -> int:
        """Channels of a pixel, 1 or 3."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels as the network's input (F, C, H, W), on the CPU."""
        ...

    def decode(self, clip: Tensor) -> Tensor:
        """The network's (F, C, H, W) as pixels, on the CPU."""
        ...


@dataclasses.dataclass(frozen=True)
class Pixels:
    """A network that works on pixels."""

    model: NetworkConfig

    @property
    def frame_size(self) -> tuple[int, int]:
        """The network's."""
        return self.model.frame_size

    @property
    def channels(self) -> int:
        """The network's."""
        return self.model.in_channels

    def encode(self, pixels: Tensor) -> Tensor:
        """The pixels themselves."""
        return pixels

    def decode(self, clip: Tensor) -> Tensor:
        """The clip itself."""
        return clip


@dataclasses.dataclass(frozen=True)
class MotionPictures:
    """A network of motion: its flow is shown by the colour wheel, red to the right."""

    model: NetworkConfig

    @property
    def frame_size(self) -> tuple[int, int]:
        """The network's."""
        return self.model.frame_size

    @property
    def channels(self) -> int:
        """Colour."""
        return 3

    def encode(self, pixels: Tensor) -> Tensor:
        """Raises UsageError: pixels are no motion."""
        raise UsageError("a network of motion is given no frames")

    def decode(self, clip: Tensor) -> Tensor:
        """The flow's colours, full for the longest one of the clip."""
        flow, _ = from_network(clip)
        return colour_wheel(flow)


def make_codec(config: TrainConfig, vae: str | None, device: torch.device) -> Codec:
    """The codec of the network that `config` trained; `vae` goes before the autoencoder that the latents came from.

    Raises ValueError where there is no autoencoder, or one with other channels than the network's.
    """
    if config.network == "vdm":
        return MotionPictures(config.network_config)
    if config.data.kind != "latents" and not config.data.latents:
        return Pixels(config.network_config)
    from models.sampling.latents import load_latents  # diffusers is slow to import

    return load_latents(config, vae, device)

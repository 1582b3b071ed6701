"""Pixels to and from the space in which a network works: the pixels themselves, or an autoencoder's latents."""

import dataclasses
from typing import Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from models.autoencoder import decode_latents, downsampling, load_autoencoder, posterior, scaling
from models.config import TrainConfig, UsageError
from models.data.latents import read_index
from models.latte import LatteConfig


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

    model: LatteConfig

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
class Latents:
    """A network that works on an autoencoder's latents."""

    model: LatteConfig
    vae: AutoencoderKL

    @property
    def frame_size(self) -> tuple[int, int]:
        """The network's times the autoencoder's downsampling."""
        height, width = self.model.frame_size
        return height * downsampling(self.vae), width * downsampling(self.vae)

    @property
    def channels(self) -> int:
        """Colour."""
        return 3

    def encode(self, pixels: Tensor) -> Tensor:
        """The mean of the autoencoder's posterior, scaled."""
        scale, shift = scaling(self.vae)
        return ((posterior(self.vae, pixels)[0] - shift) * scale).float().cpu()

    def decode(self, clip: Tensor) -> Tensor:
        """The autoencoder's reconstruction."""
        return decode_latents(self.vae, clip[None])[0].cpu()


def make_codec(config: TrainConfig, vae: str | None, device: torch.device) -> Codec:
    """The codec of the network that `config` trained; `vae` goes before the autoencoder that the latents came from.

    Raises ValueError where there is no autoencoder, or one with other channels than the network's.
    """
    if config.data.kind != "latents":
        return Pixels(config.model)
    name = vae or config.data.vae or _vae_of_latents(config)
    autoencoder = load_autoencoder(name, device=device)
    channels = autoencoder.config["latent_channels"]
    if channels != config.model.in_channels:
        raise UsageError(
            f"the autoencoder {name} has {channels} latent channels, the network {config.model.in_channels}"
        )
    return Latents(config.model, autoencoder)


def _vae_of_latents(config: TrainConfig) -> str:
    try:
        return read_index(str(config.data.path)).vae
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}; give --vae to decode without them") from error

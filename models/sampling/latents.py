"""Pixels to and from the latents of an image autoencoder."""

import dataclasses

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from models.autoencoder import decode_latents, downsampling, load_autoencoder, posterior, scaling
from models.command_line import UsageError
from models.config import NetworkConfig, TrainConfig
from models.data.latents import read_index
from models.data.motion import read_motion_index


@dataclasses.dataclass(frozen=True)
class Latents:
    """A network that works on an autoencoder's latents."""

    model: NetworkConfig
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


def load_latents(config: TrainConfig, vae: str | None, device: torch.device) -> Latents:
    """The codec of a latent network; see models.sampling.codec.make_codec."""
    name = vae or config.data.vae or _vae_of_data(config)
    autoencoder = load_autoencoder(name, device=device)
    channels = autoencoder.config["latent_channels"]
    if channels != config.network_config.in_channels:
        raise UsageError(
            f"the autoencoder {name} has {channels} latent channels, the network {config.network_config.in_channels}"
        )
    return Latents(config.network_config, autoencoder)


def _vae_of_data(config: TrainConfig) -> str:
    try:
        folder = str(config.data.path)
        return read_index(folder).vae if config.data.kind == "latents" else str(read_motion_index(folder).vae)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}; give --vae to decode without them") from error

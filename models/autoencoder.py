"""Image autoencoders from diffusers: loading one, and frames to latents and back."""

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from models.pretrained import find_part


def load_autoencoder(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AutoencoderKL:
    """A frozen AutoencoderKL from a local folder (its own or a pipeline's) or from the hub: owner/name[/subfolder].

    Raises ValueError, in one line, where there is none or where it is another kind of autoencoder.
    """
    source, folder = find_part(name, "autoencoder", "vae")
    try:
        kind = AutoencoderKL.load_config(source, subfolder=folder).get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"{name} holds a {kind}, want an AutoencoderKL")
        # loading with low memory use wants accelerate, which a model of this size can do without
        vae = AutoencoderKL.from_pretrained(source, subfolder=folder, torch_dtype=dtype, low_cpu_mem_usage=False)
    except OSError as error:
        raise ValueError(f"cannot load an AutoencoderKL from {name}: {str(error).splitlines()[0]}") from error
    return vae.to(device).eval().requires_grad_(False)


def scaling(vae: AutoencoderKL) -> tuple[float, float]:
    """(scaling_factor, shift_factor): a model's input is (latent - shift_factor) * scaling_factor."""
    return vae.config["scaling_factor"], vae.config["shift_factor"] or 0.0


def downsampling(vae: AutoencoderKL) -> int:
    """Pixels per latent along each side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


@torch.inference_mode()
def posterior(vae: AutoencoderKL, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (T, C, h, w), unscaled, of frames (T, 3, H, W) in [-1, 1], in the dtype of `vae`."""
    latent = vae.encode(frames.to(vae.device, vae.dtype)).latent_dist
    return latent.mean, latent.std


@torch.inference_mode()
def decode_latents(vae: AutoencoderKL, latents: Tensor, batch: int = 8) -> Tensor:
    """Pixels float32 (B, F, 3, H, W), about [-1, 1], of a model's latents (B, F, C, h, w), `batch` frames at a time."""
    scale, shift = scaling(vae)
    frames = (latents.flatten(0, 1) / scale + shift).to(vae.device, vae.dtype)
    pixels = torch.cat([vae.decode(part).sample.float() for part in frames.split(batch)])
    return pixels.unflatten(0, latents.shape[:2])

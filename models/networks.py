"""Every network that a configuration can name: built, tried on a batch without values, and cut into blocks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.config import TrainConfig
from models.latte import Latte
from models.s2dm import S2DM
from models.vdm import VDM
from models.videofusion import VideoFusion, frame_weights
from vidkern.diffusion import make_schedule

Network = Latte | S2DM | VDM | VideoFusion


def build_network(config: TrainConfig, *, pretrained: bool = True) -> Network:
    """The network of `config.network`, on torch's default device.

    Its weights are fresh, or those that the configuration names (`s2dm.unet`); with `pretrained` False they are fresh
    in any case, for a network that is about to be loaded. Raises ValueError for sizes that cannot be built, OSError or
    ValueError for weights that cannot be had.
    """
    if config.network == "s2dm":
        return S2DM(config.s2dm if pretrained else dataclasses.replace(config.s2dm, unet=None))
    if config.network == "videofusion":
        diffusion = config.diffusion
        if diffusion.noise_base_weight is None:
            raise ValueError("network videofusion wants diffusion.noise_base_weight, got None")
        schedule = make_schedule(diffusion.schedule, diffusion.num_steps, torch.get_default_device())
        return VideoFusion(config.model, schedule, diffusion.noise_base_weight)
    return VDM(config.vdm) if config.network == "vdm" else Latte(config.model)


def noise_options(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """How the frames of a clip share their noise, as `diffusion_loss` and `sample` take it."""
    share, frames = config.diffusion.noise_base_weight, config.network_config.num_frames
    weights = frame_weights(share, frames, device) if config.network == "videofusion" and share is not None else share
    return {"sharing": config.diffusion.noise, "base_weight": weights}


def check_network(config: TrainConfig, x0: Tensor, conditions: Mapping[str, Tensor]) -> None:
    """Run the network on a batch without values, so that what does not fit is told before the first step.

    Raises ValueError for clips (B, F, C, H, W), a condition or a size that the network or an operator does not take.
    """
    options: dict[str, Any] = {name: value.to("meta") for name, value in conditions.items()}
    if config.data.images:
        options["num_images"] = config.data.images
    with torch.device("meta"):
        clip, t = x0.to("meta"), torch.zeros(len(x0), dtype=torch.int64)
        if "given" in config.network_config.conditions:
            options |= {"known": clip, "given": torch.zeros(clip.shape[:2], dtype=torch.bool)}
        build_network(config, pretrained=False).eval()(clip, t, **options)


def blocks_of(network: Network) -> list[nn.Module]:
    """The parts of a network that run one after another and hold most of its weights, for sharding."""
    if isinstance(network, S2DM):
        return [*network.unet.down_blocks, network.unet.mid_block, *network.unet.up_blocks]
    if isinstance(network, VDM):
        return [*network.downs, network.middle, *network.ups]
    return list(network.blocks)

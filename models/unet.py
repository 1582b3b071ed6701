"""Stable Diffusion 1's U-Net, diffusers' UNet2DConditionModel: its settings, and its published weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from models.pretrained import find_part

if TYPE_CHECKING:  # diffusers is slow to import
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def unet_settings(
    *,
    in_channels: int,
    out_channels: int,
    block_out_channels: Sequence[int],
    layers_per_block: int,
    num_heads: int,
    cross_attention_dim: int,
    norm_groups: int,
) -> dict[str, Any]:
    """The settings of a U-Net of Stable Diffusion 1's kind: attention at every resolution but the lowest.

    diffusers calls the number of heads `attention_head_dim` there, and so do the published files.
    """
    attending = len(block_out_channels) - 1
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(block_out_channels),
        "layers_per_block": layers_per_block,
        "attention_head_dim": num_heads,
        "cross_attention_dim": cross_attention_dim,
        "norm_num_groups": norm_groups,
        "down_block_types": ("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
    }


def build_unet(settings: dict[str, Any]) -> "UNet2DConditionModel":
    """A U-Net with random weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(**settings)


def load_unet(name: str, settings: dict[str, Any]) -> "UNet2DConditionModel":
    """A U-Net with the weights of a local folder (its own or a pipeline's) or of the hub: owner/name[/subfolder].

    Raises ValueError, in one line, where there is none, or one that `settings` does not describe.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    source, folder = find_part(name, "U-Net", "unet", hub_folder="unet")
    try:
        # loading with low memory use wants accelerate
        unet = UNet2DConditionModel.from_pretrained(source, subfolder=folder, low_cpu_mem_usage=False)
    except OSError as error:
        raise ValueError(f"cannot load a UNet2DConditionModel from {name}: {str(error).splitlines()[0]}") from error
    _check_settings(name, unet, settings)
    return unet


def _check_settings(name: str, unet: "UNet2DConditionModel", settings: dict[str, Any]) -> None:
    """Refuse a U-Net of another structure: without its file, nobody could build what was trained from it."""
    with torch.device("meta"):
        wanted = build_unet(settings).config
    for setting, value in wanted.items():
        if setting.startswith("_") or setting == "sample_size":  # the size only documents the training
            continue
        got = unet.config[setting]
        if (tuple(got) if isinstance(got, list) else got) != value:
            raise ValueError(f"the U-Net of {name} has {setting} = {got}, the configuration asks for {value}")

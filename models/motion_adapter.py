"""Motion where it lies: a T2I-Adapter's features for the way down of Stable Diffusion's U-Net."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MotionAdapter(nn.Module):
    """Features to add to a U-Net's resolutions: motion (N, 3, h, w) -> (N, C_i, H / 2^i, W / 2^i) for each of them.

    diffusers' T2IAdapter (Mou et al. 2023) on motion resized to the U-Net's input. Each resolution's features have a
    gain, zero at first, as ControlNet's zero convolutions are: a fresh adapter leaves a pretrained U-Net as it was.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], layers: int) -> None:
        super().__init__()
        from diffusers.models.adapter import T2IAdapter  # slow to import

        self.adapter = T2IAdapter(in_channels, list(channels), num_res_blocks=layers, downscale_factor=1)
        self.gains = nn.Parameter(torch.zeros(len(channels)))

    def forward(self, motion: Tensor, size: tuple[int, int], kept: Tensor | None = None) -> list[Tensor]:
        """Encode (N, 3, h, w) for a U-Net whose input is (N, C, *size).

        Args:
            motion: in the network's form, whose values do not depend on its size.
            size: H, W.
            kept: bool (N,): the features of the others are zero.
        """
        resized = F.interpolate(motion, size, mode="bilinear", antialias=True)
        features = self.adapter(resized)
        gains = self.gains if kept is None else self.gains * kept[:, None]
        return [f * g[..., None, None, None].to(f.dtype) for f, g in zip(features, gains.unbind(-1), strict=True)]

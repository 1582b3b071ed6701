"""The residual block of a factorised 3D U-Net: two (1, 3, 3) convolutions, modulated by each frame's condition."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkern import ops
from vidkern.nn import CausalConv3d

#: Of every convolution: frames meet in temporal attention only.
KERNEL = (1, 3, 3)


class ResidualBlock(nn.Module):
    """Convolve twice, with the frame's condition in between, and add to the input (VDM, Ho et al. 2022):

        h = SiLU(RMS(conv1(x)) * (1 + scale) + shift),    y = skip(x) + SiLU(RMS(conv2(h)) * weight)

    RMS divides each position by the root mean square of its channels, so no statistic joins frames or positions;
    (scale, shift) of each frame are a Linear of SiLU(condition).

    Args:
        in_channels: C of the input.
        out_channels: C of the output, a multiple of 8.
        condition_size: length of the condition.
    """

    def __init__(self, in_channels: int, out_channels: int, condition_size: int) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_size, 2 * out_channels))
        self.conv1 = CausalConv3d(in_channels, out_channels, KERNEL)
        self.conv2 = CausalConv3d(out_channels, out_channels, KERNEL)
        self.weight = nn.Parameter(torch.ones(out_channels))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return (B, F, H, W, C') for x (B, F, H, W, C) and the frames' condition (B, F, D), or (B, 1, D)."""
        scale, shift = self.modulation(condition).expand(-1, x.shape[1], -1).chunk(2, dim=-1)
        h = self.conv1(x.movedim(-1, 1)).movedim(1, -1)
        # eps as a literal: see vidkern.nn.modulation
        h = F.silu(ops.rms_norm_modulate(h.flatten(2, 3), shift, scale, eps=1e-6)).view(h.shape)
        h = self.conv2(h.movedim(-1, 1))
        return self.skip(x) + ops.norm_silu_pad(h, self.weight, norm="rms", kernel=1).movedim(1, -1)

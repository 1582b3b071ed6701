"""The attention layers of a factorised 3D U-Net: over the positions of a frame, and over the frames of a position."""

import torch
from torch import Tensor, nn

from vidkern import ops
from vidkern.nn import Rope


class ResidualAttention(nn.Module):
    """Normalise over channels, attend with heads of a size of their own, and add to the input.

    Args:
        channels: C, a multiple of 8.
        num_heads: H.
        head_size: d; C need not be H * d.
    """

    def __init__(self, channels: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.heads = num_heads, head_size
        self.norm_shift = nn.Parameter(torch.zeros(channels))
        self.norm_scale = nn.Parameter(torch.zeros(channels))
        self.qkv = nn.Linear(channels, 3 * num_heads * head_size, bias=False)
        self.proj = nn.Linear(num_heads * head_size, channels)

    def forward(self, x: Tensor, rope: Rope, bias: Tensor) -> Tensor:
        """Attend in x (B, F, H, W, C); of attention over frames rope is (cos, sin), each (F, d), and bias (H, F, F)."""
        tokens = x.flatten(2, 3)
        shift, scale = (vector.expand(*tokens.shape[:2], -1) for vector in (self.norm_shift, self.norm_scale))
        # eps as a literal: see vidkern.nn.modulation
        h = ops.layer_norm_modulate(tokens, shift, scale, eps=1e-6)
        qkv = self.qkv(h).unflatten(-1, (3, *self.heads))  # (B, F, N, 3, H, d)
        return (tokens + self.proj(self.attend(qkv, rope, bias).flatten(-2))).view(x.shape)

    def attend(self, qkv: Tensor, rope: Rope, bias: Tensor) -> Tensor:
        """(B, F, N, 3, H, d) -> (B, F, N, H, d)."""
        raise NotImplementedError


class SpaceAttention(ResidualAttention):
    """Attention over the N positions of each frame, which has no use for rope and bias."""

    def attend(self, qkv: Tensor, rope: Rope, bias: Tensor) -> Tensor:
        """Attend within each frame."""
        return ops.spatial_attention(qkv)


class TimeAttention(ResidualAttention):
    """Attention over the F frames at each position, in both directions."""

    def attend(self, qkv: Tensor, rope: Rope, bias: Tensor) -> Tensor:
        """Attend along each position's frames."""
        return ops.temporal_attention(qkv, rope=rope, bias=bias)

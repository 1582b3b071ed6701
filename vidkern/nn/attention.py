"""Self-attention modules over tokens (B, F, N, D): in space, in time, and in both."""

import torch
from torch import Tensor, nn

from vidkern import ops
from vidkern.nn.linear import xavier_linear

#: Rotary tables (cos, sin), each (F, d) float32, of the frames' positions.
Rope = tuple[Tensor, Tensor]


class _SelfAttention(nn.Module):
    """The projections that every attention shares: ``qkv`` and ``proj``, both with a bias."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads = {num_heads}, got {hidden_size}")
        self.num_heads = num_heads
        self.qkv = xavier_linear(hidden_size, 3 * hidden_size)
        self.proj = xavier_linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rope: Rope | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend: (B, F, N, D) -> (B, F, N, D).

        Wherever attention runs over frames, ``rope`` turns queries and keys, and ``bias`` (heads, F, F) is added to
        the scores (:class:`RelativePositionBias` makes one, which all layers may share).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, F, N, 3, H, d)
        return self.proj(self.attend(qkv, rope, bias).flatten(-2))

    def attend(self, qkv: Tensor, rope: Rope | None, bias: Tensor | None) -> Tensor:
        """(B, F, N, 3, H, d) -> (B, F, N, H, d)."""
        raise NotImplementedError


class SpatialAttention(_SelfAttention):
    """Attention over the N tokens of each frame."""

    def attend(self, qkv: Tensor, rope: Rope | None, bias: Tensor | None) -> Tensor:
        """Attend within each frame; frames do not meet, so ``rope`` and ``bias`` have nothing to change."""
        return ops.spatial_attention(qkv)


class TemporalAttention(_SelfAttention):
    """Attention over the F frames at each token's place, of the tokens where they lie."""

    def attend(self, qkv: Tensor, rope: Rope | None, bias: Tensor | None) -> Tensor:
        """Attend along each place's frames."""
        return ops.temporal_attention(qkv, rope=rope, bias=bias)


class SplitHeadAttention(_SelfAttention):
    """The first half of the heads attends in space, the second half in time (Latte's variant 4)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        if num_heads % 2:
            raise ValueError(f"num_heads must be even to be split between space and time, got {num_heads}")

    def attend(self, qkv: Tensor, rope: Rope | None, bias: Tensor | None) -> Tensor:
        """Attend with each half of the heads, and put the results side by side."""
        space, time = qkv.chunk(2, dim=-2)
        return torch.cat([ops.spatial_attention(space), ops.temporal_attention(time, rope=rope, bias=bias)], dim=-2)


class SpaceThenTimeAttention(nn.Module):
    """Spatial attention followed by temporal attention, as one layer (Latte's variant 3)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.spatial = SpatialAttention(hidden_size, num_heads)
        self.temporal = TemporalAttention(hidden_size, num_heads)

    def forward(self, x: Tensor, rope: Rope | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend: (B, F, N, D) -> (B, F, N, D)."""
        return self.temporal(self.spatial(x), rope, bias)

"""Positions: sine-cosine tables that are added to tokens; rotary tables and relative bias of temporal attention."""

import math

import torch
from torch import Tensor, nn

MAX_PERIOD = 10000.0


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Return the sine-cosine embedding of positions: [sin(p w_k) | cos(p w_k)], w_k = 10000^(-2k / dim).

    Args:
        positions: (M,), any real dtype.
        dim: channels, even.

    Returns:
        (M, dim) float32, computed in float64 (Vaswani et al. 2017, in the layout of MAE and DiT).
    """
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    angles = positions.double()[:, None] * _frequencies(dim, positions.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def sincos_2d(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Return the table of a grid, row by row: the first half of the channels encodes the column, the second the row.

    Returns:
        (height * width, dim) float32; dim must be a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    columns = sincos_1d(torch.arange(width, device=device), dim // 2)
    rows = sincos_1d(torch.arange(height, device=device), dim // 2)
    grid = columns.expand(height, width, -1), rows[:, None].expand(height, width, -1)
    return torch.cat(grid, dim=-1).flatten(0, 1)


def rotary_tables(
    frames: int, dim: int, device: torch.device | None = None, period: float = MAX_PERIOD
) -> tuple[Tensor, Tensor]:
    """Return the rotary tables of ``vidkern.ops.temporal_attention`` for frames 0, 1, ... (Su et al. 2021).

    Channels 2k and 2k + 1 of a head turn together, by the angle f * period^(-2k / dim) in frame f.

    Returns:
        (cos, sin), each (frames, dim) float32, computed in float64.
    """
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    positions = torch.arange(frames, dtype=torch.float64, device=device)
    angles = (positions[:, None] * _frequencies(dim, positions.device, period)).repeat_interleave(2, dim=-1)
    return angles.cos().float(), angles.sin().float()


class RelativePositionBias(nn.Module):
    """A learned bias of temporal attention's scores for each head and distance between frames, in T5's buckets.

    Half of the buckets are for later keys, half for earlier ones and the frame itself; in each half, the first half
    holds one distance each, the rest grow with the logarithm up to ``max_distance`` (Raffel et al. 2020; VDM, Ho et al.
    2022, shares one bias among all layers).

    Args:
        num_heads: H.
        num_buckets: a multiple of 4.
        max_distance: frames from which on all distances share the last bucket; above num_buckets / 4.
    """

    def __init__(self, num_heads: int, num_buckets: int = 32, max_distance: int = 32) -> None:
        super().__init__()
        if num_buckets < 4 or num_buckets % 4:
            raise ValueError(f"num_buckets must be a positive multiple of 4, got {num_buckets}")
        if max_distance <= num_buckets // 4:
            raise ValueError(f"max_distance must be above num_buckets / 4 = {num_buckets // 4}, got {max_distance}")
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def forward(self, frames: int) -> Tensor:
        """Return the bias (H, F, F), [head, query frame, key frame], of ``frames`` frames."""
        position = torch.arange(frames, device=self.relative_attention_bias.weight.device)
        buckets = self.buckets(position[None, :] - position[:, None])
        return self.relative_attention_bias(buckets).movedim(-1, 0).contiguous()

    def buckets(self, ahead: Tensor) -> Tensor:
        """Return the bucket of each distance: int64, the key's frame less the query's."""
        half, exact = self.num_buckets // 2, self.num_buckets // 4
        distance = ahead.abs()
        octaves = torch.log(distance.clamp(min=exact).float() / exact) / math.log(self.max_distance / exact)
        coarse = (exact + (octaves * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(distance < exact, distance, coarse) + half * (ahead > 0)


def _frequencies(dim: int, device: torch.device, period: float = MAX_PERIOD) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return period**-exponents

"""Fixed positions: sine-cosine tables that are added to tokens, and the rotary tables of temporal attention."""

import torch
from torch import Tensor

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


def _frequencies(dim: int, device: torch.device, period: float = MAX_PERIOD) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return period**-exponents

"""Forms of motion: flow in pixels with its occlusion map, three channels for a network, LFDM's absolute grid.

Flow (..., 2, H, W) is in pixels, (dx, dy), dx to the right, dy down, and backward: frame i at (x, y) shows what the
first frame shows at (x + dx, y + dy). The occlusion map (..., 1, H, W) in [0, 1] has LFDM's sense: 1 where the first
frame shows that point, 0 where it is hidden there.
"""

import torch
from torch import Tensor

#: A network's flow is 1 at a displacement of a sixteenth of the frame: about as large as the occlusion's channel, and
#: as the noise that it is diffused with. The deviation of moving digits' flow over frames half as wide as [-1, 1] is
#: 0.09 without it, and three convolutions that read a frame off its motion are twice as far from it after 400 steps.
FLOW_GAIN = 8


def to_network(flow: Tensor, occlusion: Tensor) -> Tensor:
    """Motion (..., 3, H, W) = [2 g dx / W, 2 g dy / H, 2 occlusion - 1], with g = FLOW_GAIN.

    The flow is relative to the frame's sides, so motion may be resized as an image, without rescaling its values.
    Raises ValueError for shapes that do not belong together.
    """
    _check(flow, occlusion)
    return torch.cat([2 * FLOW_GAIN * flow / _sides(flow), 2 * occlusion - 1], dim=-3)


def from_network(motion: Tensor) -> tuple[Tensor, Tensor]:
    """(flow, occlusion) of motion (..., 3, H, W), in pixels of its own H and W; the map is clamped to [0, 1]."""
    _check_channels("motion", motion, 3)
    flow, occlusion = motion.split([2, 1], dim=-3)
    return flow * _sides(motion) / (2 * FLOW_GAIN), ((occlusion + 1) / 2).clamp(0, 1)


def to_grid(flow: Tensor, occlusion: Tensor) -> Tensor:
    """LFDM's form (..., 3, H, W): where each pixel comes from, x and y in [-1, 1], and 2 occlusion - 1.

    -1 and 1 are the centres of the first and the last pixel (`align_corners=True` of grid_sample), as in LFDM (Ni et
    al. 2023). H and W must be at least 2.
    """
    _check(flow, occlusion)
    return torch.cat([(_pixels(flow) + flow) * 2 / (_sides(flow) - 1) - 1, 2 * occlusion - 1], dim=-3)


def from_grid(grid: Tensor) -> tuple[Tensor, Tensor]:
    """(flow, occlusion) of LFDM's form (..., 3, H, W), see `to_grid`; the map is clamped to [0, 1]."""
    _check_channels("grid", grid, 3)
    place, occlusion = grid.split([2, 1], dim=-3)
    return (place + 1) * (_sides(grid) - 1) / 2 - _pixels(grid), ((occlusion + 1) / 2).clamp(0, 1)


def _sides(image: Tensor) -> Tensor:
    """(W, H) as (2, 1, 1)."""
    return image.new_tensor([image.shape[-1], image.shape[-2]]).view(2, 1, 1)


def _pixels(image: Tensor) -> Tensor:
    """Each pixel's x and y, (2, H, W)."""
    height, width = image.shape[-2:]
    x = torch.arange(width, dtype=image.dtype, device=image.device)
    y = torch.arange(height, dtype=image.dtype, device=image.device)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])


def _check(flow: Tensor, occlusion: Tensor) -> None:
    _check_channels("flow", flow, 2)
    _check_channels("occlusion", occlusion, 1)
    if (flow.shape[:-3], flow.shape[-2:]) != (occlusion.shape[:-3], occlusion.shape[-2:]):
        raise ValueError(
            f"occlusion must be of flow's shape {tuple(flow.shape)} but for 1 channel, got {tuple(occlusion.shape)}"
        )


def _check_channels(name: str, tensor: Tensor, channels: int) -> None:
    if tensor.ndim < 3 or tensor.shape[-3] != channels:
        raise ValueError(f"{name} must be (..., {channels}, H, W), got {tuple(tensor.shape)}")

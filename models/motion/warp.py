"""Warping: the first frame seen through a flow."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.motion.forms import to_grid


def warp(frame: Tensor, flow: Tensor) -> Tensor:
    """The image whose pixel (x, y) is `frame` at (x + dx, y + dy): (..., C, H, W).

    frame (..., C, H, W) and flow (..., 2, H, W), in pixels (see models.motion.forms), broadcast in their leading
    dimensions: one frame and a clip's flow give a clip. Sampled bilinearly; what lies outside the frame is its nearest
    edge. Raises ValueError where heights or widths differ.
    """
    if frame.shape[-2:] != flow.shape[-2:]:
        raise ValueError(f"flow must have frame's height and width {tuple(frame.shape[-2:])}, got {tuple(flow.shape)}")
    leading = torch.broadcast_shapes(frame.shape[:-3], flow.shape[:-3])
    frames = frame.expand(*leading, -1, -1, -1).reshape(-1, *frame.shape[-3:])
    grid = to_grid(flow, torch.ones_like(flow[..., :1, :, :]))[..., :2, :, :]
    grid = grid.expand(*leading, -1, -1, -1).reshape(-1, 2, *flow.shape[-2:])
    warped = F.grid_sample(frames, grid.movedim(-3, -1), padding_mode="border", align_corners=True)
    return warped.reshape(*leading, *frame.shape[-3:])

"""Which points of a frame the first frame shows: the forward-backward check."""

import torch
from torch import Tensor

from models.motion.warp import warp

# Sundaram, Brox, Keutzer 2010, "Dense point trajectories by GPU-accelerated large displacement optical flow", (5)
RELATIVE, ABSOLUTE = 0.01, 0.5  # of the flows' squared lengths; square pixels


def visible(backward: Tensor, forward: Tensor) -> Tensor:
    """Occlusion map (..., 1, H, W), hard: 1 where the first frame shows the point, 0 where it is hidden or outside.

    backward (..., 2, H, W), in pixels, leads from this frame to the first, forward from the first to this one. A point
    is shown where going there and back again ends close to where it began,
    |b + f|^2 < RELATIVE (|b|^2 + |f|^2) + ABSOLUTE, f taken where b leads, and where b leads into the first frame.
    """
    back = warp(forward, backward)
    error = (backward + back).square().sum(-3, keepdim=True)
    lengths = backward.square().sum(-3, keepdim=True) + back.square().sum(-3, keepdim=True)
    height, width = backward.shape[-2:]
    x = backward[..., :1, :, :] + torch.arange(width, device=backward.device)
    y = backward[..., 1:, :, :] + torch.arange(height, device=backward.device)[:, None]
    # a pixel reaches half a pixel around its centre
    inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    return (inside & (error < RELATIVE * lengths + ABSOLUTE)).to(backward.dtype)

"""Frames to clips: resize, crop, and pixels from uint8 to [-1, 1] and back."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_clip(
    frames: Sequence[np.ndarray], size: tuple[int, int], *, crop: tuple[float, float] = (0.5, 0.5), mirror: bool = False
) -> Tensor:
    """Frames uint8 (H, W, 3) as one float32 clip (F, 3, height, width) in [-1, 1].

    Each frame is resized, keeping its shape, until it just covers `size` (height, width), by an antialiased bicubic
    filter, and cropped: `crop` is the place of the window, (0, 0) top left, (1, 1) bottom right. `mirror` swaps left
    and right.
    """
    clip = torch.stack(
        [_fit(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1), size, crop) for frame in frames]
    )
    return to_float(clip.flip(-1) if mirror else clip)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8 in [0, 255], rounded to nearest; what lies outside is clamped."""
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def _fit(image: Tensor, size: tuple[int, int], crop: tuple[float, float]) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, height, width)."""
    scale = max(target / length for target, length in zip(size, image.shape[1:], strict=True))
    height, width = (max(t, round(n * scale)) for t, n in zip(size, image.shape[1:], strict=True))
    if (height, width) != tuple(image.shape[1:]):
        image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    top, left = round((height - size[0]) * crop[0]), round((width - size[1]) * crop[1])
    return image[:, top : top + size[0], left : left + size[1]]

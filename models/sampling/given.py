"""Given frames of a clip, read from image files and video files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.command_line import UsageError
from models.data import VideoError
from models.data.decode import frame_table, read_frames
from models.data.frames import to_clip


def read_images(paths: Sequence[str], size: tuple[int, int], channels: int) -> Tensor:
    """Image files as float32 (len(paths), C, height, width) in [-1, 1], resized and cropped about their centre.

    Images are turned upright as their EXIF data ask; 16-bit grey becomes 8-bit; transparency is ignored.
    Raises UsageError that names the file for one that is missing or no image.
    """
    return _to_channels(to_clip([_read_image(path) for path in paths], size), channels)


def read_clip(
    path: str, frames: int, interval: int, size: tuple[int, int], channels: int, *, from_end: bool = False
) -> Tensor:
    """The first (or last) `frames` frames of a video file, `interval` apart, as `read_images` returns them.

    Raises UsageError that names the file for one that is missing, no video, or too short.
    """
    span = (frames - 1) * interval + 1
    try:
        count = frame_table(Path(path)).count
        if count < span:
            raise VideoError(f"too short: {count} frames, wanted {span}")
        start = count - span if from_end else 0
        images = read_frames(Path(path), range(start, start + span, interval))
    except VideoError as error:
        raise UsageError(f"{path}: {error}") from error
    return _to_channels(to_clip(images, size), channels)


def _read_image(path: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # convert would clamp, not scale
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except UnidentifiedImageError as error:
        raise UsageError(f"{path} is not an image") from error
    except OSError as error:
        raise UsageError(f"cannot read the image {path}: {error.strerror or error}") from error


def _to_channels(clip: Tensor, channels: int) -> Tensor:
    """(F, 3, H, W) as it is, or as one channel of luma (ITU-R BT.601)."""
    if channels == 3:
        return clip
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (clip * weights).sum(1, keepdim=True)

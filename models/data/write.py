"""Clips to files: MP4, GIF, and a contact sheet of many clips as one PNG."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.data.frames import to_uint8

_GAP = 4  # pixels between frames of a contact sheet
_TEXT = 12  # font size in pixels
_PAPER, _INK, _MARK = (255, 255, 255), (40, 40, 40), (230, 110, 0)


def write_mp4(path: str | Path, clip: Tensor, *, fps: int = 8, zoom: int = 1) -> None:
    """Write a clip (F, C, H, W), floats in [-1, 1], C = 1 or 3, as an MP4: H.264 where PyAV carries it, else MPEG-4.

    `zoom` repeats each pixel. An odd height or width gains a copy of its last line, as 4:2:0 video has even sides.
    """
    frames = _images(clip, zoom)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    h264 = "libx264" in av.codecs_available
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264" if h264 else "mpeg4", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"} if h264 else {"qscale": "2"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())


def write_gif(path: str | Path, clip: Tensor, *, fps: int = 8, zoom: int = 1) -> None:
    """Write a clip (F, C, H, W), floats in [-1, 1], as an endless GIF; one palette for all frames, so no flicker."""
    frames = [Image.fromarray(image) for image in _images(clip, zoom)]
    palette = Image.fromarray(np.concatenate(_images(clip, 1))).quantize(256, Image.Quantize.MEDIANCUT)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    first.save(path, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def contact_sheet(
    path: str | Path,
    clips: Sequence[Tensor],
    *,
    captions: Sequence[str] | None = None,
    held: Sequence[Tensor] | None = None,
    zoom: int = 1,
    columns: int = 16,
) -> None:
    """Write clips (F, C, H, W), floats in [-1, 1], as a PNG: a row for each clip, a column for each frame.

    All have one C, H, W; F may differ. A clip of more than `columns` frames shows that many, evenly spaced, first and
    last included. A row's caption stands above it. `held`: bool (F,) for each clip; its true frames get an orange
    border.
    Raises ValueError when there are no clips or the numbers of captions, marks and clips differ.
    """
    captions = [""] * len(clips) if captions is None else captions
    held = [torch.zeros(len(clip), dtype=torch.bool) for clip in clips] if held is None else held
    if not clips or not len(clips) == len(captions) == len(held):
        raise ValueError(f"got {len(clips)} clips, {len(captions)} captions, {len(held)} held; wanted as many of each")
    shown = [_spread(len(clip), columns) for clip in clips]
    height, width = (zoom * side for side in clips[0].shape[-2:])
    header = _TEXT + _GAP if any(captions) else 0
    row = header + height + 2 * _GAP
    sheet = Image.new("RGB", (max(map(len, shown)) * (width + _GAP) + _GAP, len(clips) * row), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    for line, (clip, caption, marks, indices) in enumerate(zip(clips, captions, held, shown, strict=True)):
        top = line * row + header + _GAP
        pen.text((_GAP, line * row + _GAP // 2), caption, _INK, font)
        for column, (index, image) in enumerate(zip(indices, _images(clip[indices], zoom), strict=True)):
            left = _GAP + column * (width + _GAP)
            if marks[index]:
                pen.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), _MARK)
            sheet.paste(Image.fromarray(image), (left, top))
    sheet.save(path, "PNG")


def _spread(length: int, most: int) -> list[int]:
    """At most `most` indices evenly spread over range(length)."""
    return np.linspace(0, length - 1, min(length, most)).round().astype(int).tolist()


def _images(clip: Tensor, zoom: int) -> np.ndarray:
    """uint8 (F, zoom * H, zoom * W, 3)."""
    if clip.ndim != 4 or clip.shape[1] not in (1, 3):
        raise ValueError(f"clip must be (F, C, H, W) with C = 1 or 3, got {tuple(clip.shape)}")
    pixels = to_uint8(clip.detach().cpu()).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return pixels.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()

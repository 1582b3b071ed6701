"""Small video files whose every frame shows its own number, for the tests of data and encoding."""

from pathlib import Path

import av
import numpy as np

BITS = 8


def write_numbered(
    path: Path,
    frames: int,
    *,
    first: int = 0,
    codec: str = "libx264",
    height: int = 48,
    width: int = 64,
    b_frames: int = 2,
    faststart: bool = False,
) -> Path:
    """A video whose frame i shows the number first + i as eight black or white bars, the highest bit on the left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, b_frames
        stream.options = {"sc_threshold": "0"} if codec == "libx264" else {}  # keyframes every 12 frames only
        for number in range(first, first + frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bars(number, height, width))))
        container.mux(stream.encode())
    return path


def bars(number: int, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3)."""
    bits = [number >> bit & 1 for bit in reversed(range(BITS))]
    return np.broadcast_to(
        np.repeat(np.uint8(255) * np.array(bits, np.uint8), width // BITS)[:, None], (height, width, 3)
    )


def shown(image: np.ndarray) -> int:
    """The number that an image of bars (..., W) shows, its pixels uint8 or floats in [-1, 1]."""
    columns = image.reshape(-1, image.shape[-1]).mean(0).reshape(BITS, -1).mean(1)
    grey = 127.5 if image.dtype == np.uint8 else 0
    return sum(int(value > grey) << bit for value, bit in zip(columns, reversed(range(BITS)), strict=True))

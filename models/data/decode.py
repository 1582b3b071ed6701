"""Frames of a video file by their number: a table of timestamps, then decoding from the nearest keyframe before."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np


class VideoError(ValueError):
    """A file gives no clip. The message is the reason in a few words, without the path."""


@dataclass(frozen=True)
class FrameTable:
    """Presentation timestamps of a video stream, in its time base and in the order of display.

    Frame i is the one shown at `pts[i]`. Keyframe j is shown at `key_pts[j]` and stored at `key_dts[j]`. A stream
    whose timestamps cannot be trusted has no pts: its frames are found by counting from the start.
    """

    count: int
    pts: np.ndarray | None
    key_pts: np.ndarray
    key_dts: np.ndarray


def frame_table(path: Path) -> FrameTable:
    """The table of a file, read from its packets without decoding, and kept for the last 4096 files.

    Raises VideoError when there is nothing to read: no video, no frames, a file cut off.
    """
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError as error:
        raise VideoError(f"cannot be read ({error.strerror})") from error
    return _frame_table(path, changed)


@lru_cache(maxsize=4096)
def _frame_table(path: Path, changed: int) -> FrameTable:
    with open_video(path) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_corrupt]
        if not packets:
            raise VideoError("no video frames")
        indexed = stream.frames if "mp4" in container.format.name else 0
        if len(packets) < indexed:
            raise VideoError(f"cut off: {len(packets)} of {indexed} frames are there")
        # AVI stores no display times, MPEG program streams not all: guessed when frames are reordered, or after a seek
        guessed = container.format.name == "mpeg" or (
            container.format.name == "avi" and stream.codec_context.has_b_frames
        )
    shown = [packet for packet in packets if not packet.is_discard]
    times = {packet.pts for packet in shown if packet.pts is not None}
    if guessed or len(times) < len(shown):
        return FrameTable(_count(path), None, np.empty(0), np.empty(0))
    keys = [(p.pts, p.pts if p.dts is None else p.dts) for p in packets if p.is_keyframe and p.pts is not None]
    keys.sort()
    key_pts, key_dts = np.array(keys, np.int64).reshape(-1, 2).T
    return FrameTable(len(shown), np.array(sorted(times), np.int64), key_pts, key_dts)


def decode(path: Path) -> Iterator[np.ndarray]:
    """Every frame of a file in the order of display, uint8 (H, W, 3)."""
    with open_video(path) as container:
        for frame in container.decode(video=0):
            yield _rgb(frame)


def read_frames(path: Path, numbers: Sequence[int]) -> list[np.ndarray]:
    """The frames with these ascending numbers, each uint8 (H, W, 3).

    Decodes only from the last keyframe at or before the first of them. Raises VideoError when one cannot be had.
    """
    table = frame_table(path)
    if not 0 <= numbers[0] <= numbers[-1] < table.count:
        raise VideoError(f"too short: {table.count} frames, wanted {numbers[0]} to {numbers[-1]}")
    with open_video(path) as container:
        if table.pts is None:
            found = _collect(enumerate(container.decode(video=0)), set(numbers), numbers[-1])
        else:
            wanted = table.pts[list(numbers)]
            found = _collect(frames_from(container, table, int(wanted[0])), set(wanted.tolist()), int(wanted[-1]))
            numbers = wanted.tolist()
    if len(found) < len(set(numbers)):
        raise VideoError("frames are missing from the stream")
    return [found[number] for number in numbers]


def frames_from(
    container: av.container.InputContainer, table: FrameTable, pts: int
) -> Iterator[tuple[int | None, av.VideoFrame]]:
    """(pts, frame) from the keyframe that `pts` needs; from the start where the container's index leads past it."""
    stream = container.streams.video[0]
    key = bisect_right(table.key_pts, pts) - 1
    # containers index by either time; the wrong one can lead to a neighbouring keyframe
    for time in (table.key_pts[key], table.key_dts[key]) if key > 0 else ():
        container.seek(int(time), stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and first.pts in table.key_pts[: key + 1]:
            yield first.pts, first
            yield from ((frame.pts, frame) for frame in frames)
            return
    if key > 0:
        container.seek(int(table.key_dts[0]), stream=stream)
    yield from ((frame.pts, frame) for frame in container.decode(stream))


def _collect(frames: Iterator[tuple[int | None, av.VideoFrame]], wanted: set[int], last: int) -> dict[int, np.ndarray]:
    found = {}
    for number, frame in frames:
        if number in wanted:
            found[number] = _rgb(frame)
        if number is None or number >= last:
            break
    return found


def _count(path: Path) -> int:
    with open_video(path) as container:
        return sum(1 for _ in container.decode(video=0))


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """The frame as uint8 (H, W, 3), turned upright as the file asks. Raises VideoError for a damaged one."""
    if frame.is_corrupt:
        raise VideoError("damaged frames")
    image = frame.reformat(format="rgb24", threads=1).to_ndarray()
    return np.rot90(image, frame.rotation // 90) if frame.rotation else image


@contextmanager
def open_video(path: Path) -> Iterator[av.container.InputContainer]:
    """A container with a video stream, decoded by one thread; what FFmpeg raises inside becomes a VideoError."""
    try:
        with av.open(str(path)) as container:
            # FFmpeg "plays" a text file as the output of a terminal
            if not container.streams.video or container.format.name == "tty":
                raise VideoError("not a video")
            container.streams.video[0].codec_context.thread_count = 1
            yield container
    except av.FFmpegError as error:
        raise VideoError(f"cannot be read ({error.strerror})") from error

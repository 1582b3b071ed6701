"""Clips from a folder or manifest of video files, decoded in the DataLoader's workers."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from models.data.decode import VideoError, frame_table, read_frames
from models.data.frames import to_clip
from models.data.listing import Video, list_videos, numbered_captions
from models.data.seeded import Sample, SeededDataset

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Report:
    """What a dataset has met so far: how many files it names, and those that gave no clip."""

    files: int
    unreadable: list[str]
    not_videos: list[str]

    def __str__(self) -> str:
        """One line."""
        counts = f"{len(self.unreadable)} unreadable, {len(self.not_videos)} not videos"
        return f"{self.files} video files, skipped: {counts}"


class VideoFolder(SeededDataset):
    """A clip of each video: {"video": float32 (F, 3, height, width) in [-1, 1], "label": int64}.

    A clip is `num_frames` frames, `frame_interval` apart, from a place drawn anew each epoch (or the manifest's
    `start`), resized until it covers `size` and cropped. With `use_image_num` > 0 that many single frames of videos
    drawn from the whole set follow the clip's along F, for image-video joint training, with "image_label" int64 (I,).
    Where the manifest has texts, `captions` are the distinct ones and "caption" int64 is the video's number there.

    A file that cannot give the clip is reported once, by whichever worker meets it first, and the next one that can
    takes its place; `report()` counts them over all workers. A sample is a function of (seed, epoch, index) alone.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        num_frames: int = 16,
        frame_interval: int = 1,
        size: int | tuple[int, int] = 256,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        use_image_num: int = 0,
        seed: int = 0,
    ) -> None:
        """`source`: see list_videos; `size`: (height, width) or the side of a square; `flip`: mirror half of the clips.

        Raises FileNotFoundError or ValueError for a source without videos and ValueError for a bad argument.
        """
        super().__init__(seed)
        for name, value in {"num_frames": num_frames, "frame_interval": frame_interval}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")
        self.num_frames, self.frame_interval, self.use_image_num = num_frames, frame_interval, use_image_num
        self.size = (size, size) if isinstance(size, int) else size
        self.crop, self.flip = crop, flip
        listing = list_videos(source)
        self.videos, self.classes, self._others = listing.videos, listing.classes, listing.others
        self._captions = numbered_captions(video.text for video in self.videos)
        self.captions = tuple(self._captions)
        self._unreadable = get_context("spawn").Array("b", len(self.videos))

    def __len__(self) -> int:
        """The number of video files, readable or not."""
        return len(self.videos)

    def report(self) -> Report:
        """The files skipped until now, by any worker."""
        unreadable = [video.name for position, video in enumerate(self.videos) if self._unreadable[position]]
        return Report(len(self.videos), unreadable, self._others)

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The clip of the first readable video from `index` on."""
        place, mirror, images = rng.random(), self.flip and bool(rng.integers(2)), self.use_image_num
        window = (rng.random(), rng.random()) if self.crop == "random" else (0.5, 0.5)
        picks, times = rng.integers(len(self), size=images), rng.random(images)

        video, frames = self._first_readable(index, partial(self._read_clip, place))
        clip = to_clip(frames, self.size, crop=window, mirror=mirror)
        sample = {"label": torch.tensor(video.label)}
        if self.captions:
            sample["caption"] = torch.tensor(self._captions[video.text])
        if images:
            stills = [
                self._first_readable(pick, partial(_read_still, time))
                for pick, time in zip(picks.tolist(), times.tolist(), strict=True)
            ]
            clip = torch.cat([clip, *(to_clip([frame], self.size, crop=window, mirror=mirror) for _, frame in stills)])
            sample["image_label"] = torch.tensor([video.label for video, _ in stills])
        return {"video": clip, **sample}

    def _read_clip(self, place: float, video: Video) -> list[np.ndarray]:
        span = (self.num_frames - 1) * self.frame_interval + 1
        count = frame_table(video.path).count
        start = int(place * max(count - span + 1, 1)) if video.start is None else video.start
        if start + span > count:
            raise VideoError(f"too short: {count} frames, a clip needs {start + span}")
        return read_frames(video.path, range(start, start + span, self.frame_interval))

    def _first_readable(self, index: int, read: Callable[[Video], _T]) -> tuple[Video, _T]:
        """The first video from `index` on, wrapping around, that `read` can read, and what it read."""
        for step in range(len(self)):
            position = (index + step) % len(self)
            try:
                return self.videos[position], read(self.videos[position])
            except VideoError as error:
                self._skip(position, error)
        raise VideoError(f"none of the {len(self)} video files gives a clip of {self.num_frames} frames")

    def _skip(self, position: int, reason: VideoError) -> None:
        with self._unreadable.get_lock():
            first = not self._unreadable[position]
            self._unreadable[position] = 1
        if first:
            _log.warning("%s: skipped: %s", self.videos[position].name, reason)


def _read_still(time: float, video: Video) -> np.ndarray:
    """The frame at the relative time `time` in [0, 1)."""
    return read_frames(video.path, [int(time * frame_table(video.path).count)])[0]

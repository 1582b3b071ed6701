"""Clips of fixed length, cut from video files one after the other."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from models.data.decode import VideoError, frame_table, read_frames
from models.data.frames import to_clip
from models.data.listing import Video, list_videos

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """Where a clip lies: its video, and the number of its first frame there."""

    video: Video
    start: int


class CutClips(Dataset[Tensor]):
    """Clips float32 (F, 3, height, width) in [-1, 1] cut from video files, in the order of names and of time.

    The clips of a video begin at its frames 0, stride, 2 stride, ... as long as a whole clip follows (a manifest's
    `start` means the one clip from there). A frame is resized until it covers `size` and cropped about its centre, as
    in training.
    """

    def __init__(
        self, source: str | Path, *, num_frames: int, frame_interval: int, stride: int, size: tuple[int, int] | None
    ) -> None:
        """`source`: see list_videos; `stride`: frames; `size`: (height, width), None for that of the first frame.

        Where a folder holds a video both as a GIF and in another form, as models.sample writes it, the GIF, whose
        colours are few, is left out. A file that cannot be read is told in the log and left out.

        Raises FileNotFoundError or ValueError for a source without a video that is long enough.
        """
        self.num_frames, self.frame_interval = num_frames, frame_interval
        span = (num_frames - 1) * frame_interval + 1
        videos = without_copies(list_videos(source).videos)
        self.cuts = [cut for video in videos for cut in _cuts(video, span, stride)]
        if not self.cuts:
            raise ValueError(f"no video in {source} has the {span} frames of a clip ({len(videos)} files)")
        self.size = size or self._frames(0)[0].shape[:2]

    def __len__(self) -> int:
        """The number of clips."""
        return len(self.cuts)

    def __getitem__(self, index: int) -> Tensor:
        """Clip `index`. Raises ValueError that names the file where its frames cannot be had."""
        return to_clip(self._frames(index), self.size)

    def name(self, index: int) -> str:
        """The video's name and the clip's first frame."""
        return f"{self.cuts[index].video.name}:{self.cuts[index].start}"

    def choose(self, count: int, seed: int) -> None:
        """Keep `count` clips, drawn without replacement by `seed`, in their order; all where there are fewer."""
        kept = np.random.default_rng(seed).permutation(len(self.cuts))[:count]
        self.cuts = [self.cuts[index] for index in sorted(kept.tolist())]

    def _frames(self, index: int) -> list[np.ndarray]:
        video, start = self.cuts[index].video, self.cuts[index].start
        step = self.frame_interval
        try:
            return read_frames(video.path, range(start, start + (self.num_frames - 1) * step + 1, step))
        except VideoError as error:
            raise ValueError(f"{video.path}: {error}") from error


def without_copies(videos: list[Video]) -> list[Video]:
    """The videos but for GIFs beside which a file of the same name has another suffix."""
    others = {video.path.with_suffix("") for video in videos if video.path.suffix.lower() != ".gif"}
    return [v for v in videos if v.path.suffix.lower() != ".gif" or v.path.with_suffix("") not in others]


def _cuts(video: Video, span: int, stride: int) -> list[Cut]:
    """The clips of a video, none for one that is unreadable or too short."""
    try:
        last = frame_table(video.path).count - span
    except VideoError as error:
        _log.warning("%s: skipped: %s", video.name, error)
        return []
    if video.start is not None:
        return [Cut(video, video.start)] if video.start <= last else []
    return [Cut(video, start) for start in range(0, last + 1, stride)]

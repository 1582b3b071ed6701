"""Videos to clips with their motion: `python -m models.flow --videos FOLDER --out FOLDER`.

For every clip of every video, optical flow from its first frame to each and which points that frame shows, stored with
the clip in the folder `out`, which models.data.MotionDataset reads. Writes check.png there, and prints how close the
first frame comes to the others when the flow warps it. A run that was killed goes on with the clips that are not yet in
the index when the same command is given again; labels and texts of those that are become what the manifest now says.
With `--poses FOLDER` each clip's pose pictures are stored beside it, cut out of a video that shows them.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from models.autoencoder import downsampling, load_autoencoder, posterior, scaling
from models.command_line import UsageError, check_range, one_line_errors, parse
from models.data.decode import VideoError, frame_table, read_frames
from models.data.frames import to_clip, to_float, to_uint8
from models.data.listing import Video, list_videos
from models.data.motion import Check, MotionEntry, MotionIndex, read_motion_index, read_tensors
from models.data.shards import ShardWriter, relabelled, resume
from models.data.write import contact_sheet
from models.digest import sha256_of
from models.motion.colour_wheel import colour_wheel
from models.motion.extract import Extractor, clip_motion, load_extractor
from models.motion.warp import warp
from models.training.checkpointing import atomic_file
from models.training.distributed import pick_device

PROG = "python -m models.flow"
CHECK = "check.png"
SHEET_COLUMNS = 8
_SAME = ("extractor", "num_frames", "frame_interval", "stride", "size", "vae_sha256", "poses", "classes")  # of a folder
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlowConfig:
    """What to take motion from, by what, and where to."""

    videos: Path
    """Folder of videos (its sub-folders are the classes), manifest (.csv, .txt, .jsonl), or one video."""
    out: Path
    """Folder of the clips and their motion."""
    num_frames: int = 16
    """Frames of a clip."""
    frame_interval: int = 1
    """Frames of the video from one frame of a clip to the next."""
    stride: int = 16
    """Frames of the video from the start of a clip to the start of the next; a manifest's `start` makes one clip."""
    size: int = 128
    """Height and width of the frames in pixels: resized until they cover the square, then cropped at the centre."""
    extractor: Literal["dis", "raft"] = "dis"
    """Dense inverse search by OpenCV, or RAFT by torchvision."""
    raft: Path | None = None
    """RAFT's weights: a file of torchvision's model zoo, raft_large_*.pth or raft_small_*.pth."""
    vae: str | None = None
    """AutoencoderKL whose latents are stored too: local folder of it or of a pipeline, or owner/name[/subfolder]."""
    poses: Path | None = None
    """Folder of videos of drawn poses, such as OpenPose's or DWPose's pictures, stored too: for each of `videos` one of
    the same name but for the suffix, with as many frames of the same shape."""
    workers: int = 2
    """Processes that decode videos; 0 decodes in the main process."""
    shard_mib: float = 256
    """Size in MiB from which a shard is written; a killed run loses at most one shard's work."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where RAFT and the autoencoder run."""


def extract(config: FlowConfig) -> MotionIndex:
    """Store the motion that is not stored yet, print a summary and the check, and return the index of all there is.

    Raises UsageError where the options do not fit each other or what `out` holds, ValueError or OSError where videos,
    extractor or autoencoder cannot be had or a shard cannot be written; what was written stays valid.
    """
    for name, least in {
        "num_frames": 2,
        "frame_interval": 1,
        "stride": 1,
        "size": 16,
        "workers": 0,
        "shard_mib": 0,
    }.items():
        check_range(name, getattr(config, name), least)
    device = pick_device(config.device)
    listing = list_videos(config.videos)
    poses = None if config.poses is None else list_poses(config.poses)
    extractor = load_extractor(config.extractor, config.raft, device)
    vae = None if config.vae is None else load_autoencoder(config.vae, device=device)
    if vae is not None and config.size % downsampling(vae):
        raise UsageError(f"--size wants a multiple of the autoencoder's {downsampling(vae)}, got {config.size}")
    index = resume(config.out, _new_index(config, extractor, vae, listing.classes), read_motion_index, _SAME, "motion")
    videos = list({(video.name, video.start): video for video in listing.videos}.values())
    index = relabelled(config.out, index, _lines(videos))
    writer = ShardWriter(config.out, "motion", index, config.shard_mib * 2**20)
    done = {(entry.name, entry.start) for entry in index.entries}
    loader = DataLoader(_Clips(videos, poses, config, frozenset(done)), batch_size=None, num_workers=config.workers)

    skipped = 0
    with logging_redirect_tqdm(), tqdm(total=len(videos), unit="video") as progress:
        for found in loader:
            video = videos[found.video]
            if found.clip is None:
                if found.error:
                    skipped += 1
                    _log.warning("%s: skipped: %s", video.name, found.error)
                progress.update()
            elif (video.name, found.start) not in done:  # a manifest may name a clip twice
                done.add((video.name, found.start))
                writer.add([_measured(video, found.start, found.clip, found.pose, extractor, vae)])
                progress.set_postfix(clips=len(done))
    writer.flush()
    print(
        f"{len(done)} clips of {len({entry.name for entry in writer.index.entries})} videos in {config.out}; "
        f"skipped: {skipped} unreadable, {len(listing.others)} not videos"
    )
    if not done:
        raise ValueError(
            f"none of the {len(videos)} videos in {config.videos} gives a clip of {config.num_frames} frames"
        )
    print(summary(writer.index.entries))
    write_sheet(config.out, writer.index)
    return writer.index


def list_poses(source: Path) -> dict[Path, Path]:
    """The videos of poses in a folder, by their names there without the suffix.

    Raises FileNotFoundError or ValueError where there are none, UsageError where two have the same name.
    """
    found: dict[Path, Path] = {}
    for pose in list_videos(source).videos:
        name = Path(pose.name).with_suffix("")
        if name in found:
            raise UsageError(f"--poses {source} wants one video {name}, got {found[name].name} and {pose.path.name}")
        found[name] = pose.path
    return found


def _lines(videos: Sequence[Video]) -> Callable[[MotionEntry], Video | None]:
    """Where a clip comes from in a list: the earlier of a line of its start and one of any, as in extracting."""
    places = {(video.name, video.start): place for place, video in enumerate(videos)}

    def line(entry: MotionEntry) -> Video | None:
        found = [places[key] for key in ((entry.name, entry.start), (entry.name, None)) if key in places]
        return videos[min(found)] if found else None

    return line


def summary(entries: Sequence[MotionEntry]) -> str:
    """The check as a Markdown table: the mean of all clips, and the clips that warping brings nearest the least."""
    checks = [entry.check for entry in entries]
    mean = Check(*(sum(getattr(c, f.name) for c in checks) / len(checks) for f in fields(Check)))
    rows = {f"mean of {len(checks)} clips": mean}
    for where, ratio in (
        ("", lambda c: _ratio(c.warped, c.still)),
        (" where visible", lambda c: _ratio(c.warped_visible, c.still_visible)),
    ):
        worst = max(entries, key=lambda entry: ratio(entry.check))
        rows[f"worst{where}: {worst.name}, frame {worst.start}"] = worst.check
    lines = [
        "| difference to frame i, of 255 | first frame | warped | first, visible | warped, visible | visible |",
        "|---|---|---|---|---|---|",
    ]
    for name, c in rows.items():
        values = " | ".join(f"{v:.2f}" for v in (c.still, c.warped, c.still_visible, c.warped_visible))
        lines.append(f"| {name} | {values} | {c.visible:.0%} |")
    nearer = sum(c.warped < c.still for c in checks), sum(c.warped_visible < c.still_visible for c in checks)
    return "\n".join([*lines, f"warping is nearer in {nearer[0]} of {len(checks)} clips, where visible in {nearer[1]}"])


def write_sheet(folder: Path, index: MotionIndex) -> None:
    """Write check.png: frames, the first warped to each, the flow's colours and the occlusion map, of up to 3 clips."""
    captions, rows, count = list[str](), list[Tensor](), len(index.entries)
    for number in sorted({0, count // 2, count - 1}):
        entry, stored = index.entries[number], read_tensors(folder, index, number)
        clip, flow = to_float(stored["video"]), stored["flow"].float()
        rows += [clip, warp(clip[0], flow), colour_wheel(flow), to_float(stored["occlusion"]).expand_as(clip)]
        captions += [
            f"{entry.name}, from frame {entry.start}",
            "its first frame, warped",
            f"flow to the first frame, full colour at {flow.norm(dim=1).max():.1f} pixels",
            "white where the first frame shows the point",
        ]
        if "pose" in stored:
            rows.append(to_float(stored["pose"]))
            captions.append("its pose")
    with atomic_file(folder / CHECK) as temporary:
        contact_sheet(temporary, rows, captions=captions, columns=SHEET_COLUMNS)


class _Found(NamedTuple):
    """A clip uint8 (F, 3, H, W) of a video, by number, from frame `start`; None at the video's end, or at an error.

    `pose`, of the clip's shape, is its pose pictures where they are stored.
    """

    video: int
    start: int
    clip: Tensor | None = None
    pose: Tensor | None = None
    error: str = ""


class _Clips(IterableDataset[_Found]):
    """The clips of all videos but those in `done`, (name, start). Worker w of W reads videos w, w + W, ...

    `poses`: see `list_poses`; None is without poses.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        poses: Mapping[Path, Path] | None,
        config: FlowConfig,
        done: frozenset[tuple[str, int]],
    ) -> None:
        self.videos, self.poses, self.config, self.done = videos, poses, config, done

    def __iter__(self) -> Iterator[_Found]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.videos), step):
            error = ""
            try:
                for start in self._starts(self.videos[number]):
                    yield _Found(number, start, *self._read(self.videos[number], start))
            except VideoError as reason:
                error = str(reason)
            yield _Found(number, 0, error=error)

    def _starts(self, video: Video) -> list[int]:
        """Where the video's clips start that are not done yet; VideoError where it is too short, or without poses."""
        count, first = frame_table(video.path).count, video.start or 0
        last = count - self._span
        if first > last:
            raise VideoError(f"too short: {count} frames, a clip needs {first + self._span}")
        pose = self._pose(video)
        if pose is not None:
            with _telling_of_poses():
                drawn = frame_table(pose).count
                if drawn != count:
                    raise VideoError(f"{drawn} frames, not {count}")
        starts = range(0, last + 1, self.config.stride) if video.start is None else [first]
        return [start for start in starts if (video.name, start) not in self.done]

    def _pose(self, video: Video) -> Path | None:
        """The video of its poses, None where none are asked for; VideoError where it has none."""
        if self.poses is None:
            return None
        name = Path(video.name).with_suffix("")
        if name not in self.poses:
            raise VideoError(f"no pose video {name} in {self.config.poses}")
        return self.poses[name]

    def _read(self, video: Video, start: int) -> tuple[Tensor, Tensor | None]:
        """The clip and its pose pictures, both resized and cropped alike."""
        numbers, pose = range(start, start + self._span, self.config.frame_interval), self._pose(video)
        frames = read_frames(video.path, numbers)
        if pose is None:
            return self._fit(frames), None
        with _telling_of_poses():
            pictures = read_frames(pose, numbers)
            (height, width), (drawn_height, drawn_width) = frames[0].shape[:2], pictures[0].shape[:2]
            if abs(drawn_height * width - height * drawn_width) > width:  # a pixel of the pose picture
                raise VideoError(f"{drawn_width} x {drawn_height} pixels, not of the shape of {width} x {height}")
        return self._fit(frames), self._fit(pictures)

    def _fit(self, frames: Sequence[np.ndarray]) -> Tensor:
        return to_uint8(to_clip(frames, (self.config.size, self.config.size)))

    @property
    def _span(self) -> int:
        return (self.config.num_frames - 1) * self.config.frame_interval + 1


@contextmanager
def _telling_of_poses() -> Iterator[None]:
    """Say of a VideoError that it is the pose video's, since reports name the video."""
    try:
        yield
    except VideoError as error:
        raise VideoError(f"its pose video: {error}") from error


def _measured(
    video: Video, start: int, clip: Tensor, pose: Tensor | None, extractor: Extractor, vae: AutoencoderKL | None
) -> tuple[MotionEntry, dict[str, Tensor]]:
    """The entry of a clip uint8 (F, 3, H, W) with its pose pictures, and what is stored of it."""
    flow, occlusion = clip_motion(clip, extractor)
    flow = flow.half()
    stored = {"video": clip, "flow": flow, "occlusion": (occlusion * 255).round().to(torch.uint8)}
    if pose is not None:
        stored["pose"] = pose
    if vae is not None:
        mean, std = posterior(vae, to_float(clip))
        stored |= {"mean": mean.cpu(), "std": std.cpu()}
    return MotionEntry(video.name, start, video.label, video.text, "", check(clip, flow.float(), occlusion)), stored


def check(clip: Tensor, flow: Tensor, occlusion: Tensor) -> Check:
    """How near frame 0 of a clip uint8 (F, 3, H, W) comes to the others by its flow (F, 2, H, W)."""
    pixels, visible = clip.float(), occlusion[1:, 0]
    still = (pixels[:1] - pixels[1:]).abs().mean(1)
    warped = (warp(pixels[0], flow[1:]) - pixels[1:]).abs().mean(1)
    shown = visible.sum().clamp_min(1)
    return Check(
        still=float(still.mean()),
        warped=float(warped.mean()),
        still_visible=float((still * visible).sum() / shown),
        warped_visible=float((warped * visible).sum() / shown),
        visible=float(visible.mean()),
    )


def _ratio(warped: float, still: float) -> float:
    return warped / still if still else float(warped > 0)


def _new_index(config: FlowConfig, extractor: Extractor, vae: AutoencoderKL | None, classes: list[str]) -> MotionIndex:
    scale, shift = (1.0, 0.0) if vae is None else scaling(vae)
    return MotionIndex(
        extractor=extractor.identity,
        num_frames=config.num_frames,
        frame_interval=config.frame_interval,
        stride=config.stride,
        size=(config.size, config.size),
        vae=config.vae,
        vae_sha256=None if vae is None else sha256_of(vae.state_dict()),
        scaling_factor=scale,
        shift_factor=shift,
        classes=classes,
        poses=config.poses is not None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    logging.basicConfig(format="%(message)s")
    with one_line_errors(PROG):
        extract(parse(FlowConfig, sys.argv[1:] if argv is None else argv, PROG))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draws clips from a checkpoint.

    python -m models.sample --checkpoint outputs/train --task image-to-video --image a.png

Writes clip_000.mp4 and clip_000.gif, ... and sheet.png, a row for each clip with the given frames marked, to `--out`.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from models.command_line import LARGEST_SEED, UsageError, check_range, one_line_errors, parse
from models.config import TrainConfig
from models.data import contact_sheet, write_gif, write_mp4
from models.latte import LatteConfig
from models.networks import noise_options
from models.sampling.codec import make_codec
from models.sampling.draw import draw_clips, sampler_of
from models.sampling.given import read_clip, read_images
from models.sampling.network import load_network
from models.training.distributed import pick_device
from vidkern.diffusion import TASKS, Task, given_frames, make_schedule, transition

PROG = "models.sample"


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Draw clips from a checkpoint. Frames that a task is given come from --image, --frames or --clip."""

    checkpoint: str
    """A run's folder, a checkpoint (.pt) or exported weights (.safetensors)."""
    task: Literal[
        "standard",
        "image-to-video",
        "interpolation",
        "long-video",
        "given-frames",
        "transition",
        "next-frame",
        "progressive",
    ] = "standard"
    """Which frames are given: none; the first; first and last; the end of the window before; --given; the end of one
    clip and the start of another; all but the last; the first, with noise growing along the clip."""
    out: str = "outputs/samples"
    """Folder of the results."""
    image: str | None = None
    """An image file: the one given frame."""
    frames: tuple[str, ...] = ()
    """Image files: the given frames in the order of time."""
    clip: tuple[str, ...] = ()
    """A video file that has the given frames at their places; two for a transition."""
    given: tuple[int, ...] = ()
    """Numbers of the given frames, from 0, for given-frames."""
    overlap: int = 0
    """Frames that each window of a long video takes from the one before; 0: half of a window."""
    chunks: int = 15
    """Windows of a long video; 15 of 16 frames with 8 in common are 128 frames."""
    ends: int = 0
    """Frames that a transition is given at each end; 0: a quarter of a window."""
    num_clips: int = 4
    """Clips to draw."""
    batch_size: int = 4
    """Clips drawn at once."""
    seed: int = 0
    """Seed of the noise: clip i of a seed is the same for every batch size."""
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of every clip. None: the classes in turn."""
    cfg_scale: float | None = None
    """Scale of classifier-free guidance; None: no guidance."""
    sampler: Literal["auto", "ddim", "ddpm", "flow"] = "auto"
    """"auto" is flow for a flow schedule, else ddim."""
    steps: int = 50
    """Steps of the sampler."""
    eta: float = 0.0
    """Noise of DDIM, from 0 to 1."""
    frame_init: float | None = None
    """FrameInit (ConsistI2V): start from noise with the layout of the given first frame, taken at this share of the
    schedule, 0.85 in the paper; less holds the layout more. None: from noise alone."""
    weights: Literal["ema", "model"] | None = None
    """Averaged ("ema") or last ("model") weights; None: averaged ones if the file has them."""
    config: str | None = None
    """YAML file of the training configuration, for weights that do not carry one."""
    vae: str | None = None
    """AutoencoderKL (local folder or hub name) of a latent model. None: the one that encoded its data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to draw."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast."""
    graph: bool = False
    """On a GPU, replay each step of the sampler as one CUDA graph: the same clips, sooner for small networks."""
    fps: int = 8
    """Frames a second of the files."""
    zoom: int = 1
    """Each pixel becomes a square of this side."""


def task_pattern(options: SampleConfig) -> Task:
    """The timestep pattern of a window, with the options of `--task`."""
    if options.task == "given-frames":
        if not options.given:
            raise UsageError("--task given-frames wants --given with the numbers of the given frames")
        return functools.partial(given_frames, index=options.given)
    if options.task == "transition":
        return functools.partial(transition, first=options.ends, last=options.ends)
    return TASKS["standard" if options.task == "long-video" else options.task]


def given_places(options: SampleConfig, task: Task, frames: int) -> Tensor:
    """Which of the first window's frames are given, bool (F,). A long video may go on from a whole window."""
    if options.task == "long-video":
        return torch.full((frames,), bool(options.clip))
    return task(torch.zeros(1, dtype=torch.int64), frames)[1][0]


def given_clip(
    options: SampleConfig, hold: Tensor, interval: int, size: tuple[int, int], channels: int
) -> Tensor | None:
    """The frames that the task is given, at their places in a clip (F, C, height, width) that is 0 elsewhere.

    `hold` (F,) is true where a frame is given. Raises UsageError where the options do not name just these frames.
    """
    frames, places = len(hold), hold.nonzero()[:, 0].tolist()
    images = [options.image] if options.image is not None else list(options.frames)
    wanted = f"--task {options.task} is given {len(places)} of {frames} frames"
    if not places and not images and not options.clip:
        return None
    if not places:
        raise UsageError(f"{wanted}: it takes no --image, --frames or --clip")
    known = torch.zeros(frames, channels, *size)
    if images and not options.clip:
        if len(images) != len(places):
            raise UsageError(f"{wanted}, got {len(images)} image files")
        known[places] = read_images(images, size, channels)
    elif len(options.clip) == 2 and options.task == "transition" and not images:
        ends = options.ends
        known[:ends] = read_clip(options.clip[0], ends, interval, size, channels, from_end=True)
        known[-ends:] = read_clip(options.clip[1], ends, interval, size, channels)
    elif len(options.clip) == 1 and options.task != "transition" and not images:
        clip = read_clip(options.clip[0], places[-1] + 1, interval, size, channels)
        known[places] = clip[places]
    else:
        video = "--clip with 2 videos" if options.task == "transition" else "--clip with 1 video"
        raise UsageError(f"{wanted}: give --image or --frames with {len(places)} images, or {video}")
    return known


def completed(options: SampleConfig, config: TrainConfig) -> SampleConfig:
    """The options with the numbers that follow from the network filled in.

    Raises UsageError for a number that does not fit.
    """
    frames = config.model.num_frames
    options = dataclasses.replace(
        options,
        overlap=options.overlap or max(frames // 2, 1),
        ends=options.ends or max(frames // 4, 1),
    )
    limits: dict[str, float] = {"steps": config.diffusion.num_steps}
    if options.task == "long-video":
        limits["overlap"] = frames - 1
    if options.task == "transition":
        limits["ends"] = (frames - 1) // 2
    for name in ("num_clips", "batch_size", "steps", "chunks", "overlap", "ends", "fps", "zoom"):
        check_range(name, getattr(options, name), 1, limits.get(name, math.inf))
    check_range("seed", options.seed, 0, LARGEST_SEED)
    check_range("eta", options.eta, 0, 1)
    if options.frame_init is not None:
        check_range("frame_init", options.frame_init, 0.001, 1)
    return options


def labels_of(options: SampleConfig, config: LatteConfig) -> Tensor | None:
    """The class of every clip, (num_clips,), or None for an unconditional network."""
    if config.num_classes is None:
        if options.label is not None or options.cfg_scale is not None:
            raise UsageError("this network has no classes: it takes no --class and no --cfg_scale")
        return None
    if options.label is None:
        return torch.arange(options.num_clips) % config.num_classes
    if not 0 <= options.label < config.num_classes:
        raise UsageError(f"--class wants a number from 0 to {config.num_classes - 1}, got {options.label}")
    return torch.full((options.num_clips,), options.label)


def make_folder(path: str) -> None:
    """Make a folder and its parents. Raises UsageError that names --out where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror}") from error


def write_results(options: SampleConfig, clips: Sequence[Tensor], hold: Tensor, labels: Tensor | None) -> None:
    """Write every clip, pixels (F, C, H, W), as MP4 and GIF, and the contact sheet."""
    out = Path(options.out)
    for i, clip in enumerate(clips):
        write_mp4(out / f"clip_{i:03d}.mp4", clip, fps=options.fps, zoom=options.zoom)
        write_gif(out / f"clip_{i:03d}.gif", clip, fps=options.fps, zoom=options.zoom)
    classes = [""] * len(clips) if labels is None else [f", class {label}" for label in labels.tolist()]
    marks = torch.zeros(len(clips[0]), dtype=torch.bool)
    marks[: len(hold)] = hold
    contact_sheet(
        out / "sheet.png",
        clips,
        captions=[f"{options.task}{label}" for label in classes],
        held=[marks] * len(clips),
        zoom=options.zoom,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a mistake of the caller is one line and status 2."""
    with one_line_errors(PROG):
        options = parse(SampleConfig, sys.argv[1:] if argv is None else argv, f"python -m {PROG}")
        device = pick_device(options.device)
        network, config = load_network(options.checkpoint, options.weights, options.config)
        options = completed(options, config)
        codec = make_codec(config, options.vae, device)
        labels = labels_of(options, config.model)
        task = task_pattern(options)
        hold = given_places(options, task, config.model.num_frames)
        if options.frame_init is not None and (options.task in ("long-video", "progressive") or not hold[0]):
            raise UsageError(f"--frame_init wants a task that is given the first frame, got --task {options.task}")
        given = given_clip(options, hold, config.data.frame_interval, codec.frame_size, codec.channels)
        known = None if given is None else codec.encode(given)
        make_folder(options.out)  # before the drawing, so that a bad name costs no clips
        clips = draw_clips(
            network.to(device),
            make_schedule(config.diffusion.schedule, config.diffusion.num_steps, device),
            options.num_clips,
            batch_size=options.batch_size,
            seed=options.seed,
            num_steps=options.steps,
            labels=labels,
            known=known,
            chunks=options.chunks if options.task == "long-video" else 1,
            overlap=options.overlap,
            precision=options.precision,
            graph=options.graph,
            progress=True,
            task=task,
            frame_init=options.frame_init,
            cfg_scale=options.cfg_scale,
            eta=options.eta,
            variance="learned_range" if config.model.learn_sigma else "fixed_small",
            sampler=options.sampler if options.sampler != "auto" else sampler_of(config),
            prediction=config.diffusion.prediction,
            **noise_options(config, device),
        )
        write_results(options, [codec.decode(clip) for clip in clips], hold, labels)
    print(f"{PROG}: wrote {options.num_clips} clips and sheet.png to {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

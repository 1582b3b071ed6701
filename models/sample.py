"""Draws clips from a checkpoint.

    python -m models.sample --checkpoint outputs/train --task image-to-video --image a.png
    python -m models.sample --checkpoint outputs/s2dm --motion_checkpoint outputs/vdm --task text-to-video --text "..."

Writes clip_000.mp4 and clip_000.gif, ... and sheet.png, a row for each clip with the given frames marked, to `--out`.
The tasks of motion (text-to-video, motion-transfer) have rows for its first frame, flow and occlusion too.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.command_line import UsageError, one_line_errors, parse
from models.config import NetworkConfig
from models.data import contact_sheet, write_gif, write_mp4
from models.sampling.codec import make_codec
from models.sampling.draw import check_finite, draw_clips, process_of, sampler_of
from models.sampling.given import read_clip, read_images
from models.sampling.network import load_network
from models.sampling.options import MOTION_TASKS, SampleConfig, completed, make_folder, refuse_idle_options, scales_of
from models.sampling.text import text_condition
from models.training.checkpointing import atomic_file
from models.training.distributed import pick_device
from vidkern.diffusion import TASKS, Task, given_frames, make_schedule, transition

PROG = "models.sample"


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


def labels_of(options: SampleConfig, config: NetworkConfig) -> Tensor | None:
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


def refuse_mixture(options: SampleConfig) -> None:
    """Raise UsageError where --out holds clips of an earlier run that this one does not write again."""
    kept = {path.name for path in Path(options.out).glob("clip_*.mp4")}
    others = sorted(kept - {f"{name}.mp4" for name in clip_names(options.num_clips)})
    if others:
        raise UsageError(
            f"--out {options.out} holds {len(others)} clips of another run ({others[0]}), which would stand among the "
            f"{options.num_clips} of this one: choose another folder"
        )


def clip_names(count: int) -> list[str]:
    """The names of files of clips, in whose order they sort."""
    digits = max(3, len(str(count - 1)))
    return [f"clip_{i:0{digits}d}" for i in range(count)]


def write_clips(options: SampleConfig, clips: Sequence[Tensor]) -> None:
    """Write every clip, pixels (F, C, H, W), as MP4 and GIF."""
    for name, clip in zip(clip_names(len(clips)), clips, strict=True):
        for suffix, write in ((".mp4", write_mp4), (".gif", write_gif)):
            with atomic_file(Path(options.out) / f"{name}{suffix}") as temporary:
                write(temporary, clip, fps=options.fps, zoom=options.zoom)


def write_sheet(options: SampleConfig, rows: Sequence[Tensor], captions: list[str], held: list[Tensor]) -> None:
    """Write the contact sheet of rows (F, C, H, W)."""
    with atomic_file(Path(options.out) / "sheet.png") as temporary:
        contact_sheet(temporary, rows, captions=captions, held=held, zoom=options.zoom)


def write_results(options: SampleConfig, clips: Sequence[Tensor], hold: Tensor, labels: Tensor | None) -> None:
    """Write every clip and the contact sheet."""
    write_clips(options, clips)
    classes = [""] * len(clips) if labels is None else [f", class {label}" for label in labels.tolist()]
    marks = torch.zeros(len(clips[0]), dtype=torch.bool)
    marks[: len(hold)] = hold
    write_sheet(options, clips, [f"{options.task}{label}" for label in classes], [marks] * len(clips))


def draw_from_noise(options: SampleConfig, device: torch.device) -> None:
    """Draw and write the clips of a task whose frames come from noise and given frames."""
    network, config = load_network(options.checkpoint, options.weights, options.config)
    if config.network in ("s2dm", "vdm"):
        use = f"--task {' or '.join(MOTION_TASKS)}" if config.network == "s2dm" else "--motion_checkpoint"
        raise UsageError(f"--task {options.task} does not go with {config.network}, whose use is {use}")
    options = completed(options, config)
    codec = make_codec(config, options.vae, device)
    labels, scales = labels_of(options, config.network_config), scales_of(options, config.network_config)
    if options.text is not None and "text" not in config.network_config.conditions:
        raise UsageError("this network takes no text: it takes no --text")
    conditions = text_condition(options, config)
    task = task_pattern(options)
    hold = given_places(options, task, config.network_config.num_frames)
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
        conditions=conditions,
        scales=scales,
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
        sampler=options.sampler if options.sampler != "auto" else sampler_of(config),
        **process_of(config, device),
    )
    check_finite(clips)
    write_results(options, [codec.decode(clip) for clip in clips], hold, labels)


def draw_from_motion(options: SampleConfig, device: torch.device) -> None:
    """Draw and write the clips of a task that renders motion."""
    from models.sampling.motion_tasks import draw_with_motion, sheet_rows

    rendered = draw_with_motion(options, device)
    check_finite(rendered.clips)
    write_clips(options, list(rendered.clips))
    rows, captions, marks = sheet_rows(rendered, given=options.image is not None)
    write_sheet(options, rows, captions, marks)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a mistake of the caller is one line and status 2."""
    with one_line_errors(PROG):
        options = parse(SampleConfig, sys.argv[1:] if argv is None else argv, f"python -m {PROG}")
        refuse_idle_options(options)
        refuse_mixture(options)
        draw = draw_from_motion if options.task in MOTION_TASKS else draw_from_noise
        draw(options, pick_device(options.device))
    print(f"{PROG}: wrote {options.num_clips} clips and sheet.png to {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The options of models.sample."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from models.command_line import LARGEST_SEED, UsageError, check_finite_number, check_range
from models.config import NetworkConfig, TrainConfig

#: Tasks that render motion with S2DM.
MOTION_TASKS = ("text-to-video", "motion-transfer")

#: Options that one task alone has a use for.
TASK_OPTIONS = {
    "given": "given-frames",
    "overlap": "long-video",
    "chunks": "long-video",
    "ends": "transition",
    "motion_checkpoint": "text-to-video",
    "motion_cfg_text": "text-to-video",
    "motion_cfg_reference": "text-to-video",
    "motion_steps": "text-to-video",
    "extractor": "motion-transfer",
    "raft": "motion-transfer",
    "pose": "motion-transfer",
}


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Draw clips from a checkpoint. Frames that a task is given come from --image, --frames or --clip."""

    checkpoint: str
    """A run's folder, a checkpoint (.pt) or exported weights (.safetensors). The tasks of motion want one of S2DM."""
    task: Literal[
        "standard",
        "image-to-video",
        "interpolation",
        "long-video",
        "given-frames",
        "transition",
        "next-frame",
        "progressive",
        "text-to-video",
        "motion-transfer",
    ] = "standard"
    """Which frames are given: none; the first; first and last; the end of the window before; --given; the end of one
    clip and the start of another; all but the last; the first, with noise growing along the clip. With S2DM:
    text-to-video draws motion with --motion_checkpoint and renders it; motion-transfer renders the motion of --clip."""
    motion_checkpoint: str | None = None
    """The VDM that draws the motion of text-to-video, as --checkpoint."""
    text: str | None = None
    """What the clips show, for a network that takes text; "" is the null prompt."""
    out: str = "outputs/samples"
    """Folder of the results."""
    image: str | None = None
    """An image file: the one given frame. The tasks of motion draw a first frame of their own without it."""
    frames: tuple[str, ...] = ()
    """Image files: the given frames in the order of time."""
    clip: tuple[str, ...] = ()
    """A video file that has the given frames at their places; two for a transition; the motion to transfer."""
    pose: str | None = None
    """A video file of drawn poses, frame for frame with --clip, for a network that takes them."""
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
    """Scale of classifier-free guidance by the class; None: no guidance."""
    cfg_text: float | None = None
    """Scale of guidance by the text; None: no guidance."""
    cfg_image: float | None = None
    """Scale of guidance by the CLIP tokens of the first frame."""
    cfg_reference: float | None = None
    """Scale of guidance by the first frame."""
    cfg_motion: float | None = None
    """Scale of guidance by the motion."""
    cfg_pose: float | None = None
    """Scale of guidance by the pose."""
    motion_cfg_text: float | None = None
    """Scale of guidance by the text where --motion_checkpoint draws motion."""
    motion_cfg_reference: float | None = None
    """Scale of guidance by the first frame where --motion_checkpoint draws motion."""
    sampler: Literal["auto", "ddim", "ddpm", "flow"] = "auto"
    """"auto" is flow for a flow schedule, else ddim."""
    steps: int = 50
    """Steps of the sampler."""
    motion_steps: int | None = None
    """Steps of the sampler where --motion_checkpoint draws motion. None: --steps."""
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
    extractor: Literal["dis", "raft"] = "dis"
    """Optical flow of motion-transfer: OpenCV's DIS, or RAFT with --raft."""
    raft: str | None = None
    """File of RAFT's weights."""
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


def refuse_idle_options(options: SampleConfig) -> None:
    """Raise UsageError for an option that --task has no use for."""
    plain = SampleConfig("")
    for name, task in TASK_OPTIONS.items():
        if options.task != task and getattr(options, name) != getattr(plain, name):
            raise UsageError(f"--{name} is for --task {task}, got --task {options.task}")


def completed(options: SampleConfig, config: TrainConfig) -> SampleConfig:
    """The options with the numbers that follow from the network filled in.

    Raises UsageError for a number that does not fit.
    """
    frames = config.network_config.num_frames
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
    if options.cfg_scale is not None:
        check_finite_number("cfg_scale", options.cfg_scale)
    if options.frame_init is not None:
        check_range("frame_init", options.frame_init, 0.001, 1)
    return options


def scales_of(options: SampleConfig, network: NetworkConfig, prefix: str = "cfg_") -> dict[str, float]:
    """The scales of guidance that the options beginning with `prefix` give, by condition, in the network's order.

    Raises UsageError for one of a condition that the network does not take.
    """
    names = [field.name for field in dataclasses.fields(options) if field.name.startswith(prefix)]
    given = {name.removeprefix(prefix): getattr(options, name) for name in names if name != "cfg_scale"}
    given = {name: scale for name, scale in given.items() if scale is not None}
    for name in given:
        if name not in network.conditions:
            raise UsageError(f"--{prefix}{name}: the network takes no {name}")
        check_finite_number(f"{prefix}{name}", given[name])
    return {name: given[name] for name in network.conditions if name in given}


def make_folder(path: str) -> None:
    """Make a folder and its parents. Raises UsageError that names --out where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror}") from error

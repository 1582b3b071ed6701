"""The tasks of models.sample that render motion with S2DM: text-to-video and motion-transfer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.command_line import LARGEST_SEED, UsageError, check_range
from models.config import TrainConfig
from models.data.frames import to_uint8
from models.motion import from_network, to_network
from models.motion.colour_wheel import colour_wheel
from models.motion.extract import clip_motion, load_extractor
from models.networks import Network
from models.s2dm import POSE_CHANNELS
from models.sampling.codec import make_codec
from models.sampling.draw import sampler_of
from models.sampling.given import read_clip, read_images
from models.sampling.network import load_network
from models.sampling.options import SampleConfig, completed, make_folder, scales_of
from models.sampling.text import text_condition
from models.sampling.text_to_video import Stage, draw_first_frames, draw_motion, noise_of, render, resized
from vidkern.diffusion import image_to_video, make_schedule


class Rendered(NamedTuple):
    """What a task of motion drew, as pixels in [-1, 1]."""

    clips: Tensor  # (count, F, C, H, W)
    first: Tensor  # (count, C, H, W): the first frames, drawn or given
    motion: Tensor  # (count, F, 3, H, W)
    driving: Tensor | None  # (F, 3, H, W): the clip whose motion it is
    pose: Tensor | None  # (F, 3, H, W): the pictures of poses


def draw_with_motion(options: SampleConfig, device: torch.device) -> Rendered:
    """Draw the clips of --task text-to-video or motion-transfer. Raises ValueError or OSError in one line."""
    network, config = load_network(options.checkpoint, options.weights, options.config)
    _check(options, config)
    options = completed(options, config)
    renderer = _stage(network, config, options, device, scales_of(options, config.network_config))
    codec, texts = make_codec(config, options.vae, device), text_condition(options, config)
    size, count = codec.frame_size, options.num_clips
    artist, driving, pose, motion = None, None, None, torch.empty(0)
    if options.motion_checkpoint is not None:
        artist = _artist(options, device, (config.network_config.in_channels, codec.channels))
    else:
        window = (config.network_config.num_frames, config.data.frame_interval, size, 3)
        driving = read_clip(options.clip[0], *window)
        pose = None if options.pose is None else read_clip(options.pose, *window)
        extractor = load_extractor(options.extractor, options.raft, device)
        motion = to_network(*clip_motion(to_uint8(driving), extractor)).expand(count, -1, -1, -1, -1)
    _check_text(options, [stage.config for stage in (renderer, artist) if stage is not None])
    artist_texts = {} if artist is None else text_condition(options, artist.config)
    image = None
    if options.image is not None:
        image = codec.encode(read_images([options.image], size, codec.channels))
    make_folder(options.out)  # before the drawing, so that a bad name costs no clips

    poses = {} if pose is None else {"pose": pose.expand(count, -1, -1, -1, -1)}
    first_pose = {name: value[:, :1] for name, value in poses.items()}
    if image is None:
        first = draw_first_frames(renderer, texts | first_pose, count, size)
    else:
        first = image.expand(count, -1, -1, -1)
    pixels = codec.decode(first)
    conditions = texts | _of_first_frame(config, first, pixels, device)
    if artist is not None:
        motion = resized(draw_motion(artist, artist_texts | _reference(artist, first, pixels)), size)
    given = {} if image is None else _from_image(renderer, image, conditions | first_pose, size, motion.shape[1])
    clips = render(renderer, motion, conditions | poses, **given)
    return Rendered(torch.stack([codec.decode(clip) for clip in clips]), pixels, motion, driving, pose)


def _from_image(
    renderer: Stage, image: Tensor, conditions: dict[str, Tensor], size: tuple[int, int], frames: int
) -> dict[str, Any]:
    """Options of `render` for clips that begin with the image (1, C, H, W): its noise, and the frame itself, held."""
    one = {name: value[:1] for name, value in conditions.items()}
    noise = noise_of(renderer, image, one, size)
    known = torch.zeros(frames, *image.shape[1:])
    known[0] = image[0]
    return {"noise": noise, "task": image_to_video, "known": known}


def sheet_rows(rendered: Rendered, given: bool) -> tuple[list[Tensor], list[str], list[Tensor]]:
    """Rows (F, 3, H, W), captions and marks of the contact sheet: for each clip its first frame, motion and frames."""
    rows: dict[str, Tensor] = {}
    if rendered.driving is not None:
        rows["the driving clip"] = rendered.driving
    if rendered.pose is not None:
        rows["the pose"] = rendered.pose
    for i, (clip, motion) in enumerate(zip(rendered.clips, rendered.motion, strict=True)):
        flow, seen = from_network(motion)
        rows |= {
            f"{i}: first frame, {'given' if given else 'drawn'}": rendered.first[i : i + 1].expand(-1, 3, -1, -1),
            f"{i}: flow to the first frame, longest {flow.norm(dim=1).max():.1f} pixels": colour_wheel(flow),
            f"{i}: seen in the first frame (white)": (2 * seen - 1).expand(-1, 3, -1, -1),
            f"{i}: rendered": clip.expand(-1, 3, -1, -1),
        }
    marks = [torch.zeros(len(row), dtype=torch.bool) for row in rows.values()]
    for caption, mark in zip(rows, marks, strict=True):
        mark[0] = given and caption.endswith(("given", "rendered"))
    return list(rows.values()), list(rows), marks


def _check(options: SampleConfig, config: TrainConfig) -> None:
    """Refuse a network or options that the task has no use for."""
    task, conditions = f"--task {options.task}", config.network_config.conditions
    if config.network != "s2dm" or "motion" not in conditions:
        raise UsageError(f"{task} wants a --checkpoint of S2DM with motion, got one of {config.network}")
    drawn = options.task == "text-to-video"
    if "pose" in conditions and drawn:
        raise UsageError(f"{task}: {options.checkpoint} wants a pose, which no network draws: see motion-transfer")
    if ("pose" in conditions) != (options.pose is not None):
        wanted = "wants --pose with 1 video" if "pose" in conditions else "takes no --pose"
        raise UsageError(f"{task}: {options.checkpoint} {wanted}")
    if "pose" in conditions and config.s2dm.pose_channels != POSE_CHANNELS:
        raise UsageError(
            f"{task}: --pose has {POSE_CHANNELS} channels, {options.checkpoint} wants {config.s2dm.pose_channels}"
        )
    if drawn and options.motion_checkpoint is None:
        raise UsageError(f"{task} wants --motion_checkpoint with a VDM")
    if len(options.clip) != (0 if drawn else 1):
        raise UsageError(f"{task} wants {'no --clip' if drawn else '--clip with 1 video'}, got {len(options.clip)}")
    for name, unused in (("frames", ()), ("label", None), ("cfg_scale", None), ("frame_init", None)):
        if getattr(options, name) != unused:
            raise UsageError(f"{task} takes no --{'class' if name == 'label' else name}")
    if options.image is not None and (options.eta or options.sampler == "ddpm" or sampler_of(config) != "ddim"):
        raise UsageError(f"{task} --image inverts DDIM without noise: it wants --sampler ddim and --eta 0")


def _check_text(options: SampleConfig, configs: list[TrainConfig]) -> None:
    if options.text is not None and not any("text" in config.network_config.conditions for config in configs):
        raise UsageError(f"--text does not go with {' and '.join(config.network for config in configs)} without text")


def _artist(options: SampleConfig, device: torch.device, channels: tuple[int, int]) -> Stage:
    """Stage 1: the VDM of --motion_checkpoint, whose noise has nothing to do with that of stage 2.

    `channels`: those of a frame for S2DM and in pixels, of which the VDM's reference must have one.
    """
    assert options.motion_checkpoint is not None
    network, config = load_network(options.motion_checkpoint, options.weights)
    if config.network != "vdm":
        raise UsageError(f"--motion_checkpoint wants a VDM, got {config.network}")
    wanted = config.vdm.reference_channels
    if wanted not in (None, *channels):
        got = " or, as pixels, ".join(map(str, channels))
        raise UsageError(
            f"--motion_checkpoint wants first frames of {wanted} channels, those of --checkpoint have {got}"
        )
    scales = scales_of(options, config.network_config, "motion_cfg_")
    steps = options.steps if options.motion_steps is None else options.motion_steps
    check_range("motion_steps", steps, 1, config.diffusion.num_steps)
    return _stage(network, config, options, device, scales, num_steps=steps, seed=LARGEST_SEED - options.seed)


def _stage(
    network: Network,
    config: TrainConfig,
    options: SampleConfig,
    device: torch.device,
    scales: dict[str, float],
    **changed: Any,
) -> Stage:
    settings = {
        "batch_size": options.batch_size,
        "seed": options.seed,
        "num_steps": options.steps,
        "eta": options.eta,
        "sampler": options.sampler if options.sampler != "auto" else sampler_of(config),
        "precision": options.precision,
        "graph": options.graph,
        "progress": True,
    }
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.num_steps, device)
    return Stage(network.to(device), config, schedule, scales, settings | changed)


def _of_first_frame(config: TrainConfig, first: Tensor, pixels: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The conditions of S2DM that the first frame is: itself (count, C, H, W), and its CLIP tokens (count, L, W)."""
    conditions, wanted = {}, config.network_config.conditions
    if "image" in wanted:
        if config.data.image_encoder is None:
            raise UsageError("the configuration does not say what encoded its images: data.image_encoder is missing")
        from models.text.clip import load_clip_image  # transformers is slow to import

        conditions["image"] = load_clip_image(config.data.image_encoder, device).encode(pixels)
    if "reference" in wanted:
        conditions["reference"] = first
    return conditions


def _reference(artist: Stage, first: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """The VDM's reference frame (count, C, h, w): S2DM's own form of it, or its pixels, by the channels wanted."""
    channels = artist.config.vdm.reference_channels
    if channels is None:
        return {}
    return {"reference": first if first.shape[1] == channels else pixels}

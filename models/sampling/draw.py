"""Draws any number of clips in batches; a clip does not depend on how they are split."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from models import image_to_video
from models.config import TrainConfig
from models.networks import Network, noise_options
from models.sampling.guidance import guide
from vidkern import ops
from vidkern.diffusion import TASKS, Schedule, Task, sample, sample_long_video


def draw_clips(
    network: Network,
    schedule: Schedule,
    count: int,
    *,
    batch_size: int,
    seed: int,
    num_steps: int,
    task: Task = TASKS["standard"],
    labels: Tensor | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    scales: Mapping[str, float] | None = None,
    known: Tensor | None = None,
    start: Tensor | None = None,
    frame_init: float | None = None,
    frames: int | None = None,
    first: int = 0,
    chunks: int = 1,
    overlap: int = 0,
    precision: str = "float32",
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Draw `count` clips, float32 (count, F, C, H, W) on the CPU.

    Args:
        network: on the schedule's device.
        seed: of the noise. Clip i is the same for every `batch_size`, up to the rounding of the network.
        task: which frames are given; a long video has its own pattern.
        labels: (count,) int64, for a class-conditional network.
        conditions: (count, ...) each, by the names of the network's `forward`, for one without classes.
        scales: of guidance for these conditions, see `models.sampling.guidance.guide`.
        known: (count, F, C, H, W), whose given frames are read, or (F, C, H, W) for every clip; with `chunks` > 1,
            the first window.
        start: (count, F, C, H, W), the starting noise; None: it is drawn.
        frame_init: level of FrameInit, which gives drawn starting noise the layout of the first frame in `known`, see
            `models.image_to_video.frame_init`; None: without it. Not for a long video or a progressive task.
        frames: F, if not the network's.
        first: number of the first clip, where the clips of a seed are drawn in parts.
        chunks: windows of a long video, of which each is given the last `overlap` frames of the one before.
        precision: "bfloat16" runs the network under autocast.
        progress: show a bar of all steps.
        **options: of `vidkern.diffusion.sample`.
    """
    device, config = schedule.device, network.config
    shape = (frames or config.num_frames, config.in_channels, *config.frame_size)
    drawn = chunks - (1 if chunks > 1 and known is not None else 0)
    splits = torch.arange(count).split(batch_size)
    clips = []
    with (
        tqdm(total=len(splits) * num_steps * drawn, unit="step", disable=not progress, dynamic_ncols=True) as bar,
        _autocast(network, device, precision),
    ):
        for split in splits:
            part = {name: value[split].to(device) for name, value in (conditions or {}).items()}
            size = (len(split), *shape)
            window = None if known is None else (known[split] if known.dim() == 5 else known).to(device).expand(size)
            settings: dict[str, Any] = {
                "schedule": schedule,
                "key": torch.tensor([seed, 0], device=device),
                "num_steps": num_steps,
                "y": None if labels is None else labels[split].to(device),
                "y_null": config.num_classes,
                "sample_offset": first + int(split[0]),
                "progress": lambda *_: bar.update(),
                **options,
            }
            given = task(torch.zeros(1, dtype=torch.int64), shape[0])[1][0]
            if chunks == 1 or window is None:
                model = _model(network, given, part, scales)
                noise = size if start is None else start[split].to(device)
                if frame_init is not None and window is not None:
                    noise = _noise_like_first(window, frame_init, settings)
                window = sample(model, noise, **settings, task=task, known=window)
            if chunks > 1:
                model = _model(network, torch.arange(shape[0]) < overlap, part, scales)
                window = sample_long_video(model, size, **settings, chunks=chunks, given=overlap, first=window)
            clips.append(window.cpu())
    return torch.cat(clips)


@contextlib.contextmanager
def _autocast(network: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Run a network in `precision`, with its weights cast once for all steps.

    Autocast keeps the casts of weights that require a gradient only. Those of weights that do not, as of a network that
    was loaded to sample, it would make again in every step. FSDP2's weights are left alone: kept casts would be whole.
    """
    frozen = [p for p in network.parameters() if not p.requires_grad and p.is_floating_point()]
    kept = [] if precision == "float32" or isinstance(network, FSDPModule) else frozen
    try:
        for parameter in kept:
            parameter.requires_grad_(True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(False)


def _model(
    network: Network, given: Tensor, conditions: Mapping[str, Tensor], scales: Mapping[str, float] | None
) -> Callable[..., Tensor]:
    """The network as `sample` calls it, for windows of which the frames `given`, bool (F,), are given."""
    model: Callable[..., Tensor] = network
    if getattr(network.config, "image_condition", None) is not None:
        model = image_to_video.bind(network, given)
    return guide(model, conditions, scales or {}) if conditions else model


def _noise_like_first(window: Tensor, level: float, settings: Mapping[str, Any]) -> Tensor:
    """The noise that `sample` would draw, with the layout of the first frames of (B, F, C, H, W)."""
    names = ("sharing", "base_weight", "sample_offset")
    sharing = {name: settings[name] for name in names if name in settings}
    noise = ops.philox_normal(tuple(window.shape), settings["key"], dtype=torch.float32, **sharing)
    return image_to_video.frame_init(window[:, 0], noise, settings["schedule"], level=level)


def check_finite(clips: Tensor, first: int = 0) -> None:
    """Raise ValueError that names the clips (count, ...) which hold NaN or infinity; number `first` is the first."""
    broken = [first + i for i, clip in enumerate(clips) if not clip.isfinite().all()]
    if broken:
        numbers = ", ".join(map(str, broken[:6])) + (", ..." if len(broken) > 6 else "")
        raise ValueError(f"{len(broken)} of {len(clips)} clips hold NaN or infinity ({numbers}): nothing can be shown")


def process_of(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What `vidkern.diffusion.sample` must know of the process that a run learnt."""
    return {
        "prediction": config.diffusion.prediction,
        "variance": "learned_range" if config.network_config.learn_sigma else "fixed_small",
        "step_sharing": "shared" if config.diffusion.noise == "shared" else "independent",
        **noise_options(config, device),
    }


def sampler_of(config: TrainConfig) -> str:
    """The sampler that suits the schedule of a run."""
    return "flow" if config.diffusion.schedule == "flow" else "ddim"

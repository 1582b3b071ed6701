"""The configuration of a training run."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from models.command_line import LARGEST_SEED, UsageError, check_range, flatten, parse, read_yaml, to_dict
from models.latte import LatteConfig
from models.recompute import Recompute
from models.s2dm import POSE_CHANNELS, S2DMConfig
from models.vdm import VDMConfig

NetworkConfig = LatteConfig | S2DMConfig | VDMConfig

#: The part of a configuration that holds the sizes of each network.
SECTIONS = {"latte": "model", "s2dm": "s2dm", "vdm": "vdm", "videofusion": "model"}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the model learns from."""

    kind: Literal["digits", "videos", "latents", "motion"] = "digits"
    """Moving digits made on the fly, video files, latents written by models.encode, or clips with their motion written
    by models.flow. Digits have exact motion for a network that wants it."""
    path: str | None = None
    """Folder or manifest of videos, or folder of latents or of motion."""
    latents: bool = False
    """Train on the latents that models.flow stored beside the motion, not on the pixels."""
    least_visible: float = 0.0
    """Leave out stored clips whose first frame shows less than this share of the others: those across a cut."""
    size: int | None = None
    """Side of digits in pixels for a network of motion, whose own size is the motion's. None: the same."""
    text: str | None = None
    """What encodes captions for a network with text: "wordllama", or the local folder of a CLIP model."""
    image_encoder: str | None = None
    """Local folder of the CLIP model that encodes a clip's first frame for a network with image tokens."""
    frame_interval: int = 1
    """Frames from one frame of the clip to the next."""
    crop: Literal["center", "random"] = "center"
    """Where videos are cropped to a square."""
    flip: bool = False
    """Mirror half of the videos' clips."""
    images: int = 0
    """Single frames that join each clip of videos, for training on images and video together."""
    length: int = 10000
    """Clips in an epoch of digits."""
    workers: int = 2
    """Processes that load data, for each training process; 0 loads in the training process."""
    vae: str | None = None
    """AutoencoderKL (local folder or hub name) that decodes sampled latents. None: the one that encoded them."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The process that is learnt."""

    schedule: Literal["linear", "scaled_linear", "cosine", "sde", "flow"] = "linear"
    """How alpha and sigma follow from the step."""
    num_steps: int = 1000
    """Steps of the schedule."""
    prediction: Literal["epsilon", "v", "x0", "flow"] = "epsilon"
    """What the network predicts."""
    timesteps: Literal["clip", "frame", "ptss"] = "clip"
    """One step for the clip (Latte), one for each frame, or FVDM's mixture of the two."""
    ptss_probability: float = 0.2
    """How often PTSS draws one step for each frame."""
    noise: Literal["independent", "shared", "mixed", "progressive"] = "independent"
    """How the frames of a clip share their noise."""
    noise_base_weight: float | None = None
    """Weight of the common noise in "mixed" and "progressive"."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and what goes with it."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    max_grad_norm: float | None = None
    """Gradients of a larger global norm are scaled down to it."""
    clip_from_step: int = 0
    """First step at which gradients are scaled down."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, a step."""
    ema_warmup: bool = True
    """Let it rise to that: min(ema_decay, (1 + step) / (10 + step)), see models/training/ema.py."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run writes, and how often, in optimiser steps."""

    every: int = 50
    """Steps between two reads of the loss from the device."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; the last step writes one too."""
    keep: int = 3
    """Checkpoints that stay."""
    sample_every: int = 0
    """Steps between two sets of sample clips; 0 makes none."""
    sample_clips: int = 4
    """Clips in a set."""
    sample_steps: int = 50
    """DDIM (or flow) steps of a sample clip."""
    fps: int = 8
    """Frames a second of sample clips."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. `--config FILE.yaml` sets any of these; options on the command line go before the file."""

    run_dir: str = "outputs/train"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, samples/, export/."""
    resume: str = "auto"
    """"auto": go on from the newest checkpoint of run_dir if there is one; "never"; or a checkpoint's path."""
    init: str | None = None
    """Weights of a network like this one that a new run begins with: a run's folder, a checkpoint (.pt) or exported
    weights. Those of a Latte without model.image_condition fit one with it, which begins as the same function."""
    steps: int = 100000
    """Optimiser steps of the whole run."""
    batch_size: int = 8
    """Clips in an optimiser step, over all processes."""
    micro_batch_size: int | None = None
    """Most clips that one process runs at once; a larger share is accumulated. None: the whole share."""
    seed: int = 0
    """Seed of weights, data order, timesteps and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; weights, optimiser and EMA stay float32."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How torchrun's processes share the work: replicas, or FSDP2 shards of weights and optimiser."""
    compile: bool = False
    """torch.compile the network."""
    graph: bool = False
    """Capture the whole step (forward, backward, optimiser, EMA) into a CUDA graph: one process on a GPU."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    recompute: Recompute = "all"
    """What activation checkpointing recomputes: "all", or "cheap": all but products, convolutions and attention."""
    network: Literal["latte", "s2dm", "vdm", "videofusion"] = "latte"
    """What is trained: Latte or FVDM (sizes: model), S2DM (s2dm), a VDM of motion (vdm), or VideoFusion's two networks
    (both of model's sizes)."""
    model: LatteConfig = dataclasses.field(default_factory=LatteConfig)
    s2dm: S2DMConfig = dataclasses.field(default_factory=S2DMConfig)
    vdm: VDMConfig = dataclasses.field(default_factory=VDMConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    @property
    def network_section(self) -> str:
        """The name of the field that holds the chosen network's sizes."""
        return SECTIONS[self.network]

    @property
    def network_config(self) -> NetworkConfig:
        """The chosen network's sizes."""
        return getattr(self, self.network_section)


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """The run's configuration from `--config FILE.yaml` and options that go before it."""
    argv, default = list(argv), TrainConfig()
    for i, option in enumerate(argv):
        if option == "--config" or option.startswith("--config="):
            path = option.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            if not path:
                raise UsageError("--config wants the path of a YAML file")
            default = read_yaml(TrainConfig, path)
            del argv[i : i + (1 if "=" in option else 2)]
            break
    config = parse(TrainConfig, argv, "python -m models.train [--config FILE.yaml]", default)
    _check_values(config)
    return config


#: Options and the least and most that they can be; None is always allowed.
_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "micro_batch_size": (1, math.inf),
    "seed": (0, LARGEST_SEED),
    "data.frame_interval": (1, math.inf),
    "data.images": (0, math.inf),
    "data.least_visible": (0, 1),
    "data.size": (1, math.inf),
    "data.length": (1, math.inf),
    "data.workers": (0, math.inf),
    "diffusion.num_steps": (2, math.inf),
    "diffusion.ptss_probability": (0, 1),
    "diffusion.noise_base_weight": (0, 1),
    "optim.lr": (0, math.inf),
    "optim.warmup_steps": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.max_grad_norm": (0, math.inf),
    "optim.clip_from_step": (0, math.inf),
    "optim.ema_decay": (0, 1),
    "log.every": (1, math.inf),
    "log.checkpoint_every": (1, math.inf),
    "log.keep": (1, math.inf),
    "log.sample_every": (0, math.inf),
    "log.sample_clips": (1, math.inf),
    "log.fps": (1, math.inf),
}


def _check_values(config: TrainConfig) -> None:
    values = dict(flatten(to_dict(config)))
    for name, (least, most) in _RANGES.items():
        if values[name] is not None:
            check_range(name, values[name], least, most)
    for beta in config.optim.betas:
        if not 0 <= beta < 1:
            raise UsageError(f"--optim.betas wants numbers from 0 to below 1, got {beta}")
    if config.log.sample_every:
        check_range("log.sample_steps", config.log.sample_steps, 1, config.diffusion.num_steps)
    correlated = config.diffusion.noise in ("mixed", "progressive")
    if correlated != (config.diffusion.noise_base_weight is not None):
        raise UsageError(
            f"--diffusion.noise {config.diffusion.noise} wants {'a' if correlated else 'no'} "
            "--diffusion.noise_base_weight"
        )
    if config.data.kind != "digits" and config.data.path is None:
        raise UsageError(f"--data.kind {config.data.kind} wants --data.path")
    if config.data.images and config.data.kind != "videos":
        raise UsageError(f"--data.images wants --data.kind videos, got {config.data.kind}")
    _check_conditions(config)
    if config.recompute == "cheap" and (config.network == "s2dm" or not config.activation_checkpointing):
        raise UsageError("--recompute cheap wants --activation_checkpointing, and a --network other than s2dm")
    if config.network == "videofusion":
        for name, wanted in (("noise", "mixed"), ("prediction", "epsilon")):
            if values[f"diffusion.{name}"] != wanted:
                raise UsageError(
                    f"--network videofusion wants --diffusion.{name} {wanted}, got {values[f'diffusion.{name}']}"
                )
    if (config.diffusion.schedule == "flow") != (config.diffusion.prediction == "flow"):
        raise UsageError(
            f"--diffusion.schedule {config.diffusion.schedule} does not go with "
            f"--diffusion.prediction {config.diffusion.prediction}: flow wants flow"
        )
    if config.diffusion.schedule == "flow" and config.network_config.learn_sigma:
        raise UsageError(
            f"--diffusion.schedule flow has no variance to learn: it wants --{config.network_section}.no_learn_sigma"
        )


def _check_conditions(config: TrainConfig) -> None:
    """Refuse data that the network has no use for, or that lack what it wants."""
    data, wanted = config.data, set(config.network_config.conditions)
    for condition, option, value in (("text", "text", data.text), ("image", "image_encoder", data.image_encoder)):
        if condition in wanted and value is None:
            raise UsageError(f"--network {config.network} with {condition} wants --data.{option}")
        if condition not in wanted and value is not None:
            raise UsageError(
                f"--data.{option} {value}: the network takes no {condition}, see --{config.network_section}"
            )
    if ("motion" in wanted or config.network == "vdm") and data.kind not in ("digits", "motion"):
        raise UsageError(f"--network {config.network} with motion wants --data.kind digits or motion, got {data.kind}")
    if "pose" in wanted and (data.kind != "motion" or config.s2dm.pose_channels != POSE_CHANNELS):
        raise UsageError(
            f"--s2dm.pose_channels {config.s2dm.pose_channels} wants pictures of poses: {POSE_CHANNELS} channels, with "
            f"--data.kind motion and clips stored by models.flow --poses, got {data.kind}"
        )
    if data.size is not None and (config.network != "vdm" or data.kind != "digits"):
        raise UsageError(f"--data.size wants --network vdm and --data.kind digits, got {config.network}, {data.kind}")
    if data.latents and data.kind != "motion":
        raise UsageError(f"--data.latents wants --data.kind motion, got {data.kind}")
    if data.least_visible and data.kind != "motion":
        raise UsageError(f"--data.least_visible wants --data.kind motion, got {data.kind}")
    if data.images and config.network != "latte":
        raise UsageError(f"--data.images wants --network latte, got {config.network}")

"""Typed configuration: dataclasses filled from YAML and the command line, with every mistake reported in one line."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from models.latte import LatteConfig

T = TypeVar("T")


class UsageError(ValueError):
    """A mistake of the caller, told in one line."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the model learns from."""

    kind: Literal["digits", "videos", "latents"] = "digits"
    """Moving digits made on the fly, video files, or latents written by models.encode."""
    path: str | None = None
    """Folder or manifest of videos, or folder of latents."""
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
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    model: LatteConfig = dataclasses.field(default_factory=LatteConfig)
    """The network."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


def parse(cls: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Fill the dataclass `cls` from command-line options such as `--optim.lr 1e-3`.

    Raises UsageError with one line for an unknown option (the nearest one is named) or a value of the wrong type.
    `--help` prints every field and exits.
    """
    known = {name.replace("_", "-") for name in _leaves(cls)} | {"help"}
    for option in (argument.split("=")[0] for argument in argv if argument.startswith("--")):
        name = option[2:].replace("_", "-")
        if name not in known and re.sub(r"(^|\.)no-", r"\1", name) not in known:
            raise UsageError(f"unknown option {option}{_nearest(name, known, '--')}")
    return _run_tyro(cls, argv, prog=prog, default=default)


def read_yaml(cls: type[T], path: str | Path) -> T:
    """Fill the dataclass `cls` from a YAML file with the same names, nested.

    Raises UsageError with one line that names the file for an unreadable file, an unknown key (the nearest one is
    named) or a value of the wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return from_dict(cls, values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Fill the dataclass `cls` from nested dictionaries, as `read_yaml` does."""
    if not isinstance(values, dict):
        raise UsageError(f"want keys of {cls.__name__}, got {values!r}")
    _check_keys(cls, values, "")
    return _run_tyro(cls, list(_as_options(values)), config=(tyro.conf.FlagConversionOff,))


def to_yaml(config: Any) -> str:
    """The YAML text that `read_yaml` turns back into `config`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as nested dictionaries of plain values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted names whose values differ between two results of `to_dict`, as "name: old -> new"."""
    a, b = dict(_flatten(old)), dict(_flatten(new))
    return [f"{name}: {a.get(name)} -> {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name)]


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


@contextlib.contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Print a mistake of the caller (bad value, missing or unreadable file) as one line and exit with status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _check_values(config: TrainConfig) -> None:
    positive = ("steps", "batch_size", "micro_batch_size", "log.every", "log.checkpoint_every", "log.keep")
    values = dict(_flatten(to_dict(config)))
    for name in positive:
        if values[name] is not None and values[name] < 1:
            raise UsageError(f"--{name} wants at least 1, got {values[name]}")
    if config.data.kind != "digits" and config.data.path is None:
        raise UsageError(f"--data.kind {config.data.kind} wants --data.path")
    if config.data.images and config.data.kind != "videos":
        raise UsageError(f"--data.images wants --data.kind videos, got {config.data.kind}")
    if config.model.text_size is not None:
        raise UsageError("--model.text_size: the data has no text to train on")
    if (config.diffusion.schedule == "flow") != (config.diffusion.prediction == "flow"):
        raise UsageError(
            f"--diffusion.schedule {config.diffusion.schedule} does not go with "
            f"--diffusion.prediction {config.diffusion.prediction}: flow wants flow"
        )
    if config.diffusion.schedule == "flow" and config.model.learn_sigma:
        raise UsageError("--diffusion.schedule flow has no variance to learn: it wants --model.no_learn_sigma")


def _leaves(cls: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _leaves(field.type, f"{prefix}{field.name}.")
        else:
            renamed = (note.name for note in getattr(field.type, "__metadata__", ()) if getattr(note, "name", None))
            yield prefix + next(renamed, field.name)


def _check_keys(cls: Any, values: dict[str, Any], prefix: str) -> None:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            names = set(_leaves(cls, prefix)) | {prefix + name for name in fields}
            raise UsageError(f"unknown key {prefix}{key}{_nearest(f'{prefix}{key}', names, '')}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UsageError(f"{prefix}{key} wants keys of its own, got {value!r}")
            _check_keys(fields[key], value, f"{prefix}{key}.")


def _nearest(name: str, known: set[str], prefix: str) -> str:
    matches = difflib.get_close_matches(name, sorted(known), n=1)
    if not matches:
        last = {option.rpartition(".")[2]: option for option in sorted(known, reverse=True)}
        matches = [last[m] for m in difflib.get_close_matches(name.rpartition(".")[2], list(last), n=1)]
    return f"; the nearest is {prefix}{matches[0].replace('-', '_')}" if matches else ""


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _as_options(values: dict[str, Any]) -> Iterator[str]:
    for name, value in _flatten(values):
        if isinstance(value, (list, tuple)):
            yield from (f"--{name}", *map(str, value))
        else:
            yield f"--{name}={value}"


def _run_tyro(cls: type[T], argv: Sequence[str], **options: Any) -> T:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            return tyro.cli(cls, args=list(argv), use_underscores=True, **options)
        except SystemExit as stop:
            if not stop.code:
                raise
    raise UsageError(_first_sentence(errors.getvalue()))


def _first_sentence(box: str) -> str:
    """The message of tyro's error box: from below its title to the next empty or ruled line."""
    lines = [line.strip("│ ") for line in box.strip().splitlines()[1:]]
    words = itertools.dropwhile(lambda line: not line.strip("-─"), lines)
    sentence = " ".join(itertools.takewhile(lambda line: line.strip("-─"), words))
    return sentence.replace(" .", ".") or "bad options"  # the box may break before the full stop

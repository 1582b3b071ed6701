"""The network and the settings of a checkpoint, whether models.train wrote it or somebody else."""

from pathlib import Path
from typing import Any

from models.checkpoints import load_weights
from models.command_line import UsageError, from_dict, read_yaml
from models.config import TrainConfig
from models.networks import Network, build_network
from models.training import checkpointing
from models.training.export import read_config


def load_network(
    source: str | Path, weights: str | None = None, config_file: str | None = None
) -> tuple[Network, TrainConfig]:
    """The network of `source`, in evaluation mode on the CPU, and the configuration that it was trained with.

    `source` is a run's folder (its newest checkpoint, else its export), a checkpoint or a safetensors file. `weights`
    is "ema" or "model" to insist on one; by default the averaged ones if there are any. `config_file`, a YAML file,
    says how the network is made where the file does not, and goes before what the file says.

    Raises ValueError or OSError for a missing or unreadable file, no configuration, or weights of another network.
    """
    path = find_checkpoint(Path(source))
    if config_file is not None:
        config = read_yaml(TrainConfig, config_file)
    else:
        try:
            config = from_dict(TrainConfig, _saved_config(path))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    model = build_network(config, pretrained=False)
    load_weights(model, path, entry=weights)
    return model.eval().requires_grad_(False), config


def find_checkpoint(source: Path) -> Path:
    """The file that `source`, a file or a run's folder, means."""
    if not source.exists():
        raise UsageError(f"no checkpoint at {source}")
    if not source.is_dir():
        return source
    export = source / "export" / "model.safetensors"
    found = [*([export] if export.exists() else []), *checkpointing.paths(source / "checkpoints")]
    if not found:
        raise UsageError(f"no checkpoint in {source}: wanted checkpoints/step_*.pt or export/model.safetensors")
    return found[-1]


def _saved_config(path: Path) -> dict[str, Any]:
    saved = read_config(path) if path.suffix == ".safetensors" else checkpointing.load(path).get("config")
    if saved is None:
        raise UsageError("the file does not say how its network is made: give --config FILE.yaml")
    return saved

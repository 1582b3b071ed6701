"""A trained network as one safetensors file that says how it was made."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.training.checkpointing import StorageError, atomic_file


def export_weights(path: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write `weights` with the training configuration in the metadata entry "config", as JSON.

    The file appears whole or not at all. Raises StorageError when it cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    content = save(tensors, metadata={"format": "pt", "config": json.dumps(config)})
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_config(path: Path) -> dict[str, Any] | None:
    """The training configuration in a safetensors file's metadata, or None where it has none.

    Raises StorageError for a file that cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata["config"]) if "config" in metadata else None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise StorageError(f"cannot read the checkpoint {path}: {error}") from error

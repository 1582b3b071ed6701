"""What a checkpoint holds, gathered from and handed back to one process, replicas or shards."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from models.command_line import UsageError, differences, from_dict, to_dict
from models.config import TrainConfig

_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SCATTER = StateDictOptions(full_state_dict=True)


def gather(
    model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, step: int, config: dict[str, Any]
) -> dict[str, Any]:
    """The run after `step` steps: {"step", "config", "model", "ema", "optimizer"}.

    Tensors are whole and on the CPU, so that any number of processes can go on. Every process must call this; only the
    main one gets the tensors. The random numbers and the place in the data follow from the seed and the step.
    """
    moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_GATHER)
    for group in moments.get("param_groups", []):  # a CUDA graph's numbers are tensors
        group.update({name: value.item() for name, value in group.items() if isinstance(value, Tensor)})
    return {
        "step": step,
        "config": config,
        "model": get_model_state_dict(model, options=_GATHER),
        "ema": get_model_state_dict(ema, options=_GATHER),
        "optimizer": moments,
    }


def gather_weights(network: nn.Module) -> dict[str, Tensor]:
    """The whole weights of `network` on the CPU, for the main process; every process must call this."""
    state = get_model_state_dict(network, options=_GATHER)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def scatter(
    state: dict[str, Any],
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> list[str]:
    """Hand what `gather` returned back and return the settings that `config` changes, as "name: old -> new".

    A setting that is younger than the checkpoint had its default. Raises UsageError where the checkpoint is of another
    network.
    """
    try:
        changed = differences(to_dict(from_dict(TrainConfig, state["config"])), to_dict(config))
        network = [line for line in changed if line.startswith(("network:", f"{config.network_section}."))]
        if network:
            raise UsageError(f"the checkpoint is of another network: {', '.join(network)}")
        set_model_state_dict(model, state["model"], options=_SCATTER)
        set_model_state_dict(ema, state["ema"], options=_SCATTER)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_SCATTER)
    except KeyError as error:
        raise UsageError(f"the checkpoint was not written by models.train: it has no {error}") from error
    return changed

"""Processes of one run: torchrun's group, replicas (DDP) or shards (FSDP2), and when gradients travel."""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from models.networks import Network, blocks_of


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and the terminal."""
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here. Raises ValueError for "cuda" where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device here")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join torchrun's group (NCCL on CUDA, gloo on the CPU) or be a world of one process, and leave it at the end.

    `device` is "auto", "cpu" or "cuda". Raises ValueError where there are more processes on this machine than GPUs;
    more processes than CPU cores work, and are warned of once.
    """
    kind = pick_device(device).type
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    _check_room(kind, local_rank, local_size)
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield World(0, 1, here)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()


def distribute(model: Network, ema: Network, strategy: str, world: World) -> nn.Module:
    """The network to call in training: `model` itself, a DDP replica around it, or `model` sharded by FSDP2.

    With "fsdp" `ema` is sharded in the same way; it holds its own copy of the weights.
    """
    if not dist.is_initialized():
        if strategy == "fsdp":
            raise ValueError("--strategy fsdp shares the work of several processes: start it with torchrun")
        return model
    if strategy == "ddp":
        return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    # nothing adds in place to what a block returns
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for network in (model, ema):
        for block in blocks_of(network):
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)  # ema is called without a backward pass
    return model


@contextlib.contextmanager
def gradient_exchange(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Exchange gradients between processes in this backward pass only if `enabled`: once in an accumulated step."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(network, DistributedDataParallel) and not enabled:
        with network.no_sync():
            yield
    else:
        yield


def mean_over_world(value: Tensor) -> Tensor:
    """The mean of `value` over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def _check_room(kind: str, local_rank: int, local_size: int) -> None:
    if kind == "cuda":
        if local_size > torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node {local_size}, but this machine has {torch.cuda.device_count()} GPUs")
    elif local_rank == 0 and local_size > len(os.sched_getaffinity(0)):
        cores = len(os.sched_getaffinity(0))
        print(
            f"models.train: warning: {local_size} processes share {cores} CPU cores; more than {cores} is slower",
            file=sys.stderr,
        )

"""The parts of a step: to which one an operator belongs, forward and backward, and their times by torch.profiler.

A part opens a scope, by hooks on the network's modules or by :func:`part`. An operator of the backward pass belongs to
the part in which its node of the graph was made.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import profile, record_function

ATTENTION, MLP, MODULATION, EMBEDDING = "attention", "MLP", "modulation", "embeddings"
DIFFUSION, OPTIMISER, EMA, DATA, COPIES, OTHER = "diffusion", "optimiser", "EMA", "data", "copies", "other"
PARTS = (ATTENTION, MLP, MODULATION, EMBEDDING, DIFFUSION, OPTIMISER, EMA, DATA, COPIES, OTHER)

#: What a scope's name begins with in the profiler.
PREFIX = "part: "
#: Modules by their path, blocks' numbers left out. A block's own time, beside its attention and MLP, is modulation.
MODULES = {
    "": EMBEDDING,  # what the network itself does: positions, and the way back from patches
    "blocks": MODULATION,
    "blocks.attn": ATTENTION,
    "blocks.mlp": MLP,
    "final_layer": MODULATION,
    "final_layer.linear": EMBEDDING,
    "x_embedder": EMBEDDING,
    "t_embedder": EMBEDDING,
    "y_embedder": EMBEDDING,
}
BLOCK_NUMBER = re.compile(r"\.\d+")
NODE = "autograd::engine::evaluate_function: "

_open: list[str] = []


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Say that what runs inside belongs to a part."""
    _open.append(name)
    try:
        with record_function(PREFIX + name):
            yield
    finally:
        _open.pop()


def open_part() -> str | None:
    """Return the innermost part that is open, if any."""
    return _open[-1] if _open else None


@contextlib.contextmanager
def parts_of(network: nn.Module, optimiser: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Open the part of every module of a network, and of an optimiser's step, while inside."""
    scopes: list[contextlib.AbstractContextManager[None]] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any, **__: Any) -> None:
            scopes.append(part(name))
            scopes[-1].__enter__()

        return hook

    def leave(*_: Any, **__: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    handles: list[Any] = []
    for path, module in network.named_modules():
        name = MODULES.get(BLOCK_NUMBER.sub("", path))
        if name is not None and not isinstance(module, nn.ModuleList):
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    if optimiser is not None:
        handles += [
            optimiser.register_step_pre_hook(enter(OPTIMISER)),
            optimiser.register_step_post_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_by_name(operator: str) -> str | None:
    """Return the part of an operator that tells it by its name, wherever it runs: "aten::copy_" is a copy."""
    name = operator.rpartition("::")[2]
    if name in ("copy_", "_to_copy", "cat", "clone"):
        return COPIES
    if name.startswith("_foreach_lerp"):
        return EMA
    if name.startswith(("_foreach_", "_fused_adam", "linalg_vector_norm")) or "adamw" in name:
        return OPTIMISER
    return None


def split(profiled: profile, device: torch.device) -> dict[str, float]:
    """Return the seconds of each part of what was profiled: of kernels on a GPU, of operators on a CPU.

    The network's parts must have been open, see :func:`parts_of`.
    """
    on_gpu = device.type == "cuda"
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CPU]
    made_in: dict[int, Any] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not event.name.startswith(NODE) and event.scope != 1:
            made_in[event.sequence_nr] = event  # the last operator before a node's number is taken makes the node
    parts: Counter[str] = Counter()
    for event in events:
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        parts[_part_of_event(event, made_in)] += time / 1e6
    return {name: parts[name] for name in PARTS}


def _part_of_event(event: Any, made_in: dict[int, Any]) -> str:
    named = part_by_name(event.name)
    if named is not None:
        return named
    inside = False
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith(NODE):
            maker = made_in.get(event.sequence_nr)
            return OTHER if maker is None else _part_of_event(maker, {})
        inside = inside or "::" in event.name
        event = event.cpu_parent
    return DIFFUSION if inside else OTHER

"""Predicts whole steps on GPUs that are not here: every operator that a step dispatches, by its bytes and its FLOPs.

The step runs on tensors without values. An operator takes max(bytes / bandwidth, FLOPs / rate) and a launch; its bytes
are its arguments' and its results', each read or written once, and its part is that of benchmarks/steps/parts.py.
"""

import dataclasses
import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.launches import UNINITIALISED, written
from benchmarks.steps.flops import ATTENTION_FLOPS
from benchmarks.steps.parts import DIFFUSION, OTHER, open_part, part_by_name, parts_of
from benchmarks.steps.variants import TRAINING, Setting, Variant, Variants, Way

CPU = torch.device("cpu")
NO_WORK = UNINITIALISED | {"_unsafe_view", "lift_fresh", "detach"}
#: Depths of the networks that are counted; what another depth takes lies on the line through them.
DEPTHS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine reaches a second: bytes, FLOPs of products in bfloat16 and in float32; and a launch's seconds."""

    name: str
    bytes: float
    half_flops: float
    float_flops: float
    launch: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What an operator takes: bytes, FLOPs of its products, and whether they are bfloat16's."""

    part: str
    bytes: int
    flops: int
    half: bool

    def seconds(self, machine: "Machine") -> float:
        """Return the time on a machine."""
        rate = machine.half_flops if self.half else machine.float_flops
        return max(self.bytes / machine.bytes, self.flops / rate) + machine.launch

    def memory_bound(self, machine: "Machine") -> bool:
        """Return whether the bytes take longer than the products."""
        rate = machine.half_flops if self.half else machine.float_flops
        return self.bytes / machine.bytes > self.flops / rate


class Recorded(TorchDispatchMode):
    """Notes the work of every operator inside, and the part that it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []
        self._made_in: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = self._part(func)
        out = func(*args, **kwargs)
        if func.namespace in ("aten", "vidkern") and not func.is_view and func._opname not in NO_WORK:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            changed = written(func, args, kwargs)  # they have been read too
            moved = sum(map(_nbytes, {id(t): t for t in tensors}.values())) + sum(map(_nbytes, changed))
            half = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
            self.works.append(Work(name, moved, _flops(func, args, kwargs, out), half))
        return out

    def _part(self, func: Any) -> str:
        """Return an operator's part, and note it for the node of the graph that was made for it."""
        node = torch._C._current_autograd_node()
        if node is not None:
            inside = self._made_in.get(node._sequence_nr(), OTHER)
        else:
            inside = open_part() or DIFFUSION
            self._made_in.setdefault(torch.autograd._get_sequence_nr() - 1, inside)
        return part_by_name(func._schema.name) or inside


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's distinct elements: an expanded dimension is read once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return functools.reduce(lambda a, b: a * b, sizes, tensor.element_size()) if tensor.numel() else 0


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    if func.namespace == "vidkern":
        formula = ATTENTION_FLOPS.get(func._opname)
        return formula(*(a.shape for a in args if isinstance(a, Tensor))) if formula else 0
    counted = flop_registry.get(func._overloadpacket)
    return counted(*args, **kwargs, out_val=out) if counted else 0


def works_of(setting: Setting, way: Way, task: str) -> list[Work]:
    """Return the work of a training step, or of one DDIM step under guidance."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        with mock.patch.object(nn.Module, "to", lambda network, *_: network):  # a network is there already
            made = Variants(setting, CPU)
        variant = made.make(way)
        for group in variant.optimiser.param_groups:
            if not way.ours:
                group["foreach"] = True  # as on a GPU
        take = _step_of(variant, setting, task)
        if task == TRAINING:
            take()  # makes the optimiser's state
        with Recorded() as recorded, parts_of(variant.network, variant.optimiser):
            take()
    return recorded.works


def _step_of(variant: Variant, setting: Setting, task: str) -> Callable[[], object]:
    """Return a training step, or what a DDIM step asks of the network: both halves of guidance."""
    x0, y = setting.clips()
    if task == TRAINING:
        return lambda: variant.train(x0, y)
    x, both = torch.cat([x0, x0]), torch.cat([y, y])
    t = torch.zeros(x.shape[: 1 + setting.per_frame], dtype=torch.int64)
    network, half = variant.network.eval(), variant.way.dtype == torch.bfloat16

    @torch.no_grad()
    def denoise() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network(x, t, both)

    return denoise


@functools.cache
def counted(setting: Setting, way: Way, task: str) -> tuple[tuple[Work, float], ...]:
    """Return the work of a deep network, each with how often it comes, from two shallow ones."""
    depth = setting.config.depth
    if depth <= max(DEPTHS):
        return tuple((work, 1.0) for work in works_of(setting, way, task))
    shallow, deeper = (
        Counter(works_of(dataclasses.replace(setting, overrides=(*setting.overrides, ("depth", d))), way, task))
        for d in DEPTHS
    )
    more = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return tuple((w, shallow[w] + more * (deeper[w] - shallow[w])) for w in shallow | deeper)


def predict(setting: Setting, way: Way, task: str, machine: Machine) -> dict[str, float]:
    """Return the predicted seconds of each part of a training step, or of one DDIM step under guidance."""
    parts: dict[str, float] = defaultdict(float)
    for work, times in counted(setting, way, task):
        parts[work.part] += times * work.seconds(machine)
    return dict(parts)


def memory_share(setting: Setting, way: Way, task: str, machine: Machine) -> float:
    """Return the share of a step's predicted time in operators that memory bounds."""
    bound = total = 0.0
    for work, times in counted(setting, way, task):
        seconds = times * work.seconds(machine)
        total += seconds
        bound += seconds if work.memory_bound(machine) else 0.0
    return bound / total

"""Counts the launches of a training step and of a sampling step: plain PyTorch's, and vidkern's.

On a GPU they are those that torch.profiler sees. Without one they are counted as operators are dispatched: one for each
that would write a tensor, and of vidkern's as many as its CUDA kernels make on the emulator.

python -m benchmarks.launches
"""

import contextlib
import dataclasses
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baselines.plain import PlainLatte
from benchmarks.baselines.plain_diffusion import PlainDiffusion
from benchmarks.environment import default_device
from benchmarks.report import markdown
from models.latte import Latte, LatteConfig, published_config
from vidkern._library import operators
from vidkern.diffusion import diffusion_loss, make_schedule, sample

NETWORK = "Latte-S/8"  # as many launches as Latte-S/2, on a sixteenth of the tokens
CLASSES = 101
BATCH = 2
SCALE = 4.0
UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

COUNTED_BY = {
    "cuda": "kernels, copies and fills that torch.profiler sees",
    "cpu": "operators dispatched that would write a tensor on a GPU (at least one launch each); those of vidkern as"
    " many as their CUDA kernels launch on the emulator",
}


class Dispatched(TorchDispatchMode):
    """Counts the launches that the operators inside would make on a GPU, on tensors of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vidkern":
            return self._ours(func._opname, args)
        out = func(*args, **(kwargs or {}))
        self.count += _writes(func, args, out)
        return out

    def _ours(self, name: str, args: tuple[Any, ...]) -> Any:
        """Run one of our operators as CUDA would be asked for it."""
        kernels = operators[name].kernels
        run, launches = _emulated(name)
        if run is None and "cuda" in kernels:  # a library's kernel
            self.count += 1
            return operators[name](*args)
        if run is None or kernels["cuda"].supports(*args):
            with self:
                return kernels["reference"].run(*args)
        before = launches()
        out = run(*args)
        self.count += launches() - before
        return out


def _writes(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Whether an operator writes a tensor: it is no view, and allocates or changes one that has elements."""
    if func._opname in UNINITIALISED:
        return False
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]
    if func._schema.is_mutable:
        return any(x.numel() for x in outputs)
    given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    return any(x.numel() and x.untyped_storage().data_ptr() not in given for x in outputs)


@cache
def _emulated(name: str) -> tuple[Callable[..., Any] | None, Callable[[], int]]:
    """Return a CUDA operator on the emulator, and the count of its library's launches; None for a library's."""
    backends = importlib.import_module("tests.ops.backends")
    for family in FAMILIES:
        find = backends.kernels_of(family, "cuda").find
        with contextlib.suppress(AttributeError):
            return find(name), find("launches")
    return None, int


#: The families that have CUDA kernels which a step calls.
FAMILIES = ("noise", "sampling", "modulation", "attention")


class Counter:
    """Counts the launches between :meth:`start` and :meth:`stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._dispatched = Dispatched()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self._profiler = torch.profiler.profile(activities=activities) if device.type == "cuda" else None

    def start(self) -> None:
        if self._profiler is None:
            self._dispatched.__enter__()
            return
        torch.cuda.synchronize(self._device)
        self._profiler.start()

    def stop(self) -> None:
        if self._profiler is None:
            self._dispatched.__exit__(None, None, None)
            return
        torch.cuda.synchronize(self._device)
        self._profiler.stop()

    @property
    def count(self) -> int:
        if self._profiler is None:
            return self._dispatched.count
        on_device = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_device and not event.is_user_annotation for event in self._profiler.events())


@dataclasses.dataclass(frozen=True)
class Step:
    """A step, or a part of one; each function takes it once, telling the counter where it begins and ends."""

    name: str
    plain: Callable[[Counter], None]
    ours: Callable[[Counter], None]


def steps(config: LatteConfig, device: torch.device) -> Iterator[Step]:
    """Yield the parts and the whole of a training step and of a DDIM step with guidance, of random networks."""
    shape = (BATCH, config.num_frames, config.in_channels, *config.frame_size)
    schedule = make_schedule("linear", device=device)
    x0, t = torch.randn(shape, device=device), torch.randint(1, 1000, (BATCH,), device=device)
    y, key = torch.arange(BATCH, device=device), torch.tensor([1, 2], device=device)
    outputs = torch.randn(2 * BATCH, *shape[1:2], 2 * shape[2], *shape[3:], device=device)
    diffusion = PlainDiffusion(schedule)
    both = torch.cat([y, torch.full_like(y, CLASSES)])

    def train(counter: Counter, loss: Callable[[], Tensor], leaves: Iterable[Tensor]) -> None:
        counter.start()
        loss().backward()
        counter.stop()
        for tensor in leaves:
            tensor.grad = None

    def train_plain(counter: Counter, model: Callable[..., Tensor], leaves: Iterable[Tensor]) -> None:
        train(counter, lambda: diffusion.loss(model, x0, t, y), leaves)

    def train_ours(counter: Counter, model: Callable[..., Tensor], leaves: Iterable[Tensor]) -> None:
        train(counter, lambda: diffusion_loss(model, x0, t, schedule, key, y=y)["loss"], leaves)

    @torch.no_grad()
    def sample_plain(counter: Counter, model: Callable[..., Tensor]) -> None:
        x, now = torch.cat([x0, x0]), torch.cat([t, t])
        counter.start()
        diffusion.guided_ddim_step(model, x, now, now - 1, both, SCALE)
        counter.stop()

    def sample_ours(counter: Counter, model: Callable[..., Tensor]) -> None:
        def progress(step: int, total: int) -> None:
            (counter.start if step == 1 else counter.stop)()

        sample(model, x0, schedule, key, num_steps=2, y=y, y_null=CLASSES, cfg_scale=SCALE, progress=progress)

    predicted = outputs[:BATCH].clone().requires_grad_()
    yield Step(
        "noise and loss",
        lambda counter: train_plain(counter, lambda *_: predicted, [predicted]),
        lambda counter: train_ours(counter, lambda *_: predicted, [predicted]),
    )
    yield Step(
        "guidance and DDIM step",
        lambda counter: sample_plain(counter, lambda *_: outputs),
        lambda counter: sample_ours(counter, lambda *_: outputs),
    )
    network, plain = Latte(config).to(device), PlainLatte(config).to(device)
    yield Step(
        "training step: forward, loss, backward",
        lambda counter: train_plain(counter, plain, plain.parameters()),
        lambda counter: train_ours(counter, network, network.parameters()),
    )
    yield Step(
        "sampling step with guidance",
        lambda counter: sample_plain(counter, plain.eval()),
        lambda counter: sample_ours(counter, network.eval()),
    )


def count(take: Callable[[Counter], None], device: torch.device) -> int:
    """Return the launches of a step, when whatever happens once has happened."""
    if device.type == "cuda":
        take(Counter(device))
    counter = Counter(device)
    take(counter)
    return counter.count


def measure(config: LatteConfig | None = None, parts: int | None = None) -> dict[str, Any]:
    """Return the counts of every step, or of so many of the first, and how they were counted."""
    device = default_device()
    config = config or published_config("Latte", NETWORK, num_classes=CLASSES)
    return {
        "counted_by": COUNTED_BY[device.type],
        "network": f"{NETWORK}, {BATCH} clips of {config.num_frames} frames",
        "steps": [
            {"step": step.name, "plain": count(step.plain, device), "ours": count(step.ours, device)}
            for step in itertools.islice(steps(config, device), parts)
        ],
    }


def table(record: dict[str, Any]) -> str:
    """Return the counts as a table that says how they were counted."""
    rows = [
        [step["step"], str(step["plain"]), str(step["ours"]), f"{step['plain'] / step['ours']:.1f}x"]
        for step in record["steps"]
    ]
    head = f"{record['network']}, float32. Counted: {record['counted_by']}."
    return "\n".join([head, "", *markdown(["launches", "plain PyTorch", "vidkern", "fewer"], rows)])


if __name__ == "__main__":
    print(table(measure()))
    sys.exit(0)

"""Counts the launches of a training step and of a sampling step: plain PyTorch's, and vidkern's.

On a GPU they are those that torch.profiler sees. Without one they are counted as operators are dispatched: one for each
that would write a tensor, and of vidkern's as many as its CUDA kernels make on the emulator.

python -m benchmarks.launches
"""

import argparse
import dataclasses
import importlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.environment import commit, default_device
from benchmarks.markdown import markdown
from benchmarks.steps.variants import CLASSES, SCALE, Setting, Variant, Variants, Way
from models.training.optimizer import rates_at, take_step
from vidkern._library import operators
from vidkern.diffusion import diffusion_loss, sample

SETTING = Setting("Latte-S/8", 2)  # as many launches as Latte-S/2, on a sixteenth of the tokens
DTYPES = (torch.float32, torch.bfloat16)
UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

COUNTED_BY = {
    "cuda": "kernels, copies and fills that torch.profiler sees",
    "cpu": "operators dispatched that would write a tensor on a GPU (at least one launch each); those of vidkern as"
    " many as their CUDA kernels launch on the emulator",
}


class Dispatched(TorchDispatchMode):
    """Counts the launches that the operators inside would make on a GPU, on tensors of the CPU, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "vidkern":
            return self._ours(func._opname, args)
        out = func(*args, **kwargs)
        if _writes(func, args, kwargs, out):
            self.launches[func._opname] += 1
        return out

    def _ours(self, name: str, args: tuple[Any, ...]) -> Any:
        """Run one of our operators as CUDA would be asked for it."""
        kernels = operators[name].kernels
        if "cuda" in kernels and kernels["cuda"].run.__module__.endswith("cuda_library"):  # another library's kernel
            self.launches[name] += 1
            return operators[name](*args)
        if "cuda" not in kernels or kernels["cuda"].supports(*args):
            with self:
                return kernels["reference"].run(*args)
        run, launched = _emulated(name)
        before = launched()
        out = run(*args)
        self.launches[name] += launched() - before
        return out


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    """Whether an operator writes a tensor: it is no view, and allocates or changes one that has elements."""
    if func._opname in UNINITIALISED:
        return False
    if func._schema.is_mutable:
        return any(x.numel() for x in written(func, args, kwargs))
    given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    return any(x.numel() and x.untyped_storage().data_ptr() not in given for x in outputs)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operator writes, as its schema tells."""
    schema = func._schema.arguments
    values = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    changed = [values.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


def _emulated(name: str) -> tuple[Callable[..., Any], Callable[[], int]]:
    """Return a CUDA operator on the emulator, and the count of its family's launches there."""
    family = operators[name].kernels["reference"].run.__module__.split(".")[-2]
    find = importlib.import_module("tests.ops.backends").kernels_of(family, "cuda").find
    return find(name), find("launches")


def launches(call: Callable[[], object], device: torch.device) -> Counter[str]:
    """Return the launches of a call: by kernel on a GPU, by operator on a CPU."""
    if device.type == "cpu":
        with Dispatched() as dispatched:
            call()
        return dispatched.launches
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    return Counter(e.name for e in profiler.events() if e.device_type == on_device and not e.is_user_annotation)


#: Takes so many steps.
Take = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step, or a part of one: what takes so many of it, by plain PyTorch and by the library.

    Its launches are those that the last of `taken` adds, when whatever happens once has happened.
    """

    name: str
    plain: Take
    ours: Take
    taken: int = 1

    def count(self, take: Take, device: torch.device) -> Counter[str]:
        """Return the launches of one, by plain PyTorch or by the library."""
        take(self.taken)
        return launches(lambda: take(self.taken), device) - launches(lambda: take(self.taken - 1), device)


def steps(setting: Setting, device: torch.device) -> Iterator[Step]:
    """Yield the parts and the whole of a training step and of a DDIM step with guidance, of random networks."""
    made = Variants(setting, device)
    x0, y = (tensor.to(device) for tensor in setting.clips())
    t, key = torch.randint(1, 1000, (len(x0),), device=device), torch.tensor([1, 2], device=device)
    batch, frames, channels, *size = x0.shape
    outputs = torch.randn(2 * batch, frames, 2 * channels, *size, device=device)
    predicted = outputs[:batch].clone().requires_grad_()
    yield Step(
        "noise and loss",
        _learning(lambda: made.diffusion.loss(lambda *_: predicted, x0, t, y), [predicted]),
        _learning(lambda: diffusion_loss(lambda *_, **__: predicted, x0, t, made.schedule, key)["loss"], [predicted]),
    )
    yield Step(
        "guidance and DDIM step",
        lambda n: made.diffusion.sample(lambda *_: outputs, x0, n, y, CLASSES, SCALE, setting.per_frame),
        lambda n: sample(
            lambda *_, **__: outputs, x0, made.schedule, key, num_steps=n, y=y, y_null=CLASSES, cfg_scale=SCALE
        ),
        taken=2,
    )
    yield _optimiser_step(made)
    for dtype in DTYPES:
        named = f"{setting.family}, {str(dtype).removeprefix('torch.')}"
        plain, ours = made.make(Way(False, dtype, "softmax")), made.make(Way(True, dtype))
        yield Step(
            f"{named}: forward, loss, backward", _gradients(plain, x0, t, y, key), _gradients(ours, x0, t, y, key)
        )
        yield Step(f"{named}: training step", _training(plain, x0, y), _training(ours, x0, y))
        yield Step(f"{named}: sampling step with guidance", _sampling(plain, x0, y), _sampling(ours, x0, y), taken=2)


def _learning(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Take:
    """Return what computes the gradients of a loss so many times."""

    def take(times: int) -> None:
        for _ in range(times):
            for leaf in leaves:
                leaf.grad = None
            loss().backward()

    return take


def _gradients(variant: Variant, x0: Tensor, t: Tensor, y: Tensor, key: Tensor) -> Take:
    trained = [p for p in variant.network.parameters() if p.requires_grad]
    return _learning(lambda: variant.loss(x0, t, y, key), trained)


def _training(variant: Variant, x0: Tensor, y: Tensor) -> Take:
    return lambda times: [variant.train(x0, y) for _ in range(times)]


def _sampling(variant: Variant, x0: Tensor, y: Tensor) -> Take:
    return lambda times: variant.sample(x0, y, times)


def _optimiser_step(made: Variants) -> Step:
    """Return what follows the backward pass, with gradients that are there."""
    trained, optim = made.training.trained, made.run.config.optim
    gradients = [torch.randn_like(p) for p in trained]
    for group in made.training.optimiser.param_groups:
        group["foreach"] = True  # as on a GPU

    def taking(update: Callable[[], object]) -> Take:
        def take(times: int) -> None:
            for _ in range(times):
                for p, gradient in zip(trained, gradients, strict=True):
                    p.grad = gradient
                update()

        return take

    return Step(
        "gradients' norm and clipping, AdamW, EMA",
        taking(made.training.update),
        taking(lambda: take_step(made.run.optimizer, optim, rates_at(optim, 1))),
    )


def measure(setting: Setting = SETTING, parts: int | None = None) -> dict[str, Any]:
    """Return the counts of every step, or of so many of the first, by operator, and how they were counted."""
    device = default_device()
    return {
        "commit": commit(),
        "counted_by": COUNTED_BY[device.type],
        "network": f"{setting.name}, {setting.batch} clips of {setting.config.num_frames} frames",
        "steps": [
            {"step": step.name, "plain": step.count(step.plain, device), "ours": step.count(step.ours, device)}
            for step in itertools.islice(steps(setting, device), parts)
        ],
    }


def table(record: dict[str, Any]) -> str:
    """Return the counts as a table that says how they were counted."""
    rows = []
    for step in record["steps"]:
        plain, ours = (sum(step[by].values()) for by in ("plain", "ours"))
        rows.append([step["step"], str(plain), str(ours), f"{plain / ours:.1f}x"])
    head = f"{record['network']}, commit {record['commit']}. Counted: {record['counted_by']}."
    return "\n".join([head, "", *markdown(["launches", "plain PyTorch", "vidkern", "fewer"], rows)])


def operators_table(record: dict[str, Any]) -> str:
    """Return what the library launches in each step, the most frequent first."""
    rows = [
        [step["step"], ", ".join(f"{name} {n}" for name, n in Counter(step["ours"]).most_common())]
        for step in record["steps"]
    ]
    return "\n".join(markdown(["vidkern", "operators by their launches"], rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--operators", action="store_true", help="tell which operators the library's launches are of")
    options = parser.parse_args(arguments)
    record = measure()
    print(table(record))
    if options.operators:
        print(f"\n{operators_table(record)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

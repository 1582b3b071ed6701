"""Measures one problem: every variant's result is checked against float64, then all are timed in turn."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vidkern
from benchmarks.environment import cache_bytes, gpu_state, joules_used
from benchmarks.memory import peak_bytes
from benchmarks.timers import Call, Timed, captured, event_clock, host_clock, interleaved
from vidkern import _library

ROUNDS = 30
#: A call of fewer seconds on the GPU is timed in a replayed CUDA graph, where the host's launches do not count.
GRAPH_BELOW = 100e-6
#: Rotating buffers are together this many times larger than the last cache.
CACHES = 2
MAX_SETS = 128
#: How far beyond the contract a baseline may be: compilers sum in another order, and must not be wrong altogether.
BASELINE_SLACK = 16
OVERHEAD_REPEAT = 10
ENERGY_SECONDS = 0.2
#: In a problem's backends: whatever serves each operator by default.
AUTOMATIC = "automatic"

Function = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """One call that is measured: forward, or forward and backward, of one operator on one shape and dtype."""

    family: str
    operator: str  # its registered name; its gradient is <operator>_backward. Any name where backends are given
    shape_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    backward: bool
    ours: Function
    plain: Function  # plain PyTorch in any dtype: the eager baseline, what is compiled, and in float64 the truth
    make_inputs: Callable[[torch.device], list[Tensor]]
    traffic_bytes: int = 0  # the least that must move through device memory
    flops: int = 0
    libraries: Mapping[str, Function] = field(default_factory=dict)  # further baselines by name
    backends: tuple[str, ...] = ()  # that serve it, in place of all that can
    definition: Function | None = None  # what ours is checked against where plain draws noise of its own
    gradients: int | None = None  # the backward pass goes to so many of the inputs, in place of all
    in_place: bool = False  # it changes its inputs and returns them: each check has copies of its own
    tolerance: float | None = None  # of a whole model, relative to each of plain's outputs, in place of the contract

    def __str__(self) -> str:
        return "-".join([self.operator, self.shape_name, str(self.dtype).removeprefix("torch."), self.passes])

    @property
    def passes(self) -> str:
        return "forward+backward" if self.backward else "forward"


@dataclass(frozen=True)
class Variant:
    """One way to compute a problem: a baseline, or ours, which may be forced to a backend."""

    function: Function
    backend: str | None = None
    baseline: bool = False


@dataclass(frozen=True)
class Buffers:
    """One set of arguments: inputs, and for a backward pass the gradients of the outputs."""

    inputs: list[Tensor]
    upstream: list[Tensor]

    def to(self, dtype: torch.dtype) -> "Buffers":
        """Return the same values with every floating-point tensor in a dtype."""
        inputs = [
            tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
            for tensor in self.inputs
        ]
        return Buffers(inputs, [tensor.to(dtype) for tensor in self.upstream])

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs + self.upstream)


def serving_backends(operator: str, backward: bool, device: torch.device) -> list[str]:
    """Return the backends that can serve an operator here, the automatic choice first; the reference if none can."""
    names = [operator, f"{operator}_backward"] if backward else [operator]
    dispatchers = [_library.operators[name] for name in names]
    order = [name for name in dispatchers[0].order(device.type) if name != "reference"]
    return [b for b in order if all(d.why_not(b, device.type) is None for d in dispatchers)] or ["reference"]


def variants_of(problem: Problem, device: torch.device, compiled: bool = True) -> dict[str, Variant]:
    """Return every variant by name: eager, compile, the libraries, and ours on each backend that can serve."""
    variants = {"eager": Variant(problem.plain, baseline=True)}
    if compiled:
        mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
        variants["compile"] = Variant(torch.compile(problem.plain, dynamic=False, mode=mode), baseline=True)
    variants |= {name: Variant(function, baseline=True) for name, function in problem.libraries.items()}
    for backend in problem.backends or serving_backends(problem.operator, problem.backward, device):
        variants[f"ours:{backend}"] = Variant(problem.ours, None if backend == AUTOMATIC else backend)
    return variants


def measure(
    problem: Problem, device: torch.device, *, overhead: bool = False, compiled: bool = True, rounds: int = ROUNDS
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Check and time a problem's variants; return the result as it goes into the run's JSON, and every sample.

    With ``overhead``, what is timed is what a call costs the host, over runs of calls, beside eager PyTorch alone.
    ``compiled=False`` leaves torch.compile out, of calls that it would take many minutes for.
    """
    torch._dynamo.reset()
    sets = make_buffers(problem, device)
    variants = variants_of(problem, device, compiled=compiled and not overhead)
    checked = check(problem, variants, sets[0])
    timed = {
        name: Timed([_call(problem, variant.function, buffers) for buffers in sets], variant.backend)
        for name, variant in variants.items()
        if checked[name].get("correct")
    }
    timer, samples = _time(timed, device, overhead, rounds)
    for name, seconds in samples.items():
        checked[name] |= _summary(seconds)
        if not overhead:
            checked[name] |= _memory_and_energy(timed[name], device)
    result = {
        "family": problem.family,
        "operator": problem.operator,
        "shape_name": problem.shape_name,
        "shape": list(problem.shape),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "passes": problem.passes,
        "timer": timer,
        "traffic_bytes": 0 if overhead else problem.traffic_bytes,
        "flops": 0 if overhead else problem.flops,
        "rotating_bytes": sum(buffers.nbytes() for buffers in sets),
        "ours": next(name for name in variants if name.startswith("ours:")),
        "samples": rounds,
        "variants": checked,
        **gpu_state(device),
    }
    return result, samples


def make_buffers(problem: Problem, device: torch.device) -> list[Buffers]:
    """Return sets of random arguments that together do not fit into the last cache."""
    first = make_set(problem, device)
    count = math.ceil(CACHES * cache_bytes(device) / max(first.nbytes(), 1))
    return [first, *(make_set(problem, device) for _ in range(min(max(count, 2), MAX_SETS) - 1))]


def make_set(problem: Problem, device: torch.device) -> Buffers:
    """Return one set of random arguments."""
    inputs = problem.make_inputs(device)
    if not problem.backward:
        return Buffers(inputs, [])
    upstream = [torch.randn_like(output) for output in _tuple(problem.plain(*inputs))]
    leaves = [tensor.detach() for tensor in inputs]
    for tensor in leaves[: problem.gradients]:
        tensor.requires_grad_(tensor.is_floating_point())
    return Buffers(leaves, upstream)


def evaluate(function: Function, buffers: Buffers) -> tuple[Tensor, ...]:
    """Return the outputs, followed by the gradients of the inputs when there are gradients to send back."""
    outputs = _tuple(function(*buffers.inputs))
    if not buffers.upstream:
        return outputs
    wanted = [tensor for tensor in buffers.inputs if tensor.requires_grad]
    return outputs + torch.autograd.grad(outputs, wanted, buffers.upstream)


def check(problem: Problem, variants: Mapping[str, Variant], buffers: Buffers) -> dict[str, dict[str, Any]]:
    """Hold every variant's outputs and gradients against the contract of the operators, with float64 as the truth.

    Contract: max|variant - f64| <= 1.25 * max|plain PyTorch in the dtype - f64| + 1 ulp; a baseline may miss it by
    BASELINE_SLACK, and one that draws noise of its own is held to the shapes alone. A whole model, in which rounding
    errors of many layers meet, is held to plain PyTorch in its own dtype by the problem's tolerance. Returns for each
    variant {"correct", "error_over_bound"} (the largest over outputs and gradients), or {"correct": False, "failed":
    why} when it raises.
    """
    exact, bounds = _truth(problem, buffers)
    checked: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        try:
            with vidkern.backend(variant.backend):
                values = evaluate(variant.function, _own(problem, buffers))
        except Exception as error:  # a baseline's compiler may fail in any way, and the others still count
            checked[name] = {"correct": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            continue
        if variant.baseline and problem.definition is not None:
            checked[name] = {"correct": [v.shape for v in values] == [e.shape for e in exact], "error_over_bound": None}
            continue
        worst = max(error / bound for error, bound in zip(_errors(values, exact), bounds, strict=True))
        limit = BASELINE_SLACK if variant.baseline else 1
        checked[name] = {"correct": worst <= limit, "error_over_bound": worst if math.isfinite(worst) else None}
    return checked


def _own(problem: Problem, buffers: Buffers) -> Buffers:
    """Return the buffers, or copies where a problem writes to them."""
    return Buffers([tensor.clone() for tensor in buffers.inputs], []) if problem.in_place else buffers


def _truth(problem: Problem, buffers: Buffers) -> tuple[list[Tensor], list[float]]:
    """Return the values that variants are held to, and how far from each ours may be."""
    definition = problem.definition or problem.plain
    if problem.tolerance is not None:
        exact = [value.detach().double() for value in evaluate(definition, buffers)]
        return exact, [problem.tolerance * float(e.abs().max()) for e in exact]
    exact = [value.detach() for value in evaluate(definition, buffers.to(torch.float64))]
    eps = torch.finfo(problem.dtype).eps
    plain_errors = _errors(evaluate(definition, _own(problem, buffers)), exact)
    return exact, [1.25 * error + eps * float(e.abs().max()) for error, e in zip(plain_errors, exact, strict=True)]


def _errors(values: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return each value's largest error; NaN counts as infinite."""
    differences = [float((value.detach().double() - e).abs().max()) for value, e in zip(values, exact, strict=True)]
    return [math.inf if math.isnan(difference) else difference for difference in differences]


def _call(problem: Problem, function: Function, buffers: Buffers) -> Call:
    if problem.backward:
        return lambda: evaluate(function, buffers)
    return lambda: function(*buffers.inputs)


def _time(
    timed: Mapping[str, Timed], device: torch.device, overhead: bool, rounds: int
) -> tuple[str, dict[str, list[float]]]:
    """Return the timer's name and every variant's samples, after a warm-up of each."""
    if overhead or device.type == "cpu":
        clock = host_clock(device, OVERHEAD_REPEAT if overhead else 1)
        interleaved(timed, clock, rounds=2)
        return "overhead" if overhead else "host", interleaved(timed, clock, rounds)
    probe = interleaved(timed, event_clock(), rounds=5)
    if all(statistics.median(samples) >= GRAPH_BELOW for samples in probe.values()):
        return "events", interleaved(timed, event_clock(), rounds)
    try:
        graphs = {name: captured(variant) for name, variant in timed.items()}
    except RuntimeError:  # a variant that a graph cannot hold
        return "events", interleaved(timed, event_clock(), rounds)
    clock = event_clock(calls_in_one=len(next(iter(timed.values())).calls))
    interleaved(graphs, clock, rounds=2)
    return "graph", interleaved(graphs, clock, rounds)


def _summary(samples: Sequence[float]) -> dict[str, float]:
    """Return the median, and the range that holds the middle eight tenths."""
    low, *_, high = statistics.quantiles(samples, n=10)
    return {"seconds": statistics.median(samples), "low": low, "high": high}


def _memory_and_energy(variant: Timed, device: torch.device) -> dict[str, Any]:
    """Return one call's peak memory above what its arguments hold, and on a GPU its energy (None if not counted)."""
    with vidkern.backend(variant.backend):
        measured: dict[str, Any] = {"peak_bytes": peak_bytes(variant.calls[0], device)}
        if device.type == "cuda":
            measured["joules"] = energy(variant.calls, device)
        return measured


def energy(calls: Sequence[Call], device: torch.device) -> float | None:
    """Return the joules of one call, over enough of them for the GPU's counter to move often."""
    before = joules_used(device)
    done, start = 0, time.monotonic()
    while time.monotonic() - start < ENERGY_SECONDS:
        for call in calls:
            call()
        torch.cuda.synchronize(device)
        done += len(calls)
    after = joules_used(device)
    return None if before is None or after is None else (after - before) / done


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

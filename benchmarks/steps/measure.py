"""Measures a training step or a DDIM run of every variant: checked against plain PyTorch first, then timed in turn."""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.ceilings import product_seconds
from benchmarks.environment import gpu_state
from benchmarks.harness import energy
from benchmarks.launches import launches
from benchmarks.memory import noted_peak, peak_bytes
from benchmarks.steps.flops import flops_of
from benchmarks.steps.parts import parts_of, split
from benchmarks.steps.prediction import counted
from benchmarks.steps.variants import DDIM_STEPS, SAMPLING, TRAINING, Setting, Variant, Variants, Way, ways
from benchmarks.timers import Timed, event_clock, host_clock, interleaved

#: Steps of the DDIM run that are taken where a whole one would take minutes.
FEW_STEPS = 2
#: Rounds of each task, on a GPU and on a CPU.
ROUNDS = {"cuda": {TRAINING: 10, SAMPLING: 3}, "cpu": {TRAINING: 4, SAMPLING: 3}}
#: Largest relative error (2-norm over all of an output, or over all gradients) of a variant that is right. Two of a
#: bfloat16 network's layers round at every step of a chain of dozens; what each variant reaches is in the result.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
TF32_TOLERANCE = 1e-2


def measure(setting: Setting, task: str, device: torch.device) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return a setting's result as it goes into the run's JSON, and every sample of every variant.

    In a result "seconds" are those of a training step, or of a DDIM run of DDIM_STEPS.
    """
    torch._dynamo.reset()
    made = Variants(setting, device)
    variants = {way.name: made.make(way) for way in ways(device, both_precisions=task == TRAINING)}
    steps = DDIM_STEPS if device.type == "cuda" else FEW_STEPS
    calls = {name: call_of(variant, setting, task, steps, device) for name, variant in variants.items()}
    truth = _truth(made, setting, task, device)
    results: dict[str, dict[str, Any]] = {}

    def admit(name: str, variant: Variant, call: Callable[[], object]) -> None:
        results[name] = _described(variant.way) | checked(variant, truth, setting, task, device)
        if results[name]["correct"]:
            results[name] |= _attempt(lambda: watched(variant, call, device))
            if task == TRAINING:
                results[name] |= _attempt(lambda: {"saved_bytes_a_block": saved_bytes(variant, setting, device)})

    _attempt(lambda: {"": [calls[name]() for name in _one_of_each(variants)]})  # makes the optimisers' state
    for name, variant in variants.items():
        admit(name, variant, calls[name])
    for way in [_compiled(results, variants, ours) for ours in (False, True)]:
        if way is not None:
            variants[way.name] = made.make(way)
            calls[way.name] = call_of(variants[way.name], setting, task, steps, device)
            admit(way.name, variants[way.name], calls[way.name])

    clock = event_clock() if device.type == "cuda" else host_clock(device)
    timed = {name: Timed([calls[name]]) for name, result in results.items() if "peak_bytes" in result}
    rounds = ROUNDS[device.type][task]
    scale = DDIM_STEPS / steps if task == SAMPLING else 1.0
    samples = {name: [scale * s for s in taken] for name, taken in interleaved(timed, clock, rounds).items()}
    for name, taken in samples.items():
        results[name] |= {"seconds": statistics.median(taken), "low": min(taken), "high": max(taken)}
        if device.type == "cuda":
            joules = energy([calls[name]], device)
            results[name]["joules"] = None if joules is None else joules * scale
    admitted = {name: variant for name, variant in variants.items() if name in timed}
    for name, count in launches_of(admitted, setting, task, device).items():
        results[name]["launches"] = count
    mine = [name for name in results if variants[name].way.ours]
    eager = [name for name in mine if not variants[name].way.compiled]
    return {
        "family": "models",
        "operator": setting.name,
        "shape_name": f"batch {setting.batch}",
        "shape": list(setting.shape),
        "dtype": "",
        "passes": task,
        "timer": "events" if device.type == "cuda" else "host",
        "traffic_bytes": 0,
        "flops": flops_of(setting, task),
        "rotating_bytes": 0,
        "ours": min(eager, key=lambda name: results[name].get("seconds", math.inf)),
        "samples": rounds,
        "product_teraflops": _products(device),
        "setting": dataclasses.asdict(setting),
        "steps_taken": steps if task == SAMPLING else 1,
        "variants": results,
        **gpu_state(device),
    }, samples


def _products(device: torch.device) -> dict[str, float]:
    """Return what a large product reaches in each precision: TFLOP/s."""
    size, clock = (8192, event_clock()) if device.type == "cuda" else (1024, host_clock(device))
    dtypes = (torch.float32, torch.bfloat16)
    return {_name(d): 2 * size**3 / product_seconds(size, d, device, clock) / 1e12 for d in dtypes}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(way: Way) -> dict[str, Any]:
    return {"letter": way.letter, "ours": way.ours, "dtype": _name(way.dtype)}


def _one_of_each(variants: Mapping[str, Variant]) -> list[str]:
    """Return the name of one variant of plain PyTorch's and of one of ours."""
    return list({variant.way.ours: name for name, variant in variants.items()}.values())


def _compiled(results: Mapping[str, Any], variants: Mapping[str, Variant], ours: bool) -> Way | None:
    """Return the way that is compiled: the one of its kind that the watched call was fastest in."""
    found = {
        name: results[name]["watched_seconds"]
        for name, variant in variants.items()
        if variant.way.ours == ours and variant.way.attention == "sdpa" and "watched_seconds" in results[name]
    }
    return dataclasses.replace(variants[min(found, key=found.__getitem__)].way, compiled=True) if found else None


def _attempt(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured, or why it could not be: a variant may not fit into a GPU's memory."""
    try:
        return measured()
    except Exception as error:  # a compiler may fail in any way, and the other variants still count
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


# --- the calls, and the check ---


def call_of(variant: Variant, setting: Setting, task: str, steps: int, device: torch.device) -> Callable[[], object]:
    """Return what is timed: a training step on clips of the host, or a DDIM run of so many steps."""
    x0, y = setting.clips()
    if task == TRAINING:
        if device.type == "cuda":
            x0, y = x0.pin_memory(), y.pin_memory()
        if variant.way.ours:
            return lambda: variant.train(x0, y)
        return lambda: variant.train(x0, y).item()  # the public code reads the loss of every step
    start, y = x0.to(device), y.to(device)
    return lambda: variant.sample(start, y, steps)


def evaluated(variant: Variant, setting: Setting, task: str, device: torch.device) -> list[Tensor]:
    """Return, in float64, the loss and every gradient of a clip, or the clips of a DDIM run of a few steps."""
    torch.manual_seed(1)
    x0, y = (tensor.to(device) for tensor in setting.clips(1))
    network = variant.network.eval()  # nothing is dropped
    x0 = x0.to(next(network.parameters()).dtype)
    if task == SAMPLING:
        return [variant.sample(x0, y, FEW_STEPS).double()]
    t = torch.randint(1, 1000, x0.shape[:2] if setting.per_frame else (1,), device=device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    loss = variant.loss(x0, t, y, torch.tensor([3, 5], device=device))
    gradients = torch.autograd.grad(loss, parameters)
    return [loss.detach().double()[None], torch.cat([gradient.double().flatten() for gradient in gradients])]


def checked(variant: Variant, truth: list[Tensor], setting: Setting, task: str, device: torch.device) -> dict[str, Any]:
    """Return {"correct", "error": the largest relative error}, or why the variant does not run."""
    found = _attempt(lambda: {"values": evaluated(variant, setting, task, device)})
    if "failed" in found:
        return {"correct": False, **found}
    error = max(float((v - e).norm() / e.norm()) for v, e in zip(found["values"], truth, strict=True))
    tf32 = device.type == "cuda" and variant.way.dtype == torch.float32
    limit = TF32_TOLERANCE if tf32 else TOLERANCE[variant.way.dtype]
    return {"correct": error <= limit, "error": error if math.isfinite(error) else None}


def _truth(made: Variants, setting: Setting, task: str, device: torch.device) -> list[Tensor]:
    """Return what the variants are held to: in float64, or on a GPU, which may not hold that, float32 without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        exact = made.exact(torch.float64 if device.type == "cpu" else torch.float32)
        return evaluated(exact, setting, task, device)
    finally:
        torch.set_float32_matmul_precision(before)


# --- what is watched in one call ---


def watched(variant: Variant, call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Return a call's peak memory, its seconds by part, and the bytes that a block saves for its backward pass."""
    found: dict[str, Any] = {}
    compiled = variant.way.compiled  # hooks would break its graphs
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with (
        contextlib.nullcontext() if compiled else parts_of(variant.network, variant.optimiser),
        profile(activities=activities, profile_memory=device.type == "cpu") as profiled,
    ):
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    parts = split(profiled, device)
    found["watched_seconds"] = sum(parts.values())
    if not compiled:
        found["parts"] = parts
    found["peak_bytes"] = peak_bytes(call, device) if device.type == "cuda" else noted_peak(profiled)
    return found


def saved_bytes(variant: Variant, setting: Setting, device: torch.device) -> float:
    """Return the bytes that the graph of a batch's forward pass saves, for each block; parameters do not count."""
    storages: dict[int, Tensor] = {}
    held = {parameter.untyped_storage().data_ptr() for parameter in variant.network.parameters()}

    def save(tensor: Tensor) -> None:  # the graph gets nothing: what it and `storages` both hold would never be freed
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())  # so that no address is used twice

    x0, y = (tensor.to(device) for tensor in setting.clips())
    t = torch.randint(1, 1000, x0.shape[:2] if setting.per_frame else (len(x0),), device=device)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda nothing: nothing):
        variant.loss(x0, t, y, torch.tensor([3, 5], device=device))
    total = sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in held)
    return total / setting.config.depth


def launches_of(variants: Mapping[str, Variant], setting: Setting, task: str, device: torch.device) -> dict[str, int]:
    """Return each eager variant's launches in a training step or in a DDIM step, by its name.

    They are those that the profiler sees on a GPU; without one, the operators that do work as they are dispatched (of
    which DDIM's are the network's).
    """
    found = {}
    for name, variant in variants.items():
        if variant.way.compiled:
            continue
        if device.type == "cpu":
            found[name] = round(sum(times for _, times in counted(setting, variant.way, task)))
            continue
        call = call_of(variant, setting, task, 1, device)
        call()
        found[name] = launches(call, device).total()
    return found

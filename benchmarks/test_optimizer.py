"""The optimiser's part of a training step: gradient norm, clipping, AdamW and EMA of a whole network's weights."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.environment import default_device
from benchmarks.harness import Problem
from benchmarks.sample_clock import sample_clock
from models.latte import latte
from vidkern import ops

pytestmark = pytest.mark.benchmark(group="optimizer", timer=sample_clock)

ON_GPU = default_device().type == "cuda"
MAX_NORM = 0.1
STEP = 10.0
SETTINGS: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
DECAY = 0.9999
LISTS = 5  # weights, gradients, two moments, averages
#: The norm reads the gradients; the step reads all five and writes all but these.
ACCESSES = 1 + LISTS + LISTS - 1


def lists_of(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return weights, gradients, first and second moments and averages, given one after another."""
    count = len(tensors) // LISTS
    return [list(tensors[i * count : (i + 1) * count]) for i in range(LISTS)]


def changed(*lists: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensors in lists for tensor in tensors)


def steps_like(params: list[Tensor]) -> list[Tensor]:
    return [torch.full((), STEP, device=p.device) for p in params]


def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What models/training does: the norm, then one pass that scales, steps and averages."""
    params, grads, means, squares, averages = lists_of(tensors)
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    options: dict[str, Any] = {name: SETTINGS[name] for name in ("lr", "eps", "weight_decay")}
    lists = (params, grads, means, squares, steps_like(params), averages)
    ops.adamw_ema_(*lists, betas=betas, ema_decay=DECAY, grad_scale=clipping(grads), **options)
    return changed(params, means, squares, averages)


def clipping(grads: list[Tensor]) -> Tensor:
    """Return what scales the gradients down, on their device."""
    norm = nn.utils.get_total_norm(grads)
    return (torch.full_like(norm, MAX_NORM) / (norm + 1e-6)).clamp(max=1)


def with_adamw(adamw: Callable[..., Any], average: Callable[[list[Tensor], list[Tensor]], None]) -> Callable[..., Any]:
    """Return clipping, an implementation of AdamW and an average, one after another."""

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        params, grads, means, squares, averages = lists_of(tensors)
        torch._foreach_mul_(grads, clipping(grads))  # as torch.nn.utils.clip_grad_norm_
        adamw(params, grads, means, squares, [], steps_like(params), amsgrad=False, maximize=False, **SETTINGS)
        average(averages, params)
        return changed(params, means, squares, averages)

    return step


def foreach_average(averages: list[Tensor], params: list[Tensor]) -> None:
    torch._foreach_lerp_(averages, params, 1 - DECAY)


def looped_average(averages: list[Tensor], params: list[Tensor]) -> None:
    """As DiT's and Latte's update_ema."""
    for average, p in zip(averages, params, strict=True):
        average.mul_(DECAY).add_(p, alpha=1 - DECAY)


def foreach_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    largest: list[Tensor],
    steps: list[Tensor],
    **options: Any,
) -> None:
    torch._foreach_sub_(steps, 1)  # it counts by itself
    torch.optim._functional.adamw(params, grads, means, squares, largest, steps, foreach=True, **options)


fused = with_adamw(torch._fused_adamw_, foreach_average)
unfused = with_adamw(foreach_adamw, looped_average)


def step_problem(name: str, shapes: Sequence[Sequence[int]]) -> Problem:
    """Return a step of every parameter of a network in float32."""
    count = sum(torch.Size(shape).numel() for shape in shapes)

    def make_inputs(device: torch.device) -> list[Tensor]:
        params, grads, means, averages = ([torch.randn(tuple(s), device=device) for s in shapes] for _ in range(4))
        squares = [torch.rand(tuple(s), device=device) for s in shapes]
        return [*params, *grads, *means, *squares, *averages]

    return Problem(
        family="optimizer",
        operator="adamw_ema_",
        shape_name=name,
        shape=(count,),
        dtype=torch.float32,
        backward=False,
        ours=ours,
        plain=fused,
        make_inputs=make_inputs,
        traffic_bytes=ACCESSES * count * torch.float32.itemsize,
        libraries={"foreach AdamW, looped EMA": unfused},
        in_place=True,
    )


def network_problem(name: str) -> Problem:
    with torch.device("meta"):
        network = latte(name)
    return step_problem(name, [p.shape for p in network.parameters() if p.requires_grad])


def problems() -> list[Problem]:
    """Return what is timed, the most telling first: a run may be cut short."""
    return [network_problem(name) for name in (("Latte-XL/2", "Latte-B/2") if ON_GPU else ("Latte-S/2",))]


def small_problems() -> list[Problem]:
    """Return a small, ragged case of every kernel: what compute-sanitizer runs."""
    return [step_problem("ragged", [(1,), (7, 5), (1023,), (3, 5, 3, 3, 3)])]


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_speed(problem: Problem, measured: Any) -> None:
    measured(problem, compiled=False)

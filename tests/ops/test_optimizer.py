"""The optimiser's operator: every backend against float64 and torch's own AdamW, its checks, its registration."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vidkern
from tests.ops.backends import kernels_of
from tests.ops.common import KERNEL_DTYPES, assert_contract, no_synchronisation
from vidkern import _library, ops
from vidkern.ops.optimizer import reference

BACKENDS = ("reference", "cpu", "cuda")
STEPS = 20
SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
DTYPES = [*((dtype, dtype) for dtype in KERNEL_DTYPES), *((dtype, torch.float32) for dtype in KERNEL_DTYPES[1:])]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class State(NamedTuple):
    """What a step reads and changes."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    averages: list[Tensor]

    def copy(self, dtype: torch.dtype, average_dtype: torch.dtype) -> "State":
        """The same values in other dtypes, laid out in memory as they are here."""
        kinds = (dtype, dtype, dtype, average_dtype)
        return State(*([like(t, kind) for t in tensors] for tensors, kind in zip(self, kinds, strict=True)))


def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that begins where 16 bytes do not, if the tensor's storage does too."""
    room = torch.empty(tensor.numel() + tensor.storage_offset(), dtype=dtype)[tensor.storage_offset() :]
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


def problem(seed: int = 0) -> tuple[State, list[list[Tensor]]]:
    """Parameters of ragged sizes, one unaligned and one channels-last, their state, and gradients of every step."""
    torch.manual_seed(seed)
    tensors: list[Tensor] = [torch.randn(n) for n in (1, 7, 8, 521, 20001, 0)]
    tensors.append(torch.randn(1030)[3:])
    tensors.append(torch.randn(6, 5, 3, 3, 3).to(memory_format=torch.channels_last_3d))
    state = State(
        tensors,
        [torch.zeros_like(p) for p in tensors],
        [torch.zeros_like(p) for p in tensors],
        [p + 0.1 * torch.randn_like(p) for p in tensors],
    )
    powers = [[torch.empty_like(p).uniform_(-4, 1) for p in tensors] for _ in range(STEPS)]
    return state, [[torch.exp2(power) * power.sign() for power in some] for some in powers]


def steps_of(params: list[Tensor], t: int) -> list[Tensor]:
    return [torch.full((), float(t), device=p.device) for p in params]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def train(
    run: Callable[..., None], state: State, grads: list[list[Tensor]], average: bool = True, scale: float | None = 0.3
) -> State:
    """Take every step with the operator's own arguments; the rates change from step to step."""
    for t, gradients in enumerate(grads, 1):
        now = [like(g, p.dtype) for g, p in zip(gradients, state.params, strict=True)]
        before = [g.clone() for g in now]
        run(
            state.params,
            now,
            state.exp_avgs,
            state.exp_avg_sqs,
            steps_of(state.params, t),
            state.averages if average else [],
            number(1e-2 / t),
            *SETTINGS["betas"],
            SETTINGS["eps"],
            SETTINGS["weight_decay"],
            number(1 - 1 / (t + 1)),
            None if scale is None else torch.tensor(scale),
        )
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)
    return state


def by_torch(state: State, grads: list[list[Tensor]], scale: float | None = 0.3) -> State:
    """The same by torch.optim.AdamW and lerp."""
    optimizer = torch.optim.AdamW(state.params, fused=True, **SETTINGS)
    for t, gradients in enumerate(grads, 1):
        for p, g in zip(state.params, gradients, strict=True):
            p.grad = like(g, p.dtype) * (1 if scale is None else scale)
        optimizer.param_groups[0]["lr"] = 1e-2 / t
        optimizer.step()
        for average, p in zip(state.averages, state.params, strict=True):
            average.lerp_(p.to(average.dtype), 1 / (t + 1))
    moments = [optimizer.state[p] for p in state.params]
    return State(state.params, [m["exp_avg"] for m in moments], [m["exp_avg_sq"] for m in moments], state.averages)


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """The operator on a backend, below its checks; CUDA's kernel on the emulator where there is no GPU."""
    if request.param == "reference":
        yield reference.adamw_ema_
        return
    kernels = kernels_of("optimizer", request.param)
    if kernels.device == "cpu":
        yield kernels.find("adamw_ema_")
        return

    def on_the_device(*args: Any) -> None:
        moved = [
            [t.cuda() for t in a] if isinstance(a, list) else a.cuda() if isinstance(a, Tensor) else a for a in args
        ]
        kernels.find("adamw_ema_")(*moved)
        for ours, theirs in zip(args, moved, strict=True):
            for a, b in zip(ours, theirs, strict=True) if isinstance(ours, list) else ():
                a.copy_(b)

    yield on_the_device


@pytest.mark.parametrize(("dtype", "average_dtype"), DTYPES, ids=str)
def test_many_steps_are_those_of_torch_in_float64(
    run: Callable[..., None], dtype: torch.dtype, average_dtype: torch.dtype
) -> None:
    start, grads = problem()
    start, grads = start.copy(dtype, average_dtype), [[like(g, dtype) for g in some] for some in grads]
    count = STEPS if dtype == torch.float32 else 3
    plain = by_torch(start.copy(dtype, average_dtype), grads[:count])
    exact = train(reference.adamw_ema_, start.copy(torch.float64, torch.float64), grads[:count])
    ours = train(run, start.copy(dtype, average_dtype), grads[:count])
    for name, *every in zip(State._fields, ours, plain, exact, strict=True):
        assert_contract(name, *(torch.cat([t.flatten() for t in tensors]) for tensors in every))


def test_the_definition_is_torch_s_optimiser_in_float64() -> None:
    start, grads = problem()
    start = start.copy(torch.float64, torch.float64)
    grads = [[g.double() for g in some] for some in grads]
    ours = train(reference.adamw_ema_, start.copy(torch.float64, torch.float64), grads, scale=None)
    theirs = by_torch(start.copy(torch.float64, torch.float64), grads, scale=None)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)


def test_without_averages_the_weights_are_the_same(run: Callable[..., None]) -> None:
    start, grads = problem()
    with_averages, without = start.copy(torch.float32, torch.float32), start.copy(torch.float32, torch.float32)
    train(run, with_averages, grads[:2])
    train(run, without, grads[:2], average=False)
    assert all(torch.equal(a, b) for a, b in zip(with_averages.params, without.params, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(without.averages, start.averages, strict=True))


def test_more_parameters_than_a_launch_takes(run: Callable[..., None]) -> None:
    torch.manual_seed(0)
    params = [torch.randn(3) for _ in range(400)]
    state = State(params, *([torch.zeros(3) for _ in params] for _ in range(2)), [p + 1 for p in params])
    grads = [[torch.randn(3) for _ in params]]
    exact = train(reference.adamw_ema_, state.copy(torch.float64, torch.float64), grads)
    ours = train(run, state.copy(torch.float32, torch.float32), grads)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(torch.stack(a).double(), torch.stack(b), rtol=1e-5, atol=1e-6)


def test_nan_and_inf_go_where_torch_s_do(run: Callable[..., None]) -> None:
    p = torch.ones(8)
    state = State([p], [torch.zeros(8)], [torch.zeros(8)], [torch.zeros(8)])
    bad = torch.tensor([1.0, math.nan, math.inf, -math.inf, 1e30, 0.0, -1.0, 2.0])
    plain = by_torch(state.copy(torch.float32, torch.float32), [[bad]])
    ours = train(run, state.copy(torch.float32, torch.float32), [[bad]])
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a[0].isfinite(), b[0].isfinite())
        torch.testing.assert_close(a[0], b[0], equal_nan=True)


# ---- the public function


def arguments(**changes: Any) -> tuple[list[Any], dict[str, Any]]:
    lists = {
        "params": [torch.ones(4, 3), torch.ones(5)],
        "grads": [torch.ones(4, 3), torch.ones(5)],
        "exp_avgs": [torch.zeros(4, 3), torch.zeros(5)],
        "exp_avg_sqs": [torch.zeros(4, 3), torch.zeros(5)],
        "steps": [torch.tensor(1.0), torch.tensor(1.0)],
        "averages": [torch.zeros(4, 3), torch.zeros(5)],
    }
    named: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.0, "ema_decay": 0.75}
    for name, value in changes.items():
        (lists if name in lists else named)[name] = value
    return list(lists.values()), named


def test_numbers_may_be_tensors_and_give_the_same_bits() -> None:
    results = []
    for make in (float, number):
        lists, named = arguments(lr=make(1e-3), ema_decay=make(0.9), grad_scale=torch.tensor(0.7))
        ops.adamw_ema_(*lists, **named)
        results.append([*lists[0], *lists[5]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], torch.ones(4, 3))


def test_a_first_step_by_hand() -> None:
    lists, named = arguments()
    ops.adamw_ema_(*lists, **named)
    torch.testing.assert_close(lists[0][1], torch.full((5,), 0.5))  # one lr against the gradient
    torch.testing.assert_close(lists[5][1], torch.full((5,), 0.125))  # a quarter of the way
    assert lists[4][0].item() == 1.0


def test_a_backward_pass_that_saved_the_weights_notices() -> None:
    lists, named = arguments()
    weight = lists[0][0].requires_grad_()
    loss = (weight * weight).sum()
    ops.adamw_ema_(*lists, **named)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_parameters_are_no_step() -> None:
    ops.adamw_ema_([], [], [], [], [], lr=1.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grads": [torch.ones(4, 3)]}, ValueError, "grads must have one tensor for each of the 2 params, got 1"),
        ({"grads": [torch.ones(3, 4), torch.ones(5)]}, ValueError, r"grads\[0\] must be the shape of params\[0\]"),
        (
            {"grads": [torch.ones(3, 4).T, torch.ones(5)]},
            ValueError,
            r"grads\[0\] must have the strides of params\[0\]",
        ),
        ({"exp_avgs": [torch.ones(4, 3), torch.ones(5).double()]}, TypeError, r"exp_avgs\[1\] must be float32, got"),
        ({"exp_avg_sqs": [torch.ones(4, 3), None]}, TypeError, r"exp_avg_sqs\[1\] must be a torch.Tensor"),
        ({"averages": [torch.ones(4, 3).half(), torch.ones(5).half()]}, TypeError, r"averages\[0\] must be float32"),
        ({"averages": [torch.ones(4, 3), torch.ones(6)]}, ValueError, r"averages\[1\] must be the shape of"),
        ({"steps": [torch.tensor(1.0), torch.tensor(1)]}, TypeError, r"steps\[1\] must be float32, got int64"),
        ({"steps": [torch.tensor(1.0)]}, ValueError, "steps must have one tensor for each"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be two numbers from 0 to below 1"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be at least 0, got nan"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1.0"),
        ({"lr": torch.ones(1)}, ValueError, r"lr must be \(\)"),
        ({"ema_decay": 1.5}, ValueError, "ema_decay must be from 0 to 1, got 1.5"),
        ({"grad_scale": torch.tensor(1)}, TypeError, "grad_scale must be float32 or float64"),
        ({"params": [torch.ones(4, 3, device="meta"), torch.ones(5)]}, ValueError, "must be on the device of params"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    lists, named = arguments(**changes)
    with pytest.raises(error, match=message):
        ops.adamw_ema_(*lists, **named)


def test_gaps_in_memory_are_refused() -> None:
    gaps = [torch.ones(4, 6)[:, ::2]]
    with pytest.raises(ValueError, match=r"params\[0\] must be dense in memory, got shape \(4, 3\) with strides"):
        ops.adamw_ema_(gaps, gaps, gaps, gaps, [torch.tensor(1.0)], lr=1.0)


def test_the_registration_is_whole() -> None:
    lists, _ = arguments()
    numbers = (number(1e-2), 0.9, 0.99, 1e-8, 0.1, number(0.9))
    for averages, scale in ((lists[5], torch.tensor(0.5)), ([], None)):
        torch.library.opcheck(torch.ops.vidkern.adamw_ema_.default, (*lists[:5], averages, *numbers, scale))


def test_a_compiled_step_is_the_step() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.adamw_ema_, fullgraph=True, backend="aot_eager")
    results = []
    for function in (ops.adamw_ema_, compiled):
        lists, named = arguments(lr=number(1e-2), ema_decay=number(0.9))
        function(*lists, **named)
        results.append([*lists[0], *lists[2], *lists[3], *lists[5]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_thread_count_gives_the_same_bits() -> None:
    start, grads = problem()
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(
            train(kernels_of("optimizer", "cpu").find("adamw_ema_"), start.copy(*[torch.float32] * 2), grads[:2])
        )
    torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_cuda
def test_a_gpu_does_not_wait() -> None:
    lists, named = arguments(grad_scale=torch.tensor(0.5, device="cuda"))
    lists = [[t.cuda() for t in tensors] for tensors in lists]
    with no_synchronisation():
        ops.adamw_ema_(*lists, **named)
    assert _library.operators["adamw_ema_"].why_not("cuda", "cuda") is None
    torch.testing.assert_close(lists[0][1].cpu(), torch.full((5,), 0.5))


def test_float64_is_served_by_the_definition() -> None:
    lists, named = arguments()
    lists = [[t.double() for t in tensors] if i != 4 else tensors for i, tensors in enumerate(lists)]
    ops.adamw_ema_(*lists, **named)
    torch.testing.assert_close(lists[0][1], torch.full((5,), 0.5, dtype=torch.float64))
    with pytest.raises(vidkern.BackendError, match="float64"), vidkern.backend("cpu"):
        ops.adamw_ema_(*lists, **named)

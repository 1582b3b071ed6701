"""The counts of launches: what counts as one, ours on the emulator, and the table."""

import pytest
import torch

from benchmarks import launches
from benchmarks.launches import Dispatched, Step
from benchmarks.noise_quality import QUICK_LATTE
from vidkern import ops

CPU = torch.device("cpu")
X = torch.randn(2, 3, 4, 5, 6, device=CPU)
LEVEL = torch.rand(2, 3, device=CPU)
QKV = torch.randn(1, 1, 4, 3, 1, 32, device=CPU)
KEY = torch.tensor([1, 2], device=CPU)

TOKENS = torch.randn(6, 8, device=CPU)


def adamw_ema(params: list[torch.Tensor]) -> None:
    """Take a step: two counts of steps, two numbers, and the operator."""
    steps = [torch.ones(()) for _ in params]
    ops.adamw_ema_(params, params, params, params, steps, params, lr=0.1)


OPERATORS = {
    "a view": (lambda: X.transpose(1, 2)[0].reshape(4, 3, 30).unbind(), 0),
    "a new tensor without values": (lambda: torch.empty_like(X), 0),
    "a product": (lambda: X * X, 1),
    "a copy that a view needs": (lambda: X.transpose(1, 2).reshape(-1), 1),
    "a change in place": (lambda: X.clone().add_(1), 2),
    "an empty result": (lambda: X[:0] * 2, 0),
    "a list that is changed in place": (lambda: torch._foreach_mul_([X.clone(), X[0].clone()], 2.0), 3),
    "a list of results": (lambda: torch._foreach_norm([X, X[0]]), 1),
    "add_noise": (lambda: ops.add_noise(X, LEVEL, LEVEL, KEY), 1),
    "a loss of small frames": (lambda: ops.diffusion_mse(X, X, LEVEL, LEVEL, KEY), 1),
    "a loss of frames of several blocks": (
        lambda: ops.diffusion_mse(*[X.repeat(1, 1, 8, 2, 2)] * 2, LEVEL, LEVEL, KEY),
        2 + 1,  # the repeat
    ),
    "GELU again, its gradient and the sum of that": (lambda: torch.ops.vidkern.gelu_mlp_backward(TOKENS, TOKENS), 2),
    "AdamW and the average of two weights": (lambda: adamw_ema([torch.ones(5), torch.ones(7, 3)]), 2 + 2 + 2 + 1),
    "the definition's operators": (lambda: ops.philox_normal((1, 1, 4), KEY, dtype=torch.float64), None),
}


@pytest.mark.parametrize(("operator", "wanted"), OPERATORS.values(), ids=OPERATORS)
def test_what_counts_as_a_launch(operator, wanted):
    with Dispatched() as dispatched:
        operator()
    found = dispatched.launches.total()
    assert found == wanted if wanted is not None else found > 50


def test_a_librarys_kernel_counts_as_one():
    with Dispatched() as dispatched:
        o = ops.spatial_attention(QKV)
    assert dispatched.launches == {"attention_packed": 1}
    assert torch.equal(o, ops.spatial_attention(QKV))


def test_the_backward_pass_counts():
    x = X.clone().requires_grad_()
    with Dispatched() as dispatched:
        x.square().mean().backward()
    assert 5 <= dispatched.launches.total() <= 8  # square, mean, its gradient's seed and spread, the product's two


def test_ours_needs_a_fraction_of_the_launches():
    found = launches.measure(QUICK_LATTE, parts=3)["steps"]
    plain, ours = ([sum(step[by].values()) for step in found] for by in ("plain", "ours"))
    assert plain[0] > 100 < 20 * ours[0]
    assert plain[1] > 40
    assert all(5 * mine < theirs for theirs, mine in zip(plain, ours, strict=True))
    assert found[2]["ours"]["adamw_ema_"] == found[2]["plain"]["_foreach_norm"] == 1


def test_a_steps_launches_are_those_of_the_last():
    def take(times: int) -> None:
        X.clone()  # happens once
        for _ in range(times):
            X.add(1).mul_(2)

    for taken in (1, 3):
        assert Step("", take, take, taken).count(take, CPU) == {"add": 1, "mul_": 1}


def test_the_tables_say_how_it_was_counted_and_what():
    step = {"step": "a step", "plain": {"mul": 20, "add": 10}, "ours": {"x": 1, "y": 3}}
    record = {"commit": "abc", "counted_by": "by hand", "network": "Latte", "steps": [step]}
    told = launches.table(record)
    assert told.startswith("Latte, commit abc. Counted: by hand.")
    assert [cell.strip() for cell in told.splitlines()[-1].split("|")[1:-1]] == ["a step", "30", "4", "7.5x"]
    assert "| y 3, x 1  " in launches.operators_table(record).splitlines()[-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_profiler_sees_launches():
    x = torch.randn(1000, device="cuda")
    assert launches.launches(lambda: x.mul(2).add(1).t(), torch.device("cuda")).total() == 2

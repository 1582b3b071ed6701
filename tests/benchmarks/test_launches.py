"""The counts of launches: what counts as one, ours on the emulator, and the table."""

import itertools

import pytest
import torch

from benchmarks import launches
from benchmarks.launches import Counter, Dispatched
from models.latte import LatteConfig
from vidkern import ops

CPU = torch.device("cpu")
X = torch.randn(2, 3, 4, 5, 6, device=CPU)
LEVEL = torch.rand(2, 3, device=CPU)
QKV = torch.randn(1, 1, 4, 3, 1, 32, device=CPU)
KEY = torch.tensor([1, 2], device=CPU)

OPERATORS = {
    "a view": (lambda: X.transpose(1, 2)[0].reshape(4, 3, 30).unbind(), 0),
    "a new tensor without values": (lambda: torch.empty_like(X), 0),
    "a product": (lambda: X * X, 1),
    "a copy that a view needs": (lambda: X.transpose(1, 2).reshape(-1), 1),
    "a change in place": (lambda: X.clone().add_(1), 2),
    "an empty result": (lambda: X[:0] * 2, 0),
    "add_noise": (lambda: ops.add_noise(X, LEVEL, LEVEL, KEY), 1),
    "a loss of small frames": (lambda: ops.diffusion_mse(X, X, LEVEL, LEVEL, KEY), 1),
    "a loss of frames of several blocks": (
        lambda: ops.diffusion_mse(*[X.repeat(1, 1, 8, 2, 2)] * 2, LEVEL, LEVEL, KEY),
        2 + 1,  # the repeat
    ),
    "the definition's operators": (lambda: ops.philox_normal((1, 1, 4), KEY, dtype=torch.float64), None),
}


@pytest.mark.parametrize(("operator", "wanted"), OPERATORS.values(), ids=OPERATORS)
def test_what_counts_as_a_launch(operator, wanted):
    with Dispatched() as dispatched:
        operator()
    assert dispatched.count == wanted if wanted is not None else dispatched.count > 50


def test_a_librarys_kernel_counts_as_one(monkeypatch):
    monkeypatch.setattr(launches, "FAMILIES", ("noise",))  # none has it, and the others take long to compile
    with Dispatched() as dispatched:
        o = ops.spatial_attention(QKV)
    assert dispatched.count == 1
    assert torch.equal(o, ops.spatial_attention(QKV))


def test_the_backward_pass_counts():
    x = X.clone().requires_grad_()
    with Dispatched() as dispatched:
        x.square().mean().backward()
    assert 5 <= dispatched.count <= 8  # square, mean, its gradient's seed and spread, the product's two


def test_ours_needs_a_fraction_of_the_launches():
    config = LatteConfig(input_size=8, hidden_size=64, depth=2, num_heads=2, num_frames=3, num_classes=101)
    noise, step = (
        {name: launches.count(take, CPU) for name, take in (("plain", step.plain), ("ours", step.ours))}
        for step in itertools.islice(launches.steps(config, CPU), 2)
    )
    assert noise["plain"] > 100
    assert noise["ours"] < noise["plain"] / 5
    assert step["plain"] > 40
    assert step["ours"] < step["plain"] / 5


def test_a_counter_counts_between_start_and_stop():
    counter = Counter(CPU)
    X.add(1)
    counter.start()
    X.add(1)
    counter.stop()
    X.add(1)
    assert counter.count == 1


def test_the_table_says_how_it_was_counted():
    step = {"step": "a step", "plain": 30, "ours": 4}
    table = launches.table({"counted_by": "by hand", "network": "Latte", "steps": [step]})
    assert table.startswith("Latte, float32. Counted: by hand.")
    assert [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]] == ["a step", "30", "4", "7.5x"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_profiler_sees_launches():
    def take(counter: Counter) -> None:
        x = torch.randn(1000, device="cuda")
        counter.start()
        x.mul(2).add(1).t()
        counter.stop()

    assert launches.count(take, torch.device("cuda")) == 2

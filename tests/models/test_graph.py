"""A training step in a CUDA graph: its static inputs against the plain step, bit for bit, and where it is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import train
from models.training import step
from models.training.data import Batches
from models.training.distributed import World
from models.training.graph import GraphedStep
from tests.diffusion.test_graphs import FakeCuda
from tests.models.runs import EVERYTHING, assert_same_state, config, newest, options
from vidkern.diffusion import graphs

CPU, CUDA = World(0, 1, torch.device("cpu")), World(0, 1, torch.device("cuda", 0))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# clipping from the third step on
WHOLE = {**EVERYTHING, "optim__clip_from_step": 3}
RUNS: dict[str, dict[str, Any]] = {
    "whole": WHOLE,
    "unclipped": {"precision": "bfloat16", "activation_checkpointing": True},
    "given frames": {"model__image_condition": "concat"},
}
every_run = pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)


def graphed(run: step.Run) -> step.Run:
    """The run with a step as `--graph` makes it, past the check of the device."""
    run.graphed = GraphedStep(lambda *inputs: step.learn(run, *inputs), run.world.device)
    return run


def after(run: step.Run, count: int, first: int = 0) -> list[Tensor]:
    """What so many steps returned."""
    batches = Batches(run.config, run.world).after(first)
    return [step.train_step(run, *next(batches)).clone() for _ in range(count)]


def assert_same_runs(a: step.Run, b: step.Run) -> None:
    for x, y in ((a.model, b.model), (a.ema, b.ema)):
        assert_same_state(x.state_dict(), y.state_dict())
    assert_same_state(a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"])
    assert a.step == b.step


@every_run
def test_a_step_on_static_inputs_has_the_bits_of_the_plain_one(
    overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "replayed", lambda function, _: graphs.repeated(function))
    plain, static = (step.make_run(config(tmp_path, **overrides), CPU) for _ in range(2))
    expected, got = after(plain, 5), after(graphed(static), 5)
    assert torch.equal(torch.stack(got), torch.stack(expected))
    assert len({float(values[0]) for values in got}) == 5
    assert_same_runs(static, plain)


class Whereabouts(TorchDispatchMode):
    """Fails where the host would wait for the device; notes what is made of the host's data."""

    def __init__(self) -> None:
        super().__init__()
        self.from_the_host: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default), func
        if func in (aten.lift_fresh.default, aten.lift_fresh_copy.default):
            self.from_the_host.append(args[0])
        return func(*args, **(kwargs or {}))


@every_run
def test_what_is_captured_asks_nothing_of_the_host_and_works_in_place(
    overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wait, no constant of the host, and weights, moments, averages and the key where they were."""
    seen = []

    def watched(function: graphs.Step, _: torch.device) -> Any:
        def whole() -> None:
            with Whereabouts() as mode:
                function()
            seen.append(mode.from_the_host)

        return graphs.repeated(whole)

    monkeypatch.setattr(graphs, "replayed", watched)
    run = graphed(step.make_run(config(tmp_path, **overrides), CPU))

    def places() -> list[int]:
        moments = [value for state in run.optimizer.state.values() for value in state.values()]
        tensors = [*run.model.parameters(), *run.ema.parameters(), *moments, run.keys._key]
        return [tensor.data_ptr() for tensor in tensors]

    before = places()
    after(run, 3)
    assert places() == before
    assert seen == [[], [], []]
    assert all(p.grad is None for p in run.model.parameters())  # so that a graph makes them in memory of its own


def test_the_graph_is_captured_at_the_third_step_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    calls: list[tuple[float, float]] = []

    def function(x: Tensor, number: Tensor) -> Tensor:
        if not cuda.capturing:
            calls.append((x.item(), number.item()))
        return x * number

    monkeypatch.setattr(
        torch, "empty", lambda *size, empty=torch.empty, **options: empty(*size, dtype=options.get("dtype"))
    )
    graphed_step = GraphedStep(function, torch.device("cuda"))
    results = [graphed_step(torch.tensor(float(i)), 10.0 * i) for i in range(5)]
    assert calls == [(0, 0), (1, 10)]
    assert cuda.done.count("capture") == 1
    assert cuda.done.count("replay") == 3
    assert [float(r) for r in results[:2]] == [0, 10]
    assert results[2] is results[3] is results[4]  # where every replay writes


def test_another_shape_is_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(graphs, "replayed", lambda function, _: made.append(function) or graphs.repeated(function))
    double = GraphedStep(lambda x, number: 2 * x + number, torch.device("cpu"))
    for size in (2, 3, 2):
        x = torch.arange(float(size))
        assert torch.equal(double(x, 1.0), (2 * x + 1).double())
    assert len(made) == 2


def test_a_cpu_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main([*options(tmp_path), "--graph"])
    assert capsys.readouterr().err == "models.train: error: --graph wants a CUDA device, the run is on the cpu\n"


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="--graph captures the step of one process"):
        step.refuse_graph(CUDA)


def test_a_run_goes_on_with_a_graph_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers that a graph reads are no part of a checkpoint."""
    monkeypatch.setattr(graphs, "replayed", lambda function, _: graphs.repeated(function))
    monkeypatch.setattr(step, "refuse_graph", lambda world: None)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(options(whole, steps=6, **WHOLE)) == 0
    assert train.main([*options(parts, steps=3, **WHOLE), "--graph"]) == 0
    group = newest(parts)["optimizer"]["param_groups"][0]
    assert isinstance(group["lr"], float)
    assert train.main(options(parts, steps=6, **WHOLE)) == 0
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    assert_same_state(newest(whole), newest(parts))


@needs_cuda
@every_run
def test_a_graph_has_the_bits_of_the_plain_step(overrides: dict[str, Any], tmp_path: Path) -> None:
    settings = {"device": "cuda", **overrides}
    plain, replayed = (step.make_run(config(tmp_path, **settings, graph=graph), CUDA) for graph in (False, True))
    expected, got = after(plain, 6), after(replayed, 6)
    assert torch.equal(torch.stack(got), torch.stack(expected))
    assert_same_runs(replayed, plain)

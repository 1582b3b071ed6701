"""Samplers under graph=True: the captured step against the plain loop, when it is captured, and why it is not."""

import contextlib
import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.diffusion.common import Network
from tests.ops.common import no_synchronisation
from vidkern import ops
from vidkern.diffusion import (
    graphs,
    image_to_video,
    interpolation,
    make_schedule,
    progressive,
    respace,
    sample,
    sample_long_video,
    standard,
)

SHAPE = B, F, C, H, W = 2, 6, 2, 4, 4
STEPS = 6
KEY = torch.tensor([11, 5], device="cpu")
KNOWN = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(3), device="cpu")
GUIDANCE = {"y": torch.tensor([1, 4], device="cpu"), "y_null": 9, "cfg_scale": 2.5}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """Where tensors are made without naming a device, also under --device cuda."""
    with torch.device("cpu"):
        yield


def staircase(t: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Frame 0 is given; frame 1 rests until the others have come down to it."""
    tau, hold = image_to_video(t, frames)
    tau[:, 1] = tau[:, 1].clamp(max=600)
    return tau, hold


RUNS = {
    "ddim": {"eta": 0.5},
    "ddim, interpolation, guided": {"task": interpolation, **GUIDANCE},
    "ddpm, staircase, guided": {"sampler": "ddpm", "task": staircase, "step_sharing": "shared", **GUIDANCE},
    "ddpm, progressive": {"sampler": "ddpm", "task": functools.partial(progressive, ramp=3)},
    "flow, image-to-video": {"sampler": "flow", "prediction": "flow", "task": image_to_video},
}
every_run = pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)


def on(device: str, options: dict) -> dict:
    """Return sample's arguments with every tensor on a device."""
    known = None if options.get("task", standard) is standard else KNOWN
    schedule = make_schedule("flow" if options.get("sampler") == "flow" else "linear")
    every = {"model": Network(C), "schedule": schedule, "key": KEY, "known": known, **options}
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in every.items()}


def draw(device: str, options: dict, **more: object) -> Tensor:
    return sample(**{**on(device, options), "shape": SHAPE, "num_steps": STEPS, **more})


def plain_loop(options: dict) -> Tensor:
    """Draw as a user would write it: the host counts the steps."""
    run = on("cpu", options)
    model, schedule, key, known = run["model"], run["schedule"], run["key"], run["known"]
    task, kind, guided = options.get("task", standard), options.get("sampler", "ddim"), "y" in options
    clips = [torch.full((B,), t) for t in [*respace(1000, STEPS).flip(0).tolist(), -1]]
    (tau, given), x = task(clips[0], F), ops.philox_normal(SHAPE, key)
    if isinstance(task, functools.partial):
        x = ops.add_noise(known[:, :1].expand(SHAPE), *schedule.coefficients(tau), key)
    x = torch.where(given[:, :, None, None, None], x if known is None else known, x)
    extra = {"flow": {"prediction": "flow"}, "ddpm": {"key": key}, "ddim": {"key": key, "eta": options.get("eta", 0)}}
    if "step_sharing" in options:
        extra["ddpm"]["sharing"] = options["step_sharing"]
    for now, then in itertools.pairwise(clips):
        (t, given), (t_prev, _) = task(now, F), task(then, F)
        with torch.no_grad():
            if guided:
                y = torch.cat([options["y"], torch.full((B,), options["y_null"])])
                out = model(torch.cat([x, x]), torch.cat([t, t]), y)
            else:
                out = model(x, t)
        step = getattr(ops, f"{kind}_step")
        scale = options.get("cfg_scale")
        x = step(x, out, t, t_prev, schedule, hold=given | (t == t_prev), guidance_scale=scale, **extra[kind])
    return x


def test_the_runs_differ():
    drawn = torch.stack([plain_loop(options) for options in RUNS.values()]).flatten(1)
    assert torch.cdist(drawn, drawn).fill_diagonal_(1).min() > 0.5


@every_run
def test_every_run_has_the_bits_of_the_plain_loop(options):
    assert torch.equal(draw("cpu", options), plain_loop(options))


@every_run
def test_one_compilation_serves_all_steps(options, monkeypatch):
    """What a GPU captures has no graph break and nothing that changes from step to step but tensors."""
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(
        graphs, "replayed", lambda step, _: graphs.repeated(torch.compile(step, fullgraph=True, backend=backend))
    )
    assert torch.equal(draw("cpu", options, graph=True), plain_loop(options))
    assert len(compiled) == 1


def test_a_given_start_is_left_as_it_is():
    start = ops.philox_normal(SHAPE, KEY)
    before = start.clone()
    drawn = sample(Network(C), start.transpose(3, 4), make_schedule("linear"), KEY, num_steps=2)
    assert torch.equal(start, before)
    assert not torch.equal(drawn.transpose(3, 4), before)
    assert drawn.is_contiguous()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Tell what the logger "vidkern" has warned of."""
    graphs._tell.cache_clear()
    caplog.set_level(logging.WARNING, "vidkern")
    return lambda: caplog.messages


def test_a_cpu_has_no_graphs_and_says_so_once(told):
    drawn = draw("cpu", RUNS["ddim"], graph=True)
    assert torch.equal(drawn, draw("cpu", RUNS["ddim"]))
    options = {"chunks": 3, "given": 3, "num_steps": 2}
    network, schedule = Network(C), make_schedule("linear")
    with_graph, without = (
        sample_long_video(network, SHAPE, schedule, KEY, graph=graph, **options) for graph in (True, False)
    )
    assert torch.equal(with_graph, without)
    assert told() == ["graph=True, but no CUDA graph is used: the device is cpu, not cuda"]


class FakeCuda:
    """Stands in for torch.cuda: writes down what is asked of it, and can break or wait in a chosen step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capture_fails: bool = False, waits: bool = False):
        self.done, self.capturing, self.steps = [], False, 0
        self.capture_fails, self.waits, self.mode = capture_fails, waits, 0
        note, fake = self.done.append, self

        class Stream:
            def __init__(self, name):
                self.name, self.device = name, torch.device("cuda")

            def wait_stream(self, other):
                note(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self):
                note("replay")

        here = Stream("here")

        @contextlib.contextmanager
        def on_stream(stream):
            note(f"on {stream.name}")
            yield
            note("back")

        @contextlib.contextmanager
        def capture(graph, stream, capture_error_mode):
            note("capture")
            fake.capturing = True
            try:
                yield
            except RuntimeError:
                raise RuntimeError("the capture is invalid") from None
            finally:
                fake.capturing = False
                note("captured")

        for name, stand_in in {
            "Stream": lambda device: Stream("side"),
            "CUDAGraph": Graph,
            "stream": on_stream,
            "graph": capture,
            "current_stream": lambda device: here,
            "is_current_stream_capturing": lambda: False,
            "get_sync_debug_mode": lambda: fake.mode,
            "set_sync_debug_mode": lambda mode: setattr(fake, "mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def step(self) -> None:
        if self.capturing:
            if self.capture_fails:
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            return
        self.steps += 1
        self.done.append(f"step {self.steps}")
        if self.waits and self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation (here)", stacklevel=1)

    def take(self, count: int) -> None:
        for _, _ in zip(range(count), graphs.replayed(self.step, torch.device("cuda")), strict=False):
            self.done.append("next")


ON_THE_SIDE = ["side waits for here", "on side", "step", "back", "here waits for side", "next"]


def two_steps() -> list[str]:
    return [entry if entry != "step" else f"step {i}" for i in (1, 2) for entry in ON_THE_SIDE]


def test_two_steps_are_run_then_one_is_captured_then_it_is_replayed(monkeypatch, told):
    cuda = FakeCuda(monkeypatch)
    cuda.take(5)
    assert cuda.done == [*two_steps(), "on side", "capture", "captured", "back", *["replay", "next"] * 3]
    assert (cuda.steps, cuda.mode, told()) == (2, 0, [])


@pytest.mark.parametrize("count", [1, 2])
def test_few_steps_need_no_graph(monkeypatch, told, count):
    cuda = FakeCuda(monkeypatch)
    cuda.take(count)
    assert cuda.steps == count
    assert not {"capture", "replay"} & set(cuda.done)
    assert told() == []


def test_a_step_that_waits_for_the_device_is_not_captured(monkeypatch, told):
    cuda = FakeCuda(monkeypatch, waits=True)
    cuda.take(4)
    assert cuda.steps == 4
    assert cuda.done == [*two_steps(), "step 3", "next", "step 4", "next"]
    assert len(told()) == 1
    assert "the model waits for the device at " in told()[0]
    assert __file__ in told()[0]


def test_a_capture_that_fails_leaves_the_steps_as_they_are(monkeypatch, told):
    cuda = FakeCuda(monkeypatch, capture_fails=True)
    cuda.take(4)
    assert cuda.steps == 4
    assert "replay" not in cuda.done
    assert told() == [
        "graph=True, but no CUDA graph is used: the step cannot be captured: RuntimeError: operation not permitted"
    ]
    assert len(graphs._failed) == 1
    graphs._failed.clear()


def test_an_error_of_the_model_is_the_callers(monkeypatch, told):
    FakeCuda(monkeypatch)

    def broken():
        raise ValueError("the model's own")

    with pytest.raises(ValueError, match="the model's own"):
        next(graphs.replayed(broken, torch.device("cuda")))
    assert told() == []


# ---- on a GPU


class Counted(Network):
    """The network; counts the calls that the host makes."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, t, y)


@needs_cuda
@every_run
def test_a_graph_gives_the_same_bits(options, told):
    network = Counted(C).cuda()
    drawn = draw("cuda", options, model=network, graph=True)
    assert network.calls == 3  # two steps, and the one that is captured
    assert torch.equal(drawn, draw("cuda", options))
    assert told() == []


@needs_cuda
def test_a_graph_of_another_key_and_start(told):
    network, other = Counted(C).cuda(), torch.tensor([5, 6], device="cuda")
    for more in ({}, {"key": other}, {"shape": ops.philox_normal(SHAPE, other)}):
        drawn = draw("cuda", RUNS["ddim"], model=network, graph=True, **more)
        assert torch.equal(drawn, draw("cuda", RUNS["ddim"], **more))
    assert told() == []


@needs_cuda
def test_a_long_video_has_the_same_bits(told):
    network, schedule = Counted(C).cuda(), make_schedule("linear", device="cuda")
    options = {"chunks": 3, "given": 3, "num_steps": 5, "sampler": "ddpm"}
    with_graph, without = (
        sample_long_video(network, SHAPE, schedule, KEY.cuda(), graph=graph, **options) for graph in (True, False)
    )
    assert torch.equal(with_graph, without)
    assert network.calls == 3 * 3 + 3 * 5
    assert told() == []


@needs_cuda
def test_replays_do_not_wait_for_the_device():
    with contextlib.ExitStack() as stack:

        def progress(step: int, total: int) -> None:
            if step == 3:  # the graph is there
                stack.enter_context(no_synchronisation())
            if step == total:
                stack.close()

        draw("cuda", RUNS["ddim"], graph=True, progress=progress)


@needs_cuda
def test_the_callers_stream_is_kept_and_obeyed():
    wanted, stream = draw("cuda", RUNS["ddim"]), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        drawn = draw("cuda", RUNS["ddim"], graph=True)
        assert torch.cuda.current_stream() == stream
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(drawn, wanted)


@needs_cuda
@every_run
def test_a_caller_can_capture_the_whole_loop(options, told):
    run = {**on("cuda", options), "shape": SHAPE, "num_steps": STEPS}
    sample(**run)  # compiles and allocates
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(**run, graph=True)
    for key in ([5, 6], [7, 8]):
        run["key"].copy_(torch.tensor(key))
        graph.replay()
        assert torch.equal(drawn, sample(**run))
    assert told() == ["graph=True, but no CUDA graph is used: the stream is being captured already"]


@needs_cuda
def test_a_model_that_waits_is_named_and_served(told):
    network = Network(C).cuda()

    def waiting(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t) * (1.0 if t.sum().item() else 0.5)

    drawn = draw("cuda", RUNS["ddim"], model=waiting, graph=True)
    assert torch.equal(drawn, draw("cuda", RUNS["ddim"], model=waiting))
    assert len(told()) == 1
    assert __file__ in told()[0]


@needs_cuda
def test_a_model_that_breaks_the_capture_is_named_and_served(told):
    network = Network(C).cuda()

    def breaking(x: Tensor, t: Tensor) -> Tensor:
        torch.cuda.current_stream().query()  # not allowed in a capture, and the watch does not see it
        return network(x, t)

    drawn = draw("cuda", RUNS["ddim"], model=breaking, graph=True)
    assert torch.equal(drawn, draw("cuda", RUNS["ddim"], model=breaking))
    assert len(told()) == 1
    assert "the step cannot be captured: " in told()[0]
    assert torch.equal(draw("cuda", RUNS["ddim"], graph=True), draw("cuda", RUNS["ddim"]))  # the next one is captured
    assert len(told()) == 1


@needs_cuda
def test_a_graphs_memory_is_given_back():
    draw("cuda", RUNS["ddim"], graph=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        draw("cuda", RUNS["ddim"], graph=True)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20

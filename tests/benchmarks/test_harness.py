"""The harness: a wrong result gets no speed, variants are timed in turn, buffers outgrow the cache."""

import collections
import dataclasses

import pytest
import torch

import vidkern
from benchmarks import harness
from benchmarks.harness import Variant, check, evaluate, make_buffers, make_set, measure, serving_backends
from benchmarks.memory import peak_bytes
from benchmarks.timers import Timed, host_clock, interleaved
from tests.benchmarks.problems import CPU, plain, problem_of
from vidkern import ops


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 1000)


@pytest.mark.parametrize("backward", [False, True])
def test_a_right_result_is_timed_beside_its_baselines(backward):
    result, samples = measure(problem_of(ops.gate_residual, backward), CPU)
    ours = result["ours"]
    assert ours == f"ours:{serving_backends('gate_residual', backward, CPU)[0]}"
    assert set(result["variants"]) == {"eager", "compile", ours}
    assert result["passes"] == ("forward+backward" if backward else "forward")
    assert result["timer"] == "host"
    for name, variant in result["variants"].items():
        assert variant["correct"]
        assert len(samples[name]) == harness.ROUNDS >= 30
        assert 0 < min(samples[name]) <= variant["low"] <= variant["seconds"] <= variant["high"] <= max(samples[name])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, y, gate: plain(x, y, gate) * 1.001,
        lambda x, y, gate: plain(x, y, gate).where(x != x.max(), float("nan")),
        lambda x, y, gate: plain(x, y, gate).bfloat16().float(),
    ],
    ids=["scaled", "one NaN", "rounded twice"],
)
def test_a_wrong_result_gets_no_speed(wrong):
    result, samples = measure(problem_of(wrong), CPU, rounds=2)
    ours = result["variants"][result["ours"]]
    assert ours["correct"] is False
    assert "seconds" not in ours
    assert result["ours"] not in samples
    assert result["variants"]["eager"]["seconds"] > 0


@pytest.mark.parametrize(("off_by", "correct"), [(0.9e-4, True), (1.1e-4, False)])
def test_a_whole_model_is_held_to_plain_pytorch_by_its_tolerance(off_by, correct):
    problem = dataclasses.replace(problem_of(lambda x, y, gate: plain(x, y, gate) * (1 + off_by)), tolerance=1e-4)
    checked = check(problem, {"ours": Variant(problem.ours)}, make_set(problem, CPU))
    assert checked["ours"]["correct"] is correct


def test_the_peak_of_memory_is_measured_on_a_cpu():
    x = torch.randn(2**16, device=CPU)

    def two_at_once():
        first = x + 1
        second = first * 2
        del first
        return second - 1

    assert 2 * x.nbytes <= peak_bytes(two_at_once, CPU) < 2 * x.nbytes + 100  # and numbers as tensors


def test_a_baseline_may_be_a_little_less_exact_than_ours():
    problem, eps = problem_of(ops.gate_residual), torch.finfo(torch.float32).eps
    buffers = make_set(problem, CPU)
    bound = eps * float(plain(*buffers.inputs).abs().max())

    def off_by(bounds):
        return lambda *inputs: plain(*inputs) + bounds * bound

    variants = {
        "ours": Variant(off_by(4), "reference"),
        "baseline": Variant(off_by(4), baseline=True),
        "wrong baseline": Variant(off_by(100), baseline=True),
    }
    checked = check(problem, variants, buffers)
    assert {name: outcome["correct"] for name, outcome in checked.items()} == {
        "ours": False,
        "baseline": True,
        "wrong baseline": False,
    }


def test_a_wrong_gradient_gets_no_speed():
    def leaky(x, y, gate):
        return plain(x, y, gate.detach()) + 0.5 * (gate - gate.detach()).unsqueeze(2) * y

    forward, both = (check(problem_of(leaky, b), {"leaky": Variant(leaky)}, make_set(problem_of(leaky, b), CPU))
                     for b in (False, True))  # fmt: skip
    assert forward["leaky"]["correct"]
    assert not both["leaky"]["correct"]


def test_a_variant_that_raises_is_recorded_and_the_others_are_timed():
    def broken(x, y, gate):
        raise RuntimeError("no such kernel\nsecond line")

    result, _ = measure(problem_of(broken), CPU, rounds=2)
    assert result["variants"][result["ours"]] == {"correct": False, "failed": "RuntimeError: no such kernel"}
    assert result["variants"]["eager"]["seconds"] > 0


def test_ours_is_held_to_the_definition_where_plain_draws_its_own_noise():
    def random(x, y, gate):
        return plain(x, y, gate) + torch.randn_like(x)

    problem = dataclasses.replace(problem_of(plain), plain=random, definition=plain)
    variants = {"plain": Variant(random, baseline=True), "right": Variant(plain), "wrong": Variant(random)}
    variants["shapeless"] = Variant(lambda x, y, gate: x.sum(), baseline=True)
    checked = check(problem, variants, make_set(problem, CPU))
    right = {name: outcome["correct"] for name, outcome in checked.items()}
    assert right == {"plain": True, "right": True, "wrong": False, "shapeless": False}


def test_gradients_may_be_those_of_the_first_inputs_alone():
    problem = dataclasses.replace(problem_of(plain, backward=True), gradients=1)
    buffers = make_set(problem, CPU)
    assert [tensor.requires_grad for tensor in buffers.inputs] == [True, False, False]
    assert len(evaluate(plain, buffers)) == 2


def test_overhead_has_no_bandwidth():
    result, _ = measure(problem_of(ops.gate_residual), CPU, overhead=True, rounds=2)
    assert (result["timer"], result["traffic_bytes"], result["flops"]) == ("overhead", 0, 0)
    assert set(result["variants"]) == {"eager", result["ours"]}


def test_buffers_together_outgrow_the_cache_and_differ(monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 10_000)
    problem = problem_of(ops.gate_residual, backward=True)
    sets = make_buffers(problem, CPU)
    assert sum(buffers.nbytes() for buffers in sets) >= 2 * 10_000
    assert len({buffers.inputs[0].sum().item() for buffers in sets}) == len(sets)
    assert all(tensor.requires_grad for buffers in sets for tensor in buffers.inputs)


def test_gradients_come_after_outputs_and_other_inputs_keep_their_dtype():
    problem = problem_of(ops.gate_residual, backward=True)
    buffers = make_set(problem, CPU)
    x, y, gate = (tensor.detach() for tensor in buffers.inputs)
    (upstream,) = buffers.upstream
    z, dx, dy, dgate = evaluate(plain, buffers)
    torch.testing.assert_close(z, plain(x, y, gate))
    torch.testing.assert_close(dx, upstream)
    torch.testing.assert_close(dy, upstream * gate.unsqueeze(2))
    torch.testing.assert_close(dgate, (upstream * y).sum(2))
    key = torch.tensor([1, 2])
    assert harness.Buffers([key, x], []).to(torch.float64).inputs[0] is key


def test_variants_take_turns_each_on_the_next_buffers_under_its_backend():
    log = []

    def calls(name):
        return [lambda i=i: log.append((name, i, vidkern._dispatch.forced_backend())) for i in range(5)]

    variants = {"a": Timed(calls("a")), "b": Timed(calls("b"), "reference"), "c": Timed(calls("c"))}
    samples = interleaved(variants, host_clock(CPU), rounds=6)
    assert [name for name, _, _ in log] == list("abcbcacab" * 2)
    assert [i for _, i, _ in log] == [i % 5 for i in range(18)]
    assert {(name, backend) for name, _, backend in log} == {("a", None), ("b", "reference"), ("c", None)}
    assert all(len(taken) == 6 and min(taken) > 0 for taken in samples.values())


def test_the_host_clock_gives_the_time_of_one_call():
    counted = collections.Counter()

    def call():
        counted["calls"] += 1
        torch.zeros(1)

    once, many = host_clock(CPU), host_clock(CPU, repeat=50)
    once(call)()
    assert counted["calls"] == 1
    seconds = min(many(call)() for _ in range(5))
    assert counted["calls"] == 251
    assert seconds < 1e-3

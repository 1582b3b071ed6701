"""The kernels of the modulation operators, each against float64: C++, CUDA (on the emulator without a GPU), Triton."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import triton_aot
from tests.ops import modulation_cases as cases
from tests.ops.backends import Kernels, kernels_of
from tests.ops.common import KERNEL_DTYPES, assert_contract, far_apart, poisoned_empty
from tests.ops.modulation_cases import EPS, Tensors, exact_results, make_inputs, make_upstream, plain_results
from vidkern import _library
from vidkern.ops.modulation import triton_kernels

every_operator = pytest.mark.parametrize("name", cases.OPERATORS)
every_norm = pytest.mark.parametrize("name", [name for name in cases.OPERATORS if name != "gate_residual"])
every_residual_norm = pytest.mark.parametrize("name", cases.RESIDUAL_NORMS)


@pytest.fixture(params=cases.BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    torch.manual_seed(0)
    return kernels_of("modulation", request.param)


def run(kernels: Kernels, name: str, inputs: Tensors, upstream: Tensors) -> dict[str, Tensor]:
    return cases.run(kernels.find, name, inputs, upstream)


def assert_same_bits(ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    for key in ours:
        assert torch.equal(ours[key], wanted[key]), f"{key} differs"


def check(kernels: Kernels, name: str, inputs: dict[str, Tensor], upstream: Tensors) -> None:
    """Hold every result against the contract, with every unwritten element poisoned."""
    with poisoned_empty():
        ours = run(kernels, name, inputs, upstream)
    exact, plain = exact_results(name, inputs, upstream), plain_results(name, inputs, upstream)
    for key, result in ours.items():
        assert result.is_contiguous()
        if key in ("mean", "rstd"):
            _check_statistic(key, result, exact[key], largest=float(_finite(exact.get("z", inputs["x"])).abs().max()))
        else:
            assert_contract(key, result, plain[key], exact[key])
            per_frame = key in ("dgate", "dshift", "dscale")
            assert result.dtype == (torch.float32 if per_frame else inputs["x"].dtype)


def _check_statistic(key: str, ours: Tensor, exact: Tensor, largest: float) -> None:
    assert ours.dtype == torch.float32
    assert torch.equal(ours.isfinite(), exact.isfinite())
    atol = 1e-6 * largest if key == "mean" else 0.0
    torch.testing.assert_close(_finite(ours).double(), _finite(exact), rtol=2e-6, atol=atol)


def _finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]


@every_operator
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_every_backend_is_registered(name, backend):
    assert backend in _library.operators[name].kernels
    assert backend in _library.operators[f"{name}_backward"].kernels


@every_operator
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_contract(kernels, name, case):
    inputs = case.inputs(name, kernels.device)
    check(kernels, name, inputs, make_upstream(name, inputs))


@every_residual_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_gradient_of_z(kernels, name, dtype):
    inputs = make_inputs(name, (1, 2, 9, 72), kernels.device, dtype)
    upstream = make_upstream(name, inputs)
    check(kernels, name, inputs, upstream | {"dz": None})
    absent = run(kernels, name, inputs, upstream | {"dz": None})
    assert_same_bits(absent, run(kernels, name, inputs, upstream | {"dz": torch.zeros_like(inputs["x"])}))


@every_norm
def test_constant_rows_come_out_as_the_shift(kernels, name):
    shape = (1, 2, 5, 1152)
    inputs = make_inputs(name, shape, kernels.device, torch.float32)
    value = 0.0 if "rms" in name else -12345.67
    inputs |= {"x": torch.full(shape, value, device=kernels.device)}
    inputs |= {"y": torch.zeros(shape, device=kernels.device)} if "y" in inputs else {}
    ours = run(kernels, name, inputs, make_upstream(name, inputs))
    normed = ours[cases.outputs(name)[-1]]
    torch.testing.assert_close(normed, inputs["shift"].unsqueeze(2).expand(shape), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["rstd"], torch.full_like(ours["rstd"], EPS**-0.5), rtol=1e-5, atol=0)
    if "mean" in ours:
        torch.testing.assert_close(ours["mean"], torch.full_like(ours["mean"], value), rtol=1e-7, atol=0)


@every_residual_norm
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_norm_is_taken_of_z_before_its_rounding(kernels, name, dtype):
    shape = (1, 1, 4, 64)
    inputs = make_inputs(name, shape, kernels.device, dtype)
    inputs["x"] = (torch.randn(shape, device=kernels.device) + 200.0).to(dtype)  # an ulp of z nears a token's deviation
    upstream = make_upstream(name, inputs)
    ours, exact = run(kernels, name, inputs, upstream), exact_results(name, inputs, upstream)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours["z"].double(), exact["z"], rtol=eps, atol=0.0)
    torch.testing.assert_close(ours["h"].double(), exact["h"], rtol=eps, atol=max(eps / 8, 1e-4))


@every_operator
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from NumPy, in Triton's interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_go_where_the_definition_sends_them(kernels, name, bad):
    inputs = make_inputs(name, (2, 2, 3, 64), kernels.device, torch.bfloat16)
    upstream = make_upstream(name, inputs)
    inputs["x"][1, 0, 1, 17] = bad
    inputs[cases.vector_inputs(name)[-1]][0, 1, 7] = bad
    next(iter(upstream.values()))[0, 0, 2, 5] = bad
    ours = run(kernels, name, inputs, upstream)
    wanted = cases.run(cases.reference_kernel, name, inputs, upstream)
    for key, result in ours.items():
        torch.testing.assert_close(
            result, wanted[key], equal_nan=True, rtol=2e-2, atol=5e-2, msg=lambda m, k=key: f"{k}: {m}"
        )


VECTOR_DTYPES = [pair for pair in itertools.product(KERNEL_DTYPES, KERNEL_DTYPES) if pair[0] != pair[1]]


@every_operator
@pytest.mark.parametrize(("tokens_dtype", "vectors_dtype"), VECTOR_DTYPES, ids=str)
def test_vectors_of_another_dtype(kernels, name, tokens_dtype, vectors_dtype):
    inputs = make_inputs(name, (2, 2, 1, 72), kernels.device, tokens_dtype)
    upstream = make_upstream(name, inputs)
    narrow = {vector: inputs[vector].to(vectors_dtype) for vector in cases.vector_inputs(name)}
    wide = {vector: tensor.float() for vector, tensor in narrow.items()}
    assert_same_bits(
        run(kernels, name, inputs | narrow, upstream),
        run(kernels, name, inputs | wide, upstream),
    )


@every_operator
@pytest.mark.parametrize("start", [0, 3], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_are_read_in_place(kernels, name, start, dtype):
    batch, frames, tokens, channels = 2, 3, 2, 40
    columns = slice(start, start + channels)

    def strided() -> Tensor:
        wide = torch.randn(frames, batch, 2 * tokens, 2 * channels, device=kernels.device).to(dtype).transpose(0, 1)
        return wide[:, :, ::2, columns]

    def vector(i: int) -> Tensor:  # stride 0 in F, in B, in neither
        wide = torch.randn(batch, frames, 2 * channels, device=kernels.device).to(dtype)[..., columns]
        return [wide[:, :1], wide[:1], wide][i % 3].expand(batch, frames, channels)

    inputs = {token: strided() for token in cases.token_inputs(name)}
    inputs |= {key: vector(i) for i, key in enumerate(cases.vector_inputs(name))}
    upstream = {f"d{output}": strided() for output in cases.outputs(name)}
    upstream[next(iter(upstream))] = strided()[:, :1, :1].expand(batch, frames, tokens, channels)
    check(kernels, name, inputs, upstream)
    packed = [{key: tensor.contiguous() for key, tensor in given.items()} for given in (inputs, upstream)]
    assert_same_bits(run(kernels, name, inputs, upstream), run(kernels, name, *packed))


@every_operator
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_of_more_than_32_bits(kernels, name, dim):
    inputs = make_inputs(name, (2, 2, 2, 16), kernels.device, torch.bfloat16)
    upstream = make_upstream(name, inputs)
    far_inputs = {key: far_apart(value, dim % (value.dim() - 1)) for key, value in inputs.items()}
    far_upstream = {key: far_apart(value, dim) for key, value in upstream.items()}
    assert_same_bits(run(kernels, name, far_inputs, far_upstream), run(kernels, name, inputs, upstream))


@every_operator
@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (2, 0, 3, 16), (2, 2, 0, 16)], ids=str)
def test_empty(kernels, name, shape):
    inputs = make_inputs(name, shape, kernels.device, torch.float32)
    with poisoned_empty():
        ours = run(kernels, name, inputs, make_upstream(name, inputs))
    for key, result in ours.items():
        if key in ("dgate", "dshift", "dscale"):
            assert torch.equal(result, torch.zeros(shape[0], shape[1], shape[3], device=kernels.device))
        else:
            assert result.shape == (shape[:3] if key in ("mean", "rstd") else shape)


@every_operator
def test_the_same_call_gives_the_same_bits(kernels, name):
    inputs = make_inputs(name, (1, 1, 37, 24), kernels.device, torch.float32)
    upstream = make_upstream(name, inputs)
    assert_same_bits(run(kernels, name, inputs, upstream), run(kernels, name, inputs, upstream))


# D = 8 is the hardest: its strides are multiples of 16 or not as N changes; the last shape has the longest runs
SHAPES_OF_ONE_COMPILATION = [(1, 1, 1, 8), (2, 1, 3, 8), (1, 4, 16, 8), (3, 5, 33, 8), (40, 25, 32, 8)]
BUDGETED = [
    *((name, (1, 2, 32, channels), dtype) for name in cases.OPERATORS for channels in (1152, 3072)
      for dtype in (torch.bfloat16, torch.float32)),
    ("gate_residual_modulate", (1, 2, 32, 1152), torch.float16),
]  # fmt: skip


def launches() -> None:
    """Launch every Triton kernel as training does, for tests/triton_aot.py."""
    one_compilation = itertools.product(cases.OPERATORS, SHAPES_OF_ONE_COMPILATION, [torch.float32])
    for name, shape, dtype in (*one_compilation, *BUDGETED):
        inputs = make_inputs(name, shape, "cpu", dtype)
        cases.run(lambda operator: getattr(triton_kernels, operator), name, inputs, make_upstream(name, inputs))


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Return what became of every launch on every target."""
    return triton_aot.report("tests.ops.test_modulation_kernels", "launches")


def test_triton_compiles_once_for_every_batch_frames_and_tokens(compiled):
    for kernel, count in (("_forward", 5), ("_backward", 5), ("_sum_runs", 3)):
        for target in triton_aot.TARGETS:
            facts = [f for f in compiled if (f["kernel"], f["target"], f["constants"]["D"]) == (kernel, target, 8)]
            assert len(facts) == count, f"{kernel} is compiled {len(facts)} times for sm_{target}"
            assert sum(fact["launches"] for fact in facts) == 5 * len(SHAPES_OF_ONE_COMPILATION)


def test_triton_keeps_to_the_budgets_of_every_gpu(compiled):
    facts = [fact for fact in compiled if fact["constants"]["D"] > 8]
    assert {fact["target"] for fact in facts} == {80, 86, 90}
    for kernel in ("_forward", "_backward"):
        assert sum(fact["kernel"] == kernel for fact in facts) == 3 * len(BUDGETED)
    for fact in facts:
        assert fact["local_bytes"] == 0, f"spills: {fact}"
        assert fact["shared_bytes"] <= 99 * 1024, f"too much shared memory: {fact}"
        assert fact["wide_loads"] > 0, f"narrow loads: {fact}"
        assert fact["resident_warps"] >= 8, f"too few warps: {fact}"
        if fact["kernel"] != "_sum_runs":
            assert _bytes_in_flight(fact) >= _bytes_wanted_in_flight(fact), f"too few loads in flight: {fact}"


#: Bytes that a multiprocessor must have in flight: datasheet bandwidth times a latency of 600 ns, over A100's 108
#: multiprocessors, A6000's 84, H200's 132.
IN_FLIGHT = {80: 2039e9 * 600e-9 / 108, 86: 768e9 * 600e-9 / 84, 90: 4800e9 * 600e-9 / 132}
READ, WRITTEN = ("x", "y", "dh", "dz"), ("z", "h", "dx", "dy")


def _pointers(fact: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    return [fact["types"][name] for name in names if fact["types"].get(name, "constexpr") != "constexpr"]


def _bytes_in_flight(fact: dict[str, Any]) -> int:
    """Return the bytes of one token in every resident program."""
    read = _pointers(fact, READ)
    element = 4 if read[0] == "*fp32" else 2
    return fact["resident_warps"] // fact["warps"] * len(read) * fact["constants"]["D"] * element


def _bytes_wanted_in_flight(fact: dict[str, Any]) -> float:
    """Return the reads' share of a multiprocessor's; nothing waits for writes."""
    read, written = len(_pointers(fact, READ)), len(_pointers(fact, WRITTEN))
    return IN_FLIGHT[fact["target"]] * read / (read + written)

"""The kernels of the activation operators, each against float64: C++, CUDA (on the emulator without a GPU), Triton."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import triton_aot
from tests.ops.backends import Kernels, kernels_of
from tests.ops.common import KERNEL_DTYPES, assert_contract, far_apart, poisoned_empty
from vidkern import _library
from vidkern.ops.activation import reference, triton_kernels

BACKENDS = ("cpu", "triton", "cuda")
OPERATORS = ("gelu_tanh", "gelu_tanh_backward", "gelu_mlp_backward")


class Results(NamedTuple):
    """What the family computes of one (dy, x, bias): its three operators give some of these each."""

    y: Tensor
    dx: Tensor
    dbias: Tensor


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    torch.manual_seed(0)
    return kernels_of("activation", request.param)


def run(kernels: Kernels, dy: Tensor, x: Tensor, bias: Tensor) -> Results:
    """Return the results with a bias."""
    dx, dbias = kernels.find("gelu_tanh_backward")(dy, x, bias)
    return Results(kernels.find("gelu_tanh")(x, bias), dx, dbias)


def run_without_bias(kernels: Kernels, dy: Tensor, x: Tensor) -> Results:
    """Return gelu_mlp_backward's results; the other two operators must agree with them to the bit."""
    dx, y, dbias = kernels.find("gelu_mlp_backward")(dy, x)
    alone, nothing = kernels.find("gelu_tanh_backward")(dy, x, None)
    assert torch.equal(dx, alone)
    assert torch.equal(y, kernels.find("gelu_tanh")(x, None))
    assert (nothing.shape, nothing.dtype) == ((0,), torch.float32)
    return Results(y, dx, dbias)


def plain(dy: Tensor, x: Tensor, bias: Tensor | None) -> Results:
    """Return the results of plain PyTorch in the tensors' own dtype; in float64 they are the truth."""
    z = x if bias is None else x + bias
    dx = torch.ops.aten.gelu_backward(dy, z, approximate="tanh")
    return Results(F.gelu(z, approximate="tanh"), dx, dx.sum(0))


def check(kernels: Kernels, dy: Tensor, x: Tensor, bias: Tensor) -> None:
    """Hold every result against the contract, with and without the bias, with every unwritten element poisoned."""
    with poisoned_empty():
        ours = {bias: run(kernels, dy, x, bias), None: run_without_bias(kernels, dy, x)}
    for given, results in ours.items():
        wide = [None if tensor is None else tensor.double() for tensor in (dy, x, given)]
        triples = zip(Results._fields, results, plain(dy, x, given), plain(*wide), strict=True)
        for name, result, baseline, exact in triples:
            assert_contract(name, result, baseline, exact)
            assert result.dtype == (torch.float32 if name == "dbias" else x.dtype)
            assert result.is_contiguous()


def make(rows: int, channels: int, dtype: torch.dtype, device: str, size: float = 2.0) -> tuple[Tensor, ...]:
    """Return random (dy, x, bias)."""
    dy, x = torch.randn(rows, channels, device=device), size * torch.randn(rows, channels, device=device)
    return dy.to(dtype), x.to(dtype), torch.randn(channels, device=device).to(dtype)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_registered(name, backend):
    assert backend in _library.operators[name].kernels


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (9, 32), (3, 1152), (70, 40), (3, 4608)], ids=str)
def test_contract(kernels, dtype, shape):
    check(kernels, *make(*shape, dtype, kernels.device))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-6, 30.0, 1e4])
def test_tiny_large_and_saturated_values(kernels, dtype, size):
    check(kernels, *make(5, 264, dtype, kernels.device, size))


def test_every_bfloat16_number(kernels):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.isfinite()].view(-1, 128).to(kernels.device)
    y, exact = kernels.find("gelu_tanh")(x, None), F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(y.double(), exact, rtol=2.0**-8, atol=1e-14)
    dx, _ = kernels.find("gelu_tanh_backward")(torch.ones_like(x), x, None)
    slope = exact.new_zeros(x.shape)
    inside = x.abs() < 1e4  # beyond, plain PyTorch's own cubic overflows in the end
    slope[inside] = torch.ops.aten.gelu_backward(torch.ones_like(exact), x.double(), approximate="tanh")[inside]
    slope[~inside] = (x > 0).double()[~inside]
    torch.testing.assert_close(dx.double(), slope, rtol=2.0**-8, atol=2.0**-22)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from NumPy, in Triton's interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_go_where_the_definition_sends_them(kernels, bad):
    dy, x, bias = make(6, 64, torch.bfloat16, kernels.device)
    x[1, 17] = bad
    bias[7] = bad
    dy[2, 5] = bad
    ours, wanted = run(kernels, dy, x, bias), (reference.gelu_tanh(x, bias), *reference.gelu_tanh_backward(dy, x, bias))
    for got, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=2e-2, atol=5e-2)


DTYPE_PAIRS = [pair for pair in itertools.product(KERNEL_DTYPES, KERNEL_DTYPES) if pair[0] != pair[1]]


@pytest.mark.parametrize(("dtype", "bias_dtype"), DTYPE_PAIRS, ids=str)
def test_a_bias_of_another_dtype(kernels, dtype, bias_dtype):
    dy, x, bias = make(3, 72, dtype, kernels.device)
    narrow = bias.to(bias_dtype)
    for got, wanted in zip(run(kernels, dy, x, narrow), run(kernels, dy, x, narrow.float()), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("start", [0, 3], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_are_read_in_place(kernels, start, dtype):
    dy, x, _ = (tensor[..., start : start + 40] for tensor in make(11, 88, dtype, kernels.device))
    bias = torch.randn(88, device=kernels.device)[start : start + 40]
    expanded = dy[:1].expand(11, 40)
    for grad in (dy, expanded):
        check(kernels, grad, x[:11], bias.to(dtype))
        packed = run(kernels, grad.contiguous(), x.contiguous(), bias.clone())
        for got, wanted in zip(run(kernels, grad, x, bias), packed, strict=True):
            assert torch.equal(got, wanted)


def test_offsets_of_more_than_32_bits(kernels):
    dy, x, bias = make(2, 16, torch.bfloat16, kernels.device)
    for got, wanted in zip(
        run(kernels, far_apart(dy, 0), far_apart(x, 0), bias), run(kernels, dy, x, bias), strict=True
    ):
        assert torch.equal(got, wanted)


def test_no_rows(kernels):
    with poisoned_empty():
        for results in (run(kernels, *make(0, 16, torch.float32, kernels.device)),
                        run_without_bias(kernels, *make(0, 16, torch.float32, kernels.device)[:2])):  # fmt: skip
            assert results.y.shape == results.dx.shape == (0, 16)
            assert torch.equal(results.dbias, torch.zeros(16, device=kernels.device))


def test_the_same_bits_for_every_number_of_threads():
    torch.manual_seed(0)
    dy, x, _ = make(1100, 384, torch.float32, "cpu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run_without_bias(kernels_of("activation", "cpu"), dy, x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_long_sums_meet_the_contract():
    torch.manual_seed(0)
    dy, x, _ = make(40000, 8, torch.float32, "cpu")
    ours = run_without_bias(kernels_of("activation", "cpu"), dy, x)
    assert_contract("dbias", ours.dbias, plain(dy, x, None).dbias, plain(dy.double(), x.double(), None).dbias)


# D = 8 is the hardest: its strides are multiples of 16 or not as M changes
SHAPES_OF_ONE_COMPILATION = [(1, 8), (3, 8), (64, 8), (33, 8), (64000, 8)]
BUDGETED = [((64, 4608), torch.bfloat16), ((64, 4608), torch.float32)]


def launches() -> None:
    """Launch every Triton kernel as training does, for tests/triton_aot.py."""
    cases = [(shape, torch.float32) for shape in SHAPES_OF_ONE_COMPILATION] + BUDGETED
    for (rows, channels), dtype in cases:
        tensors = make(rows, channels, dtype, "cpu")
        kernels = Kernels(lambda name: getattr(triton_kernels, name), "cpu")
        dy, x, bias = tensors
        kernels.find("gelu_tanh")(x, None)
        kernels.find("gelu_tanh")(x, bias)
        kernels.find("gelu_tanh_backward")(dy, x, None)
        kernels.find("gelu_tanh_backward")(dy, x, bias)
        kernels.find("gelu_mlp_backward")(dy, x)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Return what became of every launch on every target."""
    return triton_aot.report("tests.ops.test_activation_kernels", "launches")


def test_triton_compiles_once_for_every_number_of_rows(compiled):
    for kernel, count in (("_activation", 5), ("_sum_runs", 1)):
        for target in triton_aot.TARGETS:
            facts = [f for f in compiled if (f["kernel"], f["target"], f["constants"]["D"]) == (kernel, target, 8)]
            assert len(facts) == count, f"{kernel} is compiled {len(facts)} times for sm_{target}"


#: Bytes that a multiprocessor must have in flight: datasheet bandwidth times a latency of 600 ns, over A100's 108
#: multiprocessors, A6000's 84, H200's 132.
IN_FLIGHT = {80: 2039e9 * 600e-9 / 108, 86: 768e9 * 600e-9 / 84, 90: 4800e9 * 600e-9 / 132}


def test_triton_keeps_to_the_budgets_of_every_gpu(compiled):
    facts = [fact for fact in compiled if fact["constants"]["D"] > 8]
    assert sum(fact["kernel"] == "_activation" for fact in facts) == 3 * 5 * len(BUDGETED)
    for fact in facts:
        assert fact["local_bytes"] == 0, f"spills: {fact}"
        assert fact["shared_bytes"] <= 99 * 1024, f"too much shared memory: {fact}"
        assert fact["wide_loads"] > 0, f"narrow loads: {fact}"
        if fact["kernel"] == "_activation":
            assert _bytes_in_flight(fact) >= _bytes_wanted_in_flight(fact), f"too few loads in flight: {fact}"


def _pointers(fact: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    return [fact["types"][name] for name in names if fact["types"].get(name, "constexpr") != "constexpr"]


def _bytes_in_flight(fact: dict[str, Any]) -> int:
    """Return the bytes of one tile of every tensor read, in every resident program."""
    read = _pointers(fact, ("x", "dy"))
    element = 4 if read[0] == "*fp32" else 2
    tile = fact["constants"]["ROWS"] * fact["constants"]["COLUMNS"]
    return fact["resident_warps"] // fact["warps"] * len(read) * tile * element


def _bytes_wanted_in_flight(fact: dict[str, Any]) -> float:
    """Return the reads' share of a multiprocessor's; nothing waits for writes."""
    read, written = len(_pointers(fact, ("x", "dy"))), len(_pointers(fact, ("y", "dx")))
    return IN_FLIGHT[fact["target"]] * read / (read + written)

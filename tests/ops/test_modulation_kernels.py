"""The kernels of the modulation operators, each against float64: C++, CUDA (on the emulator without a GPU), Triton."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import triton_aot
from tests.emulator import build
from tests.ops.common import KERNEL_DTYPES, assert_contract, poisoned_empty
from vidkern import _extension
from vidkern.ops.modulation import reference, triton_kernels

EPS = 1e-6
SHAPES = [
    (2, 3, 5, 32),
    (4, 5, 1, 8),
    (3, 1, 37, 64),
    (1, 2, 3, 1152),
    (1, 1, 2, 1000),
    (1, 1, 2, 3072),
    (1, 1, 1, 8192),
]


class Kernels(NamedTuple):
    """layer_norm_modulate and its backward by one backend, and where their tensors must lie."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    device: str


def compiled(namespace: str, device: str) -> Kernels:
    operators = getattr(torch.ops, namespace)
    return Kernels(operators.layer_norm_modulate, operators.layer_norm_modulate_backward, device)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> str:
    build.load([build.ROOT / "csrc/cuda/modulation.cu"], "vidkern_emulator", tmp_path_factory.mktemp("emulator"))
    return "vidkern_emulator"


@pytest.fixture(params=["cpu", "cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if request.param == "cpu":
        assert _extension.missing["cpu"] is None, _extension.missing["cpu"]
        return compiled("vidkern_cpu", "cpu")
    if request.param == "triton":
        return Kernels(triton_kernels.layer_norm_modulate, triton_kernels.layer_norm_modulate_backward, device)
    if device == "cuda":
        assert _extension.missing["cuda"] is None, _extension.missing["cuda"]
        return compiled("vidkern_cuda", device)
    return compiled(request.getfixturevalue("emulator"), device)


def plain(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def plain_grads(x: Tensor, shift: Tensor, scale: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, shift, scale)]
    return torch.autograd.grad(plain(*inputs), inputs, dy)


def chunks_of(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return shift and scale as the model has them: views of one (B, F, 6D) tensor."""
    batch, frames, _, channels = shape
    chunks = torch.randn(batch, frames, 6 * channels, device=device).to(dtype).chunk(6, -1)
    return chunks[3], chunks[4]


def check(kernels: Kernels, x: Tensor, shift: Tensor, scale: Tensor, dy: Tensor) -> None:
    """Hold all six results against the contract, with every unwritten element poisoned."""
    dtype = x.dtype
    with poisoned_empty():
        y, mean, rstd = kernels.forward(x, shift, scale, EPS)
        grads = kernels.backward(dy, x, scale, mean, rstd)
    assert y.dtype == grads[0].dtype == dtype
    assert y.is_contiguous()
    assert grads[0].is_contiguous()
    assert all(tensor.dtype == torch.float32 for tensor in (mean, rstd, *grads[1:]))

    wide = [tensor.double() for tensor in (x, shift, scale)]
    exact_y, exact_mean, exact_rstd = reference.layer_norm_modulate(*wide, EPS)
    same = [x, shift.to(dtype), scale.to(dtype)]
    assert_contract("y", y, plain(*same), exact_y)
    finite = exact_rstd.isfinite()
    assert torch.equal(rstd.isfinite(), finite)
    torch.testing.assert_close(
        mean.double()[finite], exact_mean[finite], rtol=1e-6, atol=1e-6 * float(x[finite].abs().max())
    )
    torch.testing.assert_close(rstd.double()[finite], exact_rstd[finite], rtol=2e-6, atol=0)
    exact_grads = reference.layer_norm_modulate_backward(dy.double(), wide[0], wide[2], exact_mean, exact_rstd)
    for name, ours, same_dtype, exact in zip(
        ("dx", "dshift", "dscale"), grads, plain_grads(*same, dy), exact_grads, strict=True
    ):
        assert_contract(name, ours, same_dtype, exact)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(kernels, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device=kernels.device).to(dtype)
    check(kernels, x, *chunks_of(shape, dtype, kernels.device), torch.randn(shape, device=kernels.device).to(dtype))


HARD = {
    "large mean": lambda x: x + 1e3,
    "tiny variance": lambda x: 1 + 1e-4 * x,
    "tiny values": lambda x: 1e-5 * x,
    "large values": lambda x: 1e4 * x,
}


@pytest.mark.parametrize("name", HARD)
def test_hard_rows(kernels, name):
    torch.manual_seed(1)
    shape = (1, 2, 9, 384)
    x = HARD[name](torch.randn(shape, device=kernels.device))
    check(kernels, x, *chunks_of(shape, torch.float32, kernels.device), torch.randn(shape, device=kernels.device))


def test_constant_rows_come_out_as_the_shift(kernels):
    torch.manual_seed(2)
    shape = (1, 2, 5, 1152)
    shift, scale = chunks_of(shape, torch.float32, kernels.device)
    for value in (3.3, -1e3, 12345.67):
        y, mean, rstd = kernels.forward(torch.full(shape, value, device=kernels.device), shift, scale, EPS)
        torch.testing.assert_close(y, shift.unsqueeze(2).expand(shape), rtol=0, atol=1e-5)
        torch.testing.assert_close(mean, torch.full_like(mean, value), rtol=1e-7, atol=0)
        torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_token(kernels, bad):
    torch.manual_seed(3)
    shape = (2, 2, 5, 64)
    x = torch.randn(shape, device=kernels.device)
    x[1, 0, 3, 17] = bad
    check(kernels, x, *chunks_of(shape, torch.float32, kernels.device), torch.randn(shape, device=kernels.device))


VECTOR_DTYPES = [pair for pair in itertools.product(KERNEL_DTYPES, KERNEL_DTYPES) if pair[0] != pair[1]]


@pytest.mark.parametrize(("tokens_dtype", "vectors_dtype"), VECTOR_DTYPES, ids=str)
def test_vectors_of_another_dtype(kernels, tokens_dtype, vectors_dtype):
    torch.manual_seed(4)
    shape = (2, 2, 3, 72)
    x = torch.randn(shape, device=kernels.device).to(tokens_dtype)
    shift, scale = chunks_of(shape, vectors_dtype, kernels.device)
    y, mean, rstd = kernels.forward(x, shift, scale, EPS)
    wide = kernels.forward(x, shift.float(), scale.float(), EPS)
    assert torch.equal(y, wide[0])
    dy = torch.randn(shape, device=kernels.device).to(tokens_dtype)
    ours = kernels.backward(dy, x, scale, mean, rstd)
    for a, b in zip(ours, kernels.backward(dy, x, scale.float(), mean, rstd), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 3], ids=["aligned", "unaligned"])
def test_strides_are_read_in_place(kernels, start, dtype):
    torch.manual_seed(5)
    batch, frames, tokens, channels = 2, 3, 6, 40
    wide = torch.randn(frames, batch, 2 * tokens, 2 * channels, device=kernels.device).to(dtype).transpose(0, 1)
    x = wide[:, :, ::2, start : start + channels]
    vectors = torch.randn(batch, frames, 2 * channels, device=kernels.device).to(dtype)[..., start : start + channels]
    shift = vectors[:, :1].expand(batch, frames, channels)
    scale = vectors[:1].expand(batch, frames, channels)
    dy = wide[:, :1, 1:2, start : start + channels].expand(batch, frames, tokens, channels)
    check(kernels, x, shift, scale, dy)


@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (2, 0, 3, 16), (2, 2, 0, 16)], ids=str)
def test_empty(kernels, shape):
    x = torch.randn(shape, device=kernels.device)
    shift, scale = chunks_of(shape, torch.float32, kernels.device)
    with poisoned_empty():
        y, mean, rstd = kernels.forward(x, shift, scale, EPS)
        dx, dshift, dscale = kernels.backward(x, x, scale, mean, rstd)
    assert y.shape == dx.shape == shape
    assert mean.shape == rstd.shape == shape[:3]
    assert torch.equal(dshift, torch.zeros_like(shift))
    assert torch.equal(dscale, torch.zeros_like(scale))


def test_the_same_call_gives_the_same_bits(kernels):
    torch.manual_seed(6)
    shape = (1, 2, 70, 64)
    x, dy = (torch.randn(shape, device=kernels.device) for _ in range(2))
    shift, scale = chunks_of(shape, torch.float32, kernels.device)
    first, second = (run_both(kernels, x, shift, scale, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bits_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(7)
    kernels, shape = compiled("vidkern_cpu", "cpu"), (2, 2, 150, 384)
    x, dy = (torch.randn(shape, device="cpu") for _ in range(2))
    shift, scale = chunks_of(shape, torch.float32, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_both(kernels, x, shift, scale, dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def run_both(kernels: Kernels, x: Tensor, shift: Tensor, scale: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    y, mean, rstd = kernels.forward(x, shift, scale, EPS)
    return (y, mean, rstd, *kernels.backward(dy, x, scale, mean, rstd))


def launches() -> None:
    """Launch every Triton kernel as training does, for tests/triton_aot.py."""
    for dtype, channels in ((torch.bfloat16, 1152), (torch.float32, 1152), (torch.bfloat16, 3072)):
        x = torch.randn(1, 2, 32, channels, device="cpu").to(dtype)
        shift, scale = chunks_of(tuple(x.shape), dtype, "cpu")
        _, mean, rstd = triton_kernels.layer_norm_modulate(x, shift, scale, EPS)
        triton_kernels.layer_norm_modulate_backward(x, x, scale, mean, rstd)


def test_triton_compiles_within_the_budget_of_every_gpu():
    facts = triton_aot.report("tests.ops.test_modulation_kernels", "launches")
    assert {fact["target"] for fact in facts} == {80, 86, 90}
    for fact in facts:
        assert fact["local_bytes"] == 0, f"spills: {fact}"
        assert fact["shared_bytes"] <= 99 * 1024, f"too much shared memory: {fact}"
        if fact["kernel"] == "_layer_norm_modulate":
            assert fact["wide_loads"] >= 9, f"narrow loads: {fact}"

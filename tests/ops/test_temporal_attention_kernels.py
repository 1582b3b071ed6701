"""The kernels of temporal attention, each against float64: C++, CUDA (on the emulator without a GPU), Triton."""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.ops.backends import kernels_of
from tests.ops.common import KERNEL_DTYPES, assert_contract, far_apart, poisoned_empty
from tests.ops.test_attention import plain_temporal, rope_tables
from vidkern.ops.attention import reference

NAMES = (
    "temporal_attention",
    "temporal_attention_backward",
    "temporal_attention_packed",
    "temporal_attention_packed_backward",
)
SHAPES = [  # (B, F, N, H, d)
    (2, 1, 3, 2, 32),
    (2, 2, 5, 3, 64),
    (1, 8, 3, 3, 128),
    (2, 16, 3, 2, 72),
    (1, 17, 2, 2, 80),
    (1, 32, 2, 1, 96),
    (1, 33, 1, 2, 72),
    (1, 100, 1, 1, 64),
    (1, 256, 1, 1, 32),
]
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


class Kernels(NamedTuple):
    """The four operators by one backend, and where their tensors must lie."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]
    forward_packed: Callable[..., Tensor]
    backward_packed: Callable[..., tuple[Tensor, Tensor]]
    device: str


class Options(NamedTuple):
    """What the operators take after the tokens."""

    bias: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    scale: float = 0.125
    causal: bool = False

    def double(self) -> "Options":
        """Return the options with tables in float64."""
        return Options(*(x.double() if isinstance(x, Tensor) else x for x in self))


def attention_kernels(backend: str) -> Kernels:
    find, device = kernels_of("attention", backend)
    return Kernels(*map(find, NAMES), device)


@pytest.fixture(params=["cpu", "cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return attention_kernels(request.param)


def random_tokens(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return qkv (B, F, N, 3, H, d) and do (B, F, N, H, d)."""
    torch.manual_seed(0)
    *outer, heads, d = shape
    qkv = torch.randn(*outer, 3, heads, d, device=kernels.device).to(dtype)
    return qkv, torch.randn(shape, device=kernels.device).to(dtype)


def every_option(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype) -> Options:
    _, frames, _, heads, d = shape
    cos, sin = (table.to(kernels.device, dtype) for table in rope_tables(frames, d))
    bias = torch.randn(heads, frames, frames, device=kernels.device).to(dtype)
    return Options(bias, cos, sin, 0.2, causal=True)


def plain(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Write the operator with PyTorch's own attention, which has no word on a query without keys: that gets 0."""
    bias, cos, sin, scale, causal = options
    rope = None if cos is None or sin is None else (cos, sin)
    if bias is None:
        return plain_temporal(q, k, v, None, rope, causal, scale)
    nothing = (bias == -math.inf).all(-1, keepdim=True)  # (H, F, 1)
    o = plain_temporal(q, k, v, bias.masked_fill(nothing, 0), rope, causal, scale)
    return o.masked_fill(nothing.transpose(0, 1)[:, None], 0)


def plain_grads(q: Tensor, k: Tensor, v: Tensor, do: Tensor, options: Options) -> list[Tensor]:
    """Return dq, dk, dv and, with a bias, dbias."""
    bias = None if options.bias is None else options.bias.detach().to(q.dtype).requires_grad_()
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o = plain(*leaves, options._replace(bias=bias))
    return list(torch.autograd.grad(o, leaves if bias is None else [*leaves, bias], do))


def run(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, do: Tensor, options: Options) -> list[Tensor]:
    """Return o, dq, dk, dv, dbias, with every unwritten element poisoned."""
    with poisoned_empty():
        o = kernels.forward(q, k, v, *options)
        return [o, *kernels.backward(do, q, k, v, *options, options.bias is not None)]


def check(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, do: Tensor, options: Options) -> None:
    """Hold all results against the contract."""
    results = run(kernels, q, k, v, do, options)
    for x in results[:4]:
        assert x.dtype == q.dtype
        assert x.is_contiguous()
    assert results[4].dtype == torch.float32
    assert results[4].shape == ((0,) if options.bias is None else options.bias.shape)

    wide, given = [x.double() for x in (q, k, v)], options.double()
    exact = [
        reference.temporal_attention(*wide, *given),
        *reference.temporal_attention_backward(do.double(), *wide, *given, options.bias is not None),
    ]
    same = [plain(q, k, v, options), *plain_grads(q, k, v, do, options)]
    for name, ours, same_dtype, truth in zip(("o", "dq", "dk", "dv", "dbias"), results, same, exact, strict=False):
        assert_contract(name, ours, same_dtype, truth)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(kernels, shape, dtype):
    qkv, do = random_tokens(kernels, shape, dtype)
    check(kernels, *qkv.unbind(3), do, Options())


@every_dtype
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[6]], ids=str)
def test_bias_rope_causal_and_scale(kernels, shape, dtype):
    qkv, do = random_tokens(kernels, shape, dtype)
    check(kernels, *qkv.unbind(3), do, every_option(kernels, shape, dtype))


@pytest.mark.parametrize("option", ["bias", "rope", "causal"])
@pytest.mark.parametrize("frames", [5, 40])
def test_one_option_alone(kernels, option, frames):
    shape = (2, frames, 2, 2, 32)
    qkv, do = random_tokens(kernels, shape, torch.float32)
    options, wanted = every_option(kernels, shape, torch.float32), {option} if option != "rope" else {"cos", "sin"}
    check(kernels, *qkv.unbind(3), do, Options(**{name: getattr(options, name) for name in wanted}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_tables_beside_16_bit_tokens(kernels, dtype):
    shape = (1, 9, 2, 2, 72)
    qkv, do = random_tokens(kernels, shape, dtype)
    options = every_option(kernels, shape, dtype)
    narrow = run(kernels, *qkv.unbind(3), do, options)
    wide = run(kernels, *qkv.unbind(3), do, Options(*(x.float() if isinstance(x, Tensor) else x for x in options)))
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@every_dtype
@pytest.mark.parametrize("shape", [(2, 6, 3, 2, 72), (1, 33, 2, 2, 64)], ids=str)
def test_packed_equals_apart_bit_for_bit(kernels, shape, dtype):
    qkv, do = random_tokens(kernels, shape, dtype)
    options = every_option(kernels, shape, dtype)
    o, *grads, dbias = run(kernels, *qkv.unbind(3), do, options)
    with poisoned_empty():
        o_packed = kernels.forward_packed(qkv, *options)
        dqkv, dbias_packed = kernels.backward_packed(do, qkv, *options, True)
    assert torch.equal(o_packed, o)
    assert torch.equal(dqkv, torch.stack(grads, 3))
    assert torch.equal(dbias_packed, dbias)
    assert o_packed.is_contiguous()
    assert dqkv.is_contiguous()


@every_dtype
@pytest.mark.parametrize("start", [0, 3], ids=["aligned", "unaligned"])
def test_strides_are_read_in_place(kernels, start, dtype):
    torch.manual_seed(0)
    batch, frames, tokens, heads, d = 2, 7, 3, 2, 32

    def strided() -> Tensor:
        wide = torch.randn(tokens, heads, batch, 2 * frames, d + 8, device=kernels.device).to(dtype)
        return wide.permute(2, 3, 0, 1, 4)[:, ::2, :, :, start : start + d]

    q, k, v = (strided() for _ in range(3))
    do = strided()[:, :1, :1].expand(batch, frames, tokens, heads, d)
    options = every_option(kernels, (batch, frames, tokens, heads, d), dtype)
    tables = torch.randn(3 * frames, 2 * d, device=kernels.device).to(dtype)
    bias = torch.randn(frames, heads, 2 * frames, device=kernels.device).to(dtype).transpose(0, 1)[:, :, :frames]
    options = options._replace(bias=bias, cos=tables[:frames, :d], sin=tables[::3, d:])
    packed = Options(*(x.contiguous() if isinstance(x, Tensor) else x for x in options))
    ours = run(kernels, q, k, v, do, options)
    wanted = run(kernels, *(x.contiguous() for x in (q, k, v, do)), packed)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("frames", [2, 17])
def test_offsets_of_more_than_32_bits(kernels, frames, dim):
    shape = (2, frames if dim != 1 else 2, 2, 2, 32)
    tokens = [torch.randn(shape, device=kernels.device).bfloat16() for _ in range(4)]
    options = Options()
    far = run(kernels, *(far_apart(x, dim) for x in tokens), options)
    assert all(torch.equal(a, b) for a, b in zip(far, run(kernels, *tokens, options), strict=True))


@every_dtype
@pytest.mark.parametrize("frames", [16, 40])
def test_nearly_equal_logits(kernels, frames, dtype):
    qkv, do = random_tokens(kernels, (1, frames, 2, 2, 64), dtype)
    qkv[:, :, :, 0] *= 1e-3
    check(kernels, *qkv.unbind(3), do, Options())


@every_dtype
@pytest.mark.parametrize("frames", [16, 40])
def test_very_large_logits(kernels, frames, dtype):
    """Whole numbers, whose products any order of sums gets right: the logits are exact, up to thousands."""
    qkv, do = random_tokens(kernels, (1, frames, 2, 2, 64), dtype)
    qkv[:, :, :, :2] = (6 * qkv[:, :, :, :2]).round()
    check(kernels, *qkv.unbind(3), do, Options(scale=4.0))


@every_dtype
@pytest.mark.parametrize("frames", [5, 40])
def test_a_bias_of_minus_infinity_masks(kernels, frames, dtype):
    shape = (2, frames, 2, 2, 32)
    qkv, do = random_tokens(kernels, shape, dtype)
    bias = torch.randn(2, frames, frames, device=kernels.device).to(dtype)
    bias[torch.rand(bias.shape, device=kernels.device) < 0.3] = -math.inf
    bias[0, 3] = -math.inf
    o, dq, _, _, dbias = run(kernels, *qkv.unbind(3), do, Options(bias))
    for nothing in (o[:, 3, :, 0], dq[:, 3, :, 0], dbias[0, 3]):
        assert torch.equal(nothing, torch.zeros_like(nothing))
    check(kernels, *qkv.unbind(3), do, Options(bias))


def test_a_bias_of_plus_infinity_gives_nan_as_a_softmax_does(kernels):
    qkv, do = random_tokens(kernels, (1, 6, 3, 2, 32), torch.float32)
    bias = torch.zeros(2, 6, 6, device=kernels.device)
    bias[1, 2, 4] = math.inf
    check(kernels, *qkv.unbind(3), do, Options(bias))


@every_dtype
@pytest.mark.parametrize("place", ["q", "k", "v", "do"])
@pytest.mark.parametrize("special", [math.nan, math.inf], ids=str)
def test_nan_and_inf_go_where_the_definition_sends_them(kernels, place, special, dtype):
    qkv, do = random_tokens(kernels, (1, 5, 5, 2, 32), dtype)
    (do if place == "do" else qkv[:, :, :, "qkv".index(place)])[0, 2, 1, 0, 7] = special
    check(kernels, *qkv.unbind(3), do, Options())


@pytest.mark.parametrize("shape", [(2, 3, 19, 3, 32), (1, 1, 67, 1, 72)], ids=str)
def test_a_ragged_number_of_problems(kernels, shape):
    qkv, do = random_tokens(kernels, shape, torch.bfloat16)
    check(kernels, *qkv.unbind(3), do, every_option(kernels, shape, torch.bfloat16))


@pytest.mark.parametrize("frames", [6, 40])
def test_a_triton_program_adds_up_the_gradient_of_the_bias_over_its_problems(monkeypatch, frames):
    triton_kernels = importlib.import_module("vidkern.ops.attention.triton_kernels")
    monkeypatch.setattr(triton_kernels, "ENOUGH_PROGRAMS", 8)  # so that one takes several
    kernels, shape = attention_kernels("triton"), (1, frames, 9, 2, 32)
    qkv, do = random_tokens(kernels, shape, torch.float32)
    check(kernels, *qkv.unbind(3), do, every_option(kernels, shape, torch.float32))


def test_a_hundred_thousand_tokens():
    kernels, shape = attention_kernels("cpu"), (2, 2, 50000, 1, 32)
    qkv, do = random_tokens(kernels, shape, torch.float32)
    options = Options(torch.randn(1, 2, 2, device="cpu"))
    ours = run(kernels, *qkv.unbind(3), do, options)
    exact = reference.temporal_attention_backward(do, *qkv.unbind(3), *options, False)
    torch.testing.assert_close(ours[0], reference.temporal_attention(*qkv.unbind(3), *options))
    for got, wanted in zip(ours[1:4], exact[:3], strict=True):
        torch.testing.assert_close(got, wanted)
    wide = [x.double() for x in qkv.unbind(3)]
    dbias = reference.temporal_attention_backward(do.double(), *wide, *options.double(), True)[3]
    torch.testing.assert_close(ours[4].double(), dbias, rtol=0, atol=1e-6 * float(100000**0.5 * dbias.abs().max()))


@pytest.mark.parametrize("shape", [(0, 2, 3, 2, 32), (2, 0, 3, 2, 32), (2, 2, 0, 2, 32)], ids=str)
def test_empty(kernels, shape):
    _, frames, _, heads, _ = shape
    qkv, do = random_tokens(kernels, shape, torch.float32)
    options = Options(torch.randn(heads, frames, frames, device=kernels.device))
    o, dq, dk, dv, dbias = run(kernels, *qkv.unbind(3), do, options)
    assert o.shape == dq.shape == dk.shape == dv.shape == shape
    assert torch.equal(dbias, torch.zeros(heads, frames, frames, device=kernels.device))


@pytest.mark.parametrize("frames", [6, 40])
def test_the_same_call_gives_the_same_bits(kernels, frames):
    shape = (2, frames, 5, 2, 32)
    qkv, do = random_tokens(kernels, shape, torch.float32)
    options = every_option(kernels, shape, torch.float32)
    first, second = (run(kernels, *qkv.unbind(3), do, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_dtype
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    kernels, shape = attention_kernels("cpu"), (3, 9, 100, 3, 72)
    qkv, do = random_tokens(kernels, shape, dtype)
    options = every_option(kernels, shape, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(kernels, *qkv.unbind(3), do, options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

"""GELU and the MLP as users call them: definition, registration, gradients, compilation, memory, bad input."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vidkern
from tests.ops.common import assert_compiles_once, assert_value_and_grads
from vidkern import ops
from vidkern.nn.block import Mlp

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_backend = pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "automatic"])


def plain_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def plain_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(plain_gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def gelu_inputs(*shape: int, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> list[Tensor]:
    made = [2 * torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)]
    return [tensor.requires_grad_(requires_grad) for tensor in made]


def mlp_inputs(
    *shape: int, inner: int = 32, out: int = 24, dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> list[Tensor]:
    """Return (x, weight1, bias1, weight2, bias2), whose products are of order 1."""
    channels = shape[-1]
    made = [
        torch.randn(shape, dtype=dtype),
        torch.randn(inner, channels, dtype=dtype) / channels**0.5,
        torch.randn(inner, dtype=dtype),
        torch.randn(out, inner, dtype=dtype) / inner**0.5,
        torch.randn(out, dtype=dtype),
    ]
    return [tensor.requires_grad_(requires_grad) for tensor in made]


@every_dtype
@every_backend
@pytest.mark.parametrize("shape", [(2, 3, 5, 32), (7, 1160), (8,), (3, 13)], ids=str)
def test_gelu_and_its_gradients_meet_the_contract(dtype, backend, shape):
    torch.manual_seed(0)
    upstream = [torch.randn(shape, dtype=torch.float64)]
    with vidkern.backend(backend):
        assert_value_and_grads(ops.gelu_tanh, plain_gelu, gelu_inputs(*shape), upstream, dtype)
        assert_value_and_grads(ops.gelu_tanh, plain_gelu, gelu_inputs(*shape)[:1], upstream, dtype)


@every_dtype
@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (70, 24), (16,)], ids=str)
def test_the_mlp_and_its_gradients_meet_the_contract(dtype, shape):
    torch.manual_seed(0)
    upstream = [torch.randn(*shape[:-1], 24, dtype=torch.float64)]
    assert_value_and_grads(ops.gelu_mlp, plain_mlp, mlp_inputs(*shape), upstream, dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@every_backend
def test_opcheck(with_bias, backend):
    torch.manual_seed(0)
    x, bias = gelu_inputs(6, 16, dtype=torch.float32, requires_grad=True)
    dy = torch.randn(6, 16)
    biases = (bias,) if with_bias else (None,)
    strided = torch.randn(6, 40)[:, 8:24].requires_grad_()
    with vidkern.backend(backend):
        for rows in (x, strided):
            torch.library.opcheck(torch.ops.vidkern.gelu_tanh.default, (rows, *biases))
            detached = (dy, rows.detach(), *(None if b is None else b.detach() for b in biases))
            torch.library.opcheck(torch.ops.vidkern.gelu_tanh_backward.default, detached)
            torch.library.opcheck(torch.ops.vidkern.gelu_mlp_backward.default, detached[:2])


def test_gradcheck():
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(ops.gelu_tanh, gelu_inputs(3, 8, requires_grad=True))
    assert torch.autograd.gradcheck(ops.gelu_mlp, mlp_inputs(2, 3, 4, inner=5, out=3, requires_grad=True))


def test_differentiating_twice_raises():
    torch.manual_seed(0)
    inputs = mlp_inputs(3, 8, requires_grad=True)
    [grad] = torch.autograd.grad(ops.gelu_mlp(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 4), (1, 3)], ids=str)
def test_the_mlp_gives_the_gradients_that_are_asked_for(wanted):
    torch.manual_seed(0)
    inputs = mlp_inputs(2, 3, 16)
    for i in wanted:
        inputs[i].requires_grad_()
    ours, plain = ops.gelu_mlp(*inputs), plain_mlp(*inputs)
    upstream, asked = torch.randn_like(plain), [inputs[i] for i in wanted]
    grads = torch.autograd.grad(ours, asked, upstream), torch.autograd.grad(plain, asked, upstream)
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_compiles_once_for_every_batch_frames_and_tokens():
    torch.manual_seed(0)
    sizes = [(2, 3, 5), (4, 3, 7), (3, 8, 6), (5, 2, 2)]

    def gelu(*size: int) -> list[Tensor]:
        return gelu_inputs(*size, 16, dtype=torch.float32, requires_grad=True)

    def mlp(*size: int) -> list[Tensor]:
        return mlp_inputs(*size, 16, dtype=torch.float32, requires_grad=True)

    assert_compiles_once(ops.gelu_tanh, gelu, sizes)
    assert_compiles_once(ops.gelu_mlp, mlp, sizes)
    with torch.no_grad():
        assert_compiles_once(ops.gelu_mlp, lambda *size: mlp_inputs(*size, 16, dtype=torch.float32), sizes)


@every_dtype
def test_rows_are_read_in_place_and_anything_else_is_copied(dtype):
    torch.manual_seed(0)
    wide = torch.randn(2, 6, 4, 48).to(dtype)
    bias = torch.randn(32).to(dtype)
    views = [wide[..., 8:40], wide[..., 3:35], wide[:, ::2, 1:, 8:40], wide[..., :32].transpose(0, 2)]
    views += [wide[0, :, :, :32].mT.contiguous().mT, wide[:1, :1, :1, :32].expand(2, 3, 5, 32)]
    for view in views:
        got = ops.gelu_tanh(view, bias)
        assert torch.equal(got, ops.gelu_tanh(view.clone(memory_format=torch.contiguous_format), bias))
        assert got.is_contiguous()


def test_the_mlp_of_strided_tokens():
    torch.manual_seed(0)
    x, *parameters = mlp_inputs(4, 3, 2, 16, requires_grad=True)
    view = x.transpose(0, 2)
    got, wanted = ops.gelu_mlp(view, *parameters), plain_mlp(view, *parameters)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn(4, 3, 2, 24, dtype=torch.float64).transpose(0, 2)
    grads = [torch.autograd.grad(output, (x, *parameters), upstream) for output in (got, wanted)]
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 3, 16)], ids=str)
def test_empty_tensors(shape):
    inputs = mlp_inputs(*shape, dtype=torch.float32, requires_grad=True)
    out = ops.gelu_mlp(*inputs)
    assert out.shape == (*shape[:-1], 24)
    for grad, given in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(given))
    x, bias = gelu_inputs(*shape, dtype=torch.float32, requires_grad=True)
    out = ops.gelu_tanh(x, bias)
    assert out.shape == shape
    assert torch.equal(torch.autograd.grad(out.sum(), bias)[0], torch.zeros(16))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_of_another_dtype(x_dtype, bias_dtype):
    torch.manual_seed(0)
    x, bias = gelu_inputs(9, 16)
    x, bias = x.to(x_dtype).requires_grad_(), bias.to(bias_dtype).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, bias)]
    got, wanted = ops.gelu_tanh(x, bias), plain_gelu(*exact)
    grads = torch.autograd.grad(got.sum(), (x, bias)), torch.autograd.grad(wanted.sum(), exact)
    for ours, truth in zip((got, *grads[0]), (wanted, *grads[1]), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=8e-3 * float(truth.detach().abs().max()))
    assert (got.dtype, *(grad.dtype for grad in grads[0])) == (x_dtype, x_dtype, bias_dtype)


def _kept_bytes(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Return the bytes of the activations kept for the backward pass, parameters and what was given left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*inputs)
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return sum(count for pointer, count in kept.items() if pointer not in given)


def test_the_activation_is_not_kept():
    torch.manual_seed(0)
    inputs = mlp_inputs(4, 10, 16, inner=64, dtype=torch.float32, requires_grad=True)
    inner_bytes = 4 * 10 * 64 * 4
    assert _kept_bytes(plain_mlp, inputs) == 2 * inner_bytes
    assert _kept_bytes(ops.gelu_mlp, inputs) == inner_bytes


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast_casts_as_linear_does(grad):
    torch.manual_seed(0)
    inputs = mlp_inputs(3, 5, 16, dtype=torch.float32, requires_grad=grad)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = ops.gelu_mlp(*inputs), plain_mlp(*inputs)
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
    if grad:
        grads = [torch.autograd.grad(output.float().square().sum(), inputs) for output in (ours, plain)]
        for got, wanted in zip(*grads, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-2 * float(wanted.abs().max()))


def test_autocast_leaves_float64_alone():
    torch.manual_seed(0)
    inputs = mlp_inputs(3, 5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = ops.gelu_mlp(*inputs)
    torch.testing.assert_close(ours, plain_mlp(*inputs))


def test_the_module_is_linear_gelu_linear_by_the_names_of_dit():
    torch.manual_seed(0)
    mlp = Mlp(16, 64).double()
    assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    nn.init.normal_(mlp.fc1.bias)
    nn.init.normal_(mlp.fc2.bias)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    plain = nn.Sequential(mlp.fc1, nn.GELU(approximate="tanh"), mlp.fc2)
    torch.testing.assert_close(mlp(x), plain(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(use_reentrant):
    torch.manual_seed(0)
    inputs = mlp_inputs(3, 5, 16, dtype=torch.float32, requires_grad=True)
    direct, again = ops.gelu_mlp(*inputs), checkpoint(ops.gelu_mlp, *inputs, use_reentrant=use_reentrant)
    grads = [torch.autograd.grad(output.square().sum(), inputs) for output in (direct,)]
    again.square().sum().backward()
    assert torch.equal(direct, again)
    assert all(torch.equal(got, tensor.grad) for got, tensor in zip(grads[0], inputs, strict=True))


def test_the_same_call_gives_the_same_bits():
    torch.manual_seed(0)
    inputs = mlp_inputs(67, 16, dtype=torch.float32, requires_grad=True)
    runs = [torch.autograd.grad(ops.gelu_mlp(*inputs).square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


X = torch.randn(2, 3, 16)
BIAS = torch.randn(16)
BAD = [
    ("x as a list", ([1.0], None), TypeError, "x must be a torch.Tensor, got list"),
    ("integer x", (X.long(), None), TypeError, "x must be float32 or float16 or bfloat16 or float64, got int64"),
    ("a number", (X[0, 0, 0], None), ValueError, "x must be (..., D) with D above 0, got ()"),
    ("no channels", (X[..., :0], None), ValueError, "x must be (..., D) with D above 0, got (2, 3, 0)"),
    ("a short bias", (X, BIAS[:8]), ValueError, "bias must be (D,) = (16,), got (8,)"),
    ("a bias with steps", (X, torch.randn(32)[::2]), ValueError, "bias must have unit stride in its last dimension"),
    ("float64 bias", (X, BIAS.double()), TypeError, "bias must be float32 or bfloat16 or float16, got float64"),
    ("float32 bias of float64", (X.double(), BIAS), TypeError, "bias must be float64, got float32"),
    ("bias elsewhere", (X, BIAS.to("meta")), ValueError, "bias must be on the device of x (cpu), got meta"),
]


@pytest.mark.parametrize(("case", "args", "error", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_of_gelu_gets_one_clear_error(case, args, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.gelu_tanh(*args)


W1, B1, W2, B2 = torch.randn(32, 16), torch.randn(32), torch.randn(24, 32), torch.randn(24)
BAD_MLP = [
    ("x as a list", ([1.0], W1, B1, W2, B2), TypeError, "x must be a torch.Tensor, got list"),
    ("no bias", (X, W1, None, W2, B2), TypeError, "bias1 must be a torch.Tensor, got NoneType"),
    ("weight1 transposed", (X, W1.t(), B1, W2, B2), ValueError, "weight1 must be (I, D) = (16, 16), got (16, 32)"),
    ("weight1 flat", (X, B1, B1, W2, B2), ValueError, "weight1 must be (I, D), got 1 dimensions: (32,)"),
    ("bias1 of another width", (X, W1, B2, W2, B2), ValueError, "bias1 must be (I,) = (32,), got (24,)"),
    ("weight2 of another width", (X, W1, B1, W1, B2), ValueError, "weight2 must be (O, I) = (32, 32), got (32, 16)"),
    ("bias2 of another width", (X, W1, B1, W2, B1), ValueError, "bias2 must be (O,) = (24,), got (32,)"),
    ("weights in 16 bits", (X, W1.half(), B1, W2, B2), TypeError, "weight1 must be float32, got float16"),
    ("bias2 elsewhere", (X, W1, B1, W2, B2.to("meta")), ValueError, "bias2 must be on the device of x (cpu), got meta"),
]


@pytest.mark.parametrize(("case", "args", "error", "message"), BAD_MLP, ids=[case[0] for case in BAD_MLP])
def test_bad_input_of_the_mlp_gets_one_clear_error(case, args, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.gelu_mlp(*args)

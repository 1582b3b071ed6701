"""The modulation operators as users call them: definition, registration, gradients, compilation, bad input."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vidkern
from tests.ops.common import assert_compiles_once, assert_value_and_grads
from vidkern import ops


def plain_layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def plain_rms_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def plain_gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(2) * y


def plain_gate_residual_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor):
    z = plain_gate_residual(x, y, gate)
    return z, plain_layer_norm_modulate(z, shift, scale)


def plain_gate_residual_rms_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor):
    z = plain_gate_residual(x, y, gate)
    return z, plain_rms_norm_modulate(z, shift, scale)


# operator: (plain writing, number of (B, F, N, D) inputs, number of (B, F, D) inputs, number of outputs)
OPERATORS = {
    ops.layer_norm_modulate: (plain_layer_norm_modulate, 1, 2, 1),
    ops.rms_norm_modulate: (plain_rms_norm_modulate, 1, 2, 1),
    ops.gate_residual: (plain_gate_residual, 2, 1, 1),
    ops.gate_residual_modulate: (plain_gate_residual_modulate, 2, 3, 2),
    ops.gate_residual_rms_modulate: (plain_gate_residual_rms_modulate, 2, 3, 2),
}

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
every_backend = pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "automatic"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def inputs_of(operator, shape: tuple[int, int, int, int], dtype=torch.float64, requires_grad=False) -> list[Tensor]:
    batch, frames, _, channels = shape
    _, tokens, vectors, _ = OPERATORS[operator]
    made = [torch.randn(shape, dtype=dtype) for _ in range(tokens)]
    made += list(torch.randn(batch, frames, vectors * channels, dtype=dtype).chunk(vectors, -1))
    return [tensor.requires_grad_(requires_grad) for tensor in made]


def schema_inputs(operator, inputs: list[Tensor]) -> tuple:
    return (*inputs,) if operator is ops.gate_residual else (*inputs, 1e-6)


@every_operator
@every_dtype
@pytest.mark.parametrize("shape", [(2, 3, 5, 32), (1, 1, 1, 8), (3, 2, 7, 1152)], ids=str)
def test_value_and_gradients_meet_the_contract(operator, dtype, shape):
    torch.manual_seed(0)
    plain, _, _, outputs = OPERATORS[operator]
    upstream = [torch.randn(shape, dtype=torch.float64) for _ in range(outputs)]
    assert_value_and_grads(operator, plain, inputs_of(operator, shape), upstream, dtype)


@every_operator
def test_opcheck(operator):
    torch.manual_seed(0)
    registered = getattr(torch.ops.vidkern, operator.__name__).default
    inputs = inputs_of(operator, (2, 3, 4, 16), torch.float32, requires_grad=True)
    torch.library.opcheck(registered, schema_inputs(operator, inputs))


@every_operator
@every_backend
def test_opcheck_of_strided_tokens(operator, backend):
    torch.manual_seed(0)
    registered = getattr(torch.ops.vidkern, operator.__name__).default
    inputs = [
        tensor.transpose(0, 1).detach().requires_grad_() for tensor in inputs_of(operator, (3, 2, 4, 16), torch.float32)
    ]
    with vidkern.backend(backend):
        torch.library.opcheck(registered, schema_inputs(operator, inputs))
        outputs = registered(*schema_inputs(operator, inputs))
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    assert all(output.is_contiguous() for output in outputs)


@every_operator
def test_gradcheck(operator):
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(operator, inputs_of(operator, (2, 2, 3, 8), requires_grad=True))


@pytest.mark.parametrize("operator", [ops.gate_residual_modulate, ops.gate_residual_rms_modulate])
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output_alone(operator, output):
    torch.manual_seed(0)
    inputs = inputs_of(operator, (2, 2, 3, 8), requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: operator(*args)[output], inputs)


@every_operator
def test_compiles_once_for_every_batch_frames_and_tokens(operator):
    torch.manual_seed(0)

    def make(batch: int, frames: int, tokens: int) -> list[Tensor]:
        return inputs_of(operator, (batch, frames, tokens, 16), torch.float32, requires_grad=True)

    assert_compiles_once(operator, make, [(2, 3, 5), (4, 3, 7), (3, 8, 6), (5, 2, 2)])


@every_operator
@every_dtype
def test_strided_tokens_and_expanded_vectors_are_read_in_place(operator, dtype):
    torch.manual_seed(0)
    _, tokens, vectors, _ = OPERATORS[operator]
    wide = [torch.randn(2, 6, 4, 48, dtype=dtype)[:, ::2, 1:, 8:40] for _ in range(tokens)]
    narrow = [torch.randn(2, 1, 32, dtype=dtype).expand(2, 3, 32) for _ in range(vectors)]
    packed = [tensor.clone(memory_format=torch.contiguous_format) for tensor in wide + narrow]
    for got, wanted in zip(_outputs(operator(*wide, *narrow)), _outputs(operator(*packed)), strict=True):
        assert torch.equal(got, wanted)
        assert got.is_contiguous()


@every_operator
@pytest.mark.parametrize("shape", [(0, 3, 4, 16), (2, 0, 4, 16), (2, 3, 0, 16)], ids=str)
def test_empty_tensors(operator, shape):
    inputs = inputs_of(operator, shape, torch.float32, requires_grad=True)
    outputs = _outputs(operator(*inputs))
    assert all(output.shape == shape for output in outputs)
    grads = torch.autograd.grad([output.sum() for output in outputs], inputs)
    for grad, given in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(given))  # a frame without tokens moves its vectors nowhere


@every_operator
@pytest.mark.parametrize("tokens_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vectors_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vectors_of_another_dtype_than_the_tokens(operator, tokens_dtype, vectors_dtype):
    torch.manual_seed(0)
    plain, tokens, _, _ = OPERATORS[operator]
    inputs = inputs_of(operator, (2, 3, 4, 16))
    mixed = [x.to(tokens_dtype if i < tokens else vectors_dtype).requires_grad_() for i, x in enumerate(inputs)]
    exact = [x.detach().double().requires_grad_() for x in mixed]
    got, wanted = _outputs(operator(*mixed)), _outputs(plain(*exact))
    grads = torch.autograd.grad([out.square().sum() for out in got], mixed)
    exact_grads = torch.autograd.grad([out.square().sum() for out in wanted], exact)
    for ours, truth in zip((*got, *grads), (*wanted, *exact_grads), strict=True):
        coarsest = max(torch.finfo(dtype).eps for dtype in (tokens_dtype, vectors_dtype))
        bound = 4 * max(coarsest, 1e-6) * float(truth.detach().abs().max())
        torch.testing.assert_close(ours.detach().double(), truth.detach(), rtol=0, atol=bound)
    assert all(out.dtype == tokens_dtype for out in got)
    assert [grad.dtype for grad in grads] == [x.dtype for x in mixed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mean", "deviation"), [(1e3, 1.0), (20.0, 0.0), (0.0, 1e-4)])
def test_statistics_of_far_tiny_and_constant_rows(dtype, mean, deviation):
    torch.manual_seed(0)
    shape = (2, 2, 5, 64)
    x = mean + deviation * torch.randn(shape, dtype=torch.float64)
    shift, scale = torch.randn(2, 2, 128, dtype=torch.float64).chunk(2, -1)
    for backend in ("reference", None):
        with vidkern.backend(backend):
            assert_value_and_grads(
                ops.layer_norm_modulate, plain_layer_norm_modulate, [x, shift, scale], [torch.randn(shape)], dtype
            )


@every_operator
def test_the_same_call_gives_the_same_bits(operator):
    torch.manual_seed(0)
    inputs = inputs_of(operator, (2, 3, 33, 64), torch.float32, requires_grad=True)
    first, second = (_outputs(operator(*inputs)) for _ in range(2))
    grads = [torch.autograd.grad([output.square().sum() for output in run], inputs) for run in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def _outputs(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


X = torch.randn(2, 3, 4, 16)
V = torch.randn(2, 3, 16)
BAD = [
    ("x as a list", ([1.0], V, V), TypeError, "x must be a torch.Tensor, got list"),
    ("x of three dimensions", (X[0], V, V), ValueError, "x must be (B, F, N, D), got 3 dimensions: (3, 4, 16)"),
    ("integer x", (X.long(), V, V), TypeError, "x must be float32 or float16 or bfloat16 or float64, got int64"),
    ("D not a multiple of 8", (X[..., :12], V, V), ValueError, "x must have D a multiple of 8"),
    ("D too large", (torch.randn(1, 1, 1, 8200), V, V), ValueError, "between 8 and 8192, got D = 8200"),
    ("x transposed", (torch.randn(2, 3, 16, 4).mT, V, V), ValueError, "x must have unit stride in its last dimension"),
    (
        "shift of another frame count",
        (X, V[:, :2], V),
        ValueError,
        "shift must be (B, F, D) = (2, 3, 16), got (2, 2, 16)",
    ),
    ("scale without frames", (X, V, V[:, 0]), ValueError, "scale must be (B, F, D) = (2, 3, 16), got (2, 16)"),
    (
        "scale of another dtype than shift",
        (X.bfloat16(), V, V.bfloat16()),
        TypeError,
        "scale must be float32, got bfloat16",
    ),
    (
        "float64 vectors",
        (X, V.double(), V.double()),
        TypeError,
        "shift must be float32 or bfloat16 or float16, got float64",
    ),
    ("vectors on another device", (X, V.to("meta"), V), ValueError, f"shift must be on the device of x ({X.device})"),
    ("eps of zero", (X, V, V, 0.0), ValueError, "eps must be a positive number, got 0.0"),
]


@pytest.mark.parametrize(("case", "args", "error", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_gets_one_clear_error(case, args, error, message):
    for operator in (ops.layer_norm_modulate, ops.rms_norm_modulate):
        with pytest.raises(error, match=re.escape(message)):
            operator(*args)


def test_a_branch_of_another_shape_or_dtype_is_named():
    with pytest.raises(ValueError, match=re.escape("y must be (B, F, N, D) as x = (2, 3, 4, 16), got (2, 3, 3, 16)")):
        ops.gate_residual(X, X[:, :, :3], V)
    with pytest.raises(TypeError, match="y must be float32, got float64"):
        ops.gate_residual_modulate(X, X.double(), V, V, V)
    with pytest.raises(ValueError, match=re.escape("gate must be (B, F, D) = (2, 3, 16), got (2, 3, 8)")):
        ops.gate_residual_rms_modulate(X, X, V[..., :8], V, V)

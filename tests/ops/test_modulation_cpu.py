"""The modulation family's C++ kernels: the float64 contract on hard values, strides, ragged sizes, the same bits."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import vidkern
from tests.ops.common import KERNEL_DTYPES, assert_contract, assert_value_and_grads
from tests.ops.test_modulation import OPERATORS, every_dtype, every_operator, inputs_of
from vidkern import _library, ops

NORMED = [operator for operator in OPERATORS if operator is not ops.gate_residual]
RESIDUAL = [ops.gate_residual_modulate, ops.gate_residual_rms_modulate]
WITH_RESIDUAL = [ops.gate_residual, *RESIDUAL]


@pytest.fixture(autouse=True)
def cpu_kernels() -> Iterator[None]:
    torch.manual_seed(0)
    with vidkern.backend("cpu"):
        yield


@pytest.mark.parametrize("name", [name for op in OPERATORS for name in (op.__name__, f"{op.__name__}_backward")])
def test_every_operator_is_served(name):
    assert _library.operators[name].why_not("cpu", "cpu") is None


def check(operator, inputs: list[Tensor], dtype: torch.dtype) -> None:
    plain, _, _, outputs = OPERATORS[operator]
    upstream = [torch.randn(inputs[0].shape, dtype=torch.float64) for _ in range(outputs)]
    assert_value_and_grads(operator, plain, inputs, upstream, dtype)


@every_operator
@every_dtype
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64), (1, 3, 33, 24), (2, 1, 65, 72), (3, 2, 7, 1152), (1, 1, 2, 8192)], ids=str
)
def test_ragged_sizes(operator, dtype, shape):
    check(operator, inputs_of(operator, shape), dtype)


@every_operator
@every_dtype
@pytest.mark.parametrize(("mean", "deviation"), [(1e3, 1.0), (0.0, 1e-4), (0.0, 1e3)])
def test_hard_tokens(operator, dtype, mean, deviation):
    inputs = inputs_of(operator, (2, 2, 35, 384))
    inputs[0] = inputs[0] * deviation + mean
    if operator in WITH_RESIDUAL:
        inputs[1] = inputs[1] * deviation
    check(operator, inputs, dtype)


@pytest.mark.parametrize("operator", NORMED, ids=lambda operator: operator.__name__)
@every_dtype
@pytest.mark.parametrize("value", [0.0, 1.5, -1000.0])
def test_tokens_without_variance(operator, dtype, value):
    inputs = inputs_of(operator, (1, 2, 3, 72))
    inputs[0][:, :, 1] = value
    if operator in WITH_RESIDUAL:
        inputs[1][:, :, 1] = 0.0
    with torch.no_grad():
        ours = _outputs(operator(*(tensor.to(dtype) for tensor in inputs)))
        plain = _outputs(OPERATORS[operator][0](*(tensor.to(dtype) for tensor in inputs)))
        exact = _outputs(OPERATORS[operator][0](*(tensor.to(dtype).double() for tensor in inputs)))
    for triple in zip(ours, plain, exact, strict=True):
        assert_contract("output", *triple)


@every_operator
@every_dtype
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_go_where_the_definition_sends_them(operator, dtype, special):
    inputs = [tensor.to(dtype) for tensor in inputs_of(operator, (1, 2, 34, 48))]
    inputs[0][0, 0, 3, 5] = special
    inputs[-1][0, 1, 7] = special
    upstream = [torch.randn_like(inputs[0]) for _ in range(OPERATORS[operator][3])]
    upstream[-1][0, 0, 9, 2] = special
    ours = _values_and_grads(operator, inputs, upstream)
    with vidkern.backend("reference"):
        wanted = _values_and_grads(operator, inputs, upstream)
    for got, reference in zip(ours, wanted, strict=True):
        assert torch.equal(got.isnan(), reference.isnan())
        assert torch.equal(got.isinf(), reference.isinf())
        torch.testing.assert_close(got, reference, equal_nan=True, rtol=2e-2, atol=5e-2)


@every_operator
@every_dtype
def test_strides_change_no_bit(operator, dtype):
    _, tokens, vectors, outputs = OPERATORS[operator]
    wide = [torch.randn(2, 6, 40, 96, dtype=dtype)[:, ::2, 3:, 16:88] for _ in range(tokens)]
    chunks = list(torch.randn(2, 3, vectors * 72, dtype=dtype).chunk(vectors, -1))
    upstream = [torch.randn(2, 37, 3, 80, dtype=dtype).transpose(1, 2)[..., :72] for _ in range(outputs)]
    strided = _values_and_grads(operator, wide + chunks, upstream)
    packed = _values_and_grads(operator, [t.contiguous() for t in wide + chunks], [t.contiguous() for t in upstream])
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))


@every_operator
def test_expanded_vectors_change_no_bit(operator):
    _, tokens, vectors, outputs = OPERATORS[operator]
    inputs = [torch.randn(2, 3, 34, 40) for _ in range(tokens)]
    vectors = [torch.randn(2, 1, 40).expand(2, 3, 40), *(torch.randn(40).expand(2, 3, 40) for _ in range(vectors - 1))]
    upstream = [torch.randn(2, 3, 34, 40) for _ in range(outputs)]
    expanded = _values_and_grads(operator, inputs + vectors, upstream)
    packed = _values_and_grads(operator, inputs + [vector.contiguous() for vector in vectors], upstream)
    assert all(torch.equal(a, b) for a, b in zip(expanded, packed, strict=True))


@every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_vectors_beside_16_bit_tokens(operator, dtype):
    _, tokens, _, outputs = OPERATORS[operator]
    inputs = [tensor.to(dtype) for tensor in inputs_of(operator, (1, 2, 33, 40))]
    wide = inputs[:tokens] + [vector.float() for vector in inputs[tokens:]]
    upstream = [torch.randn_like(inputs[0]) for _ in range(outputs)]
    for got, narrow in zip(
        _values_and_grads(operator, wide, upstream), _values_and_grads(operator, inputs, upstream), strict=True
    ):
        assert torch.equal(got.to(dtype), narrow)


@every_operator
@every_dtype
def test_the_same_bits_for_every_number_of_threads(operator, dtype):
    inputs = [tensor.to(dtype) for tensor in inputs_of(operator, (2, 3, 130, 384))]
    upstream = [torch.randn_like(inputs[0]) for _ in range(OPERATORS[operator][3])]
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(_values_and_grads(operator, inputs, upstream))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("operator", RESIDUAL, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize("used", [0, 1], ids=["z alone", "h alone"])
@every_dtype
def test_one_output_alone_equals_a_zero_gradient_of_the_other(operator, used, dtype):
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs_of(operator, (1, 2, 35, 40))]
    upstream = [torch.randn(1, 2, 35, 40, dtype=dtype), torch.randn(1, 2, 35, 40, dtype=dtype)]
    outputs = operator(*inputs)
    alone = torch.autograd.grad(outputs[used], inputs, upstream[used], materialize_grads=True)
    upstream[1 - used].zero_()
    for got, wanted in zip(alone, torch.autograd.grad(operator(*inputs), inputs, upstream), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("operator", RESIDUAL, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_norm_is_taken_of_z_before_its_rounding(operator, dtype):
    x = (torch.randn(1, 1, 4, 64) + 200.0).to(dtype)  # an ulp of z is as large as a token's deviation, in bfloat16
    y, vectors = torch.randn_like(x), [torch.randn(1, 1, 64, dtype=dtype) for _ in range(3)]
    z, h = operator(x, y, *vectors)
    with vidkern.backend("reference"):
        z_wanted, h_wanted = operator(*(tensor.double() for tensor in (x, y, *vectors)))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(z.double(), z_wanted, rtol=eps, atol=0.0)
    torch.testing.assert_close(h.double(), h_wanted, rtol=eps, atol=max(eps / 8, 1e-4))


def test_bfloat16_and_float16_are_rounded_to_nearest_even():
    ties = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for dtype, half_ulp in ties.items():
        x = torch.tensor([1.0, 1.0 + 2 * half_ulp, 3e38, 1e-7, 6e-8, 65504.0, -1.0, 0.0]).to(dtype).view(1, 1, 1, 8)
        y = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 1.0, -1.0, 0.0]).to(dtype).view(1, 1, 1, 8)
        gate = torch.tensor([half_ulp, half_ulp, 1e37, 3e-8, 6e-8, 20.0, half_ulp, 0.0]).view(1, 1, 8)
        assert torch.equal(ops.gate_residual(x, y, gate), (x.float() + gate.unsqueeze(2) * y.float()).to(dtype))


def _values_and_grads(operator, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = _outputs(operator(*leaves))
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def _outputs(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result

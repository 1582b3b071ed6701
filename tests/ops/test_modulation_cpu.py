"""What the modulation family's C++ kernels alone promise: bits for every number of threads, rounding, autograd."""

from collections.abc import Iterator

import pytest
import torch

import vidkern
from tests.ops import modulation_cases as cases
from tests.ops.backends import kernels_of
from tests.ops.common import KERNEL_DTYPES, assert_value_and_grads
from tests.ops.test_modulation import OPERATORS, every_dtype, inputs_of
from vidkern import _library, ops


@pytest.fixture(autouse=True)
def cpu_kernels() -> Iterator[None]:
    torch.manual_seed(0)
    with vidkern.backend("cpu"):
        yield


@pytest.mark.parametrize("name", cases.OPERATORS)
def test_every_operator_is_served(name):
    assert _library.operators[name].why_not("cpu", "cpu") is None
    assert _library.operators[f"{name}_backward"].why_not("cpu", "cpu") is None


@pytest.mark.parametrize("name", cases.OPERATORS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_same_bits_for_every_number_of_threads(name, dtype):
    inputs = cases.make_inputs(name, (2, 3, 130, 384), "cpu", dtype)
    upstream = cases.make_upstream(name, inputs)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(cases.run(kernels_of("modulation", "cpu").find, name, inputs, upstream))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(runs[0][key], run[key]) for key in run)


@pytest.mark.parametrize("operator", [ops.gate_residual_modulate, ops.gate_residual_rms_modulate])
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


def test_bfloat16_and_float16_are_rounded_to_nearest_even():
    ties = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for dtype, half_ulp in ties.items():
        x = torch.tensor([1.0, 1.0 + 2 * half_ulp, 3e38, 1e-7, 6e-8, 65504.0, -1.0, 0.0]).to(dtype).view(1, 1, 1, 8)
        y = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 1.0, -1.0, 0.0]).to(dtype).view(1, 1, 1, 8)
        gate = torch.tensor([half_ulp, half_ulp, 1e37, 3e-8, 6e-8, 20.0, half_ulp, 0.0]).view(1, 1, 8)
        assert torch.equal(ops.gate_residual(x, y, gate), (x.float() + gate.unsqueeze(2) * y.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_and_written_as_it_is(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 8, 1, 8192)
    z = ops.gate_residual(x, torch.randn(x.shape).to(dtype), torch.zeros(1, 8, 8192))
    assert torch.equal(z.isnan(), x.isnan())
    assert torch.equal(z[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_float32_is_rounded_as_pytorch_rounds(dtype):
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xB000, 0xFFFF])
    gate = (upper.view(8, 1, 8192) | lower.view(-1, 1).int()).view(torch.float32).reshape(1, -1, 8192)
    x, y = torch.zeros(1, gate.shape[1], 1, 8192, dtype=dtype), torch.ones(1, gate.shape[1], 1, 8192, dtype=dtype)
    z, wanted = ops.gate_residual(x, y, gate), gate.unsqueeze(2).to(dtype)
    assert torch.equal(z.isnan(), wanted.isnan())
    assert torch.equal(z[~z.isnan()], wanted[~z.isnan()])


@pytest.mark.parametrize("operator", [ops.layer_norm_modulate, ops.gate_residual_modulate])
@pytest.mark.parametrize("channels", [1, 8])
@every_dtype
def test_first_channels_far_from_the_others(operator, channels, dtype):
    inputs = inputs_of(operator, (1, 2, 5, 1152))
    inputs[0][..., :channels] += 1000.0
    plain, _, _, outputs = OPERATORS[operator]
    upstream = [torch.randn(inputs[0].shape, dtype=torch.float64) for _ in range(outputs)]
    assert_value_and_grads(operator, plain, inputs, upstream, dtype)

"""The kernels of the causal convolution against float64: Triton, in its interpreter without a GPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vidkern
from tests.ops.backends import kernels_of
from tests.ops.common import KERNEL_DTYPES, assert_contract, far_apart, leaves, poisoned_empty, value_and_grads
from tests.ops.test_conv3d import plain_conv, stream, video
from vidkern import _dispatch, ops
from vidkern.ops.conv3d import reference, triton_kernels

every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


class Kernels(NamedTuple):
    """The two operators, and where their tensors must lie."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]
    device: str


class Case(NamedTuple):
    """One convolution: what it is given and how."""

    kernel: tuple[int, int, int]
    channels: tuple[int, int]
    size: tuple[int, int, int, int]  # (B, F, H, W)
    stride: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    time_pad: str = "zeros"
    space_pad: str = "zeros"
    cached: int = 0  # frames
    bias: bool = False
    residual: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "dilation", "time_pad", "space_pad")}


CASES = {
    "3x3x3": Case((3, 3, 3), (8, 16), (1, 2, 5, 6), bias=True),
    "3x3x3 first frame, reflect": Case(
        (3, 3, 3), (3, 17), (1, 3, 5, 4), (2, 2, 1), (1, 1, 2), "first_frame", "reflect", bias=True, residual=True
    ),
    "3x3x3 cache, replicate": Case((3, 3, 3), (8, 8), (1, 1, 4, 5), (1, 1, 2), space_pad="replicate", cached=2),
    "3x1x1 first frame": Case((3, 1, 1), (96, 17), (2, 3, 4, 4), time_pad="first_frame", residual=True),
    "3x1x1 dilated cache": Case(
        (3, 1, 1), (17, 8), (2, 2, 3, 5), dilation=(2, 1, 1), time_pad="first_frame", cached=4, bias=True
    ),
    "3x1x1 cache between strides": Case((3, 1, 1), (8, 3), (1, 4, 3, 5), stride=(2, 1, 1), cached=1),
    "1x3x3 dilated, reflect": Case((1, 3, 3), (17, 3), (1, 2, 6, 7), (2, 2, 1), (1, 2, 1), space_pad="reflect"),
    "1x3x3 zeros": Case((1, 3, 3), (40, 24), (1, 1, 5, 7), (1, 2, 2), bias=True),
    "2x2x2 cache, replicate": Case((2, 2, 2), (8, 8), (1, 2, 4, 5), (1, 1, 2), space_pad="replicate", cached=1),
    "2x2x2 cache of none": Case((2, 2, 2), (3, 8), (2, 2, 4, 5), (2, 2, 2), cached=0),
    "1x1x1 several tiles": Case((1, 1, 1), (144, 160), (1, 2, 9, 16), bias=True),
}


@pytest.fixture
def kernels() -> Kernels:
    find, device = kernels_of("conv3d", "triton")
    return Kernels(find("causal_conv3d"), find("causal_conv3d_backward"), device)


@pytest.fixture
def full_precision():
    """Keep float32 from becoming tf32, where a GPU's libraries default to it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def random_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return x, weight, and those of bias, cache and residual that the case has."""
    torch.manual_seed(0)
    (cin, cout), (batch, frames, height, width) = case.channels, case.size
    inputs = {"x": video(batch, cin, frames, height, width), "weight": torch.randn(cout, cin, *case.kernel).double()}
    if case.cached:
        inputs["cache"] = video(batch, cin, case.cached, height, width)
    if case.bias:
        inputs["bias"] = torch.randn(cout).double()
    if case.residual:
        shape = reference.output_shape(inputs["x"], inputs["weight"], inputs.get("cache"), case.stride, case.dilation)
        inputs["residual"] = video(*shape)
    return {name: tensor.to(device, dtype) for name, tensor in inputs.items()}


def run(
    kernels: Kernels, case: Case, inputs: dict[str, Tensor], dy: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return y and the gradient of every input but the residual, with every unwritten element poisoned."""
    x, weight, cache = inputs["x"], inputs["weight"], inputs.get("cache")
    options, wanted = tuple(case.options.values()), [True, True, case.bias, cache is not None]
    with poisoned_empty():
        y = kernels.forward(x, weight, inputs.get("bias"), cache, inputs.get("residual"), *options)
        dy = torch.randn_like(y) if dy is None else dy
        grads = kernels.backward(dy, x, weight, cache, *options, wanted)
    names = ("x", "weight", "bias", "cache")
    return y, {name: grad for name, grad, want in zip(names, grads, wanted, strict=True) if want}


def plain_result(case: Case, inputs: dict[str, Tensor], dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return y and gradients by PyTorch's own padding and convolution, in the inputs' dtype."""

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(inputs, tensors, strict=True))
        residual = given.pop("residual", None)
        y = plain_conv(**given, **case.options)
        return y if residual is None else y + residual

    (y,), grads = value_and_grads(function, leaves(list(inputs.values()), inputs["x"].dtype), [dy])
    return y, dict(zip(inputs, grads, strict=True))


@pytest.mark.usefixtures("full_precision")
@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_contract(kernels, name, dtype):
    case = CASES[name]
    inputs = random_inputs(case, dtype, kernels.device)
    wide = {key: tensor.double() for key, tensor in inputs.items()}
    exact = plain_conv(**{k: v for k, v in wide.items() if k != "residual"}, **case.options)
    dy = video(*exact.shape).to(kernels.device, dtype)
    y, grads = run(kernels, case, inputs, dy)
    plain_y, plain_grads = plain_result(case, inputs, dy)
    exact_y, exact_grads = plain_result(case, wide, dy.double())
    assert_contract("y", y, plain_y, exact_y)
    for key, grad in grads.items():
        assert grad.dtype == dtype
        assert_contract(f"gradient of {key}", grad, plain_grads[key], exact_grads[key])
    for tensor in (y, grads["x"], *([grads["cache"]] if case.cached else [])):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)
    assert grads["weight"].is_contiguous()


STREAMS = [  # (kernel, time stride, time_pad, splits)
    ((3, 3, 3), 1, "first_frame", [(1, 2)]),
    ((3, 1, 1), 1, "zeros", [(1,) * 5, (2, 0, 3), (4, 1)]),
    ((3, 1, 1), 2, "first_frame", [(1,) * 5, (3, 2)]),
    ((2, 2, 2), 2, "zeros", [(1, 2, 1)]),
    ((1, 3, 3), 1, "zeros", [(1, 2)]),
]


@every_dtype
@pytest.mark.parametrize(("kernel", "time_stride", "time_pad", "splits"), STREAMS, ids=str)
def test_a_stream_gives_the_whole_clips_bits(kernels, kernel, time_stride, splits, time_pad, dtype):
    torch.manual_seed(0)
    x = video(1, 17, sum(splits[0]), 3, 4).to(kernels.device, dtype)
    weight = torch.randn(6, 17, *kernel).to(kernels.device, dtype)
    bias = torch.randn(6).to(kernels.device, dtype)
    options = {"stride": (time_stride, 1, 1), "time_pad": time_pad, "space_pad": "replicate"}
    with vidkern.backend("triton"):
        whole = ops.causal_conv3d(x, weight, bias, **options)
        for split in splits:
            assert torch.equal(stream(x, split, weight, bias, **options)[0], whole), split


def test_partial_sums_of_many_runs(kernels, full_precision, monkeypatch):
    monkeypatch.setattr(triton_kernels, "SHORTEST_RUN", 2)
    case = Case((1, 1, 1), (3, 5), (1, 10, 5, 4), bias=True)
    inputs = random_inputs(case, torch.float32, kernels.device)
    dy = video(1, 5, 10, 5, 4).to(kernels.device, torch.float32)
    _, grads = run(kernels, case, inputs, dy)
    _, plain = plain_result(case, inputs, dy)
    _, exact = plain_result(case, {name: tensor.double() for name, tensor in inputs.items()}, dy.double())
    for key in ("weight", "bias"):
        assert_contract(key, grads[key], plain[key], exact[key])


def test_a_weight_in_any_layout_gives_the_same_bits(kernels):
    case = Case((2, 2, 2), (8, 8), (1, 2, 3, 4))
    inputs = random_inputs(case, torch.float32, kernels.device)
    weight, dy = inputs["weight"], video(1, 8, 2, 3, 4).to(kernels.device, torch.float32)
    y, grads = run(kernels, case, inputs, dy)
    taps_first = weight.permute(2, 3, 4, 0, 1).contiguous().permute(3, 4, 0, 1, 2)  # (kT, kH, kW, Cout, Cin) in memory
    for other in (weight.contiguous(memory_format=torch.channels_last_3d), taps_first):
        y_other, grads_other = run(kernels, case, {**inputs, "weight": other}, dy)
        assert torch.equal(y_other, y)
        assert all(torch.equal(grads_other[name], grad) for name, grad in grads.items())


def test_a_weight_that_is_converted_at_each_call_is_told(kernels, caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_log_dispatch", True)
    monkeypatch.setattr(_dispatch, "_told", set())
    inputs = random_inputs(Case((2, 2, 2), (3, 2), (1, 1, 2, 2)), torch.float32, kernels.device)
    last = {**inputs, "weight": inputs["weight"].contiguous(memory_format=torch.channels_last_3d)}
    with caplog.at_level("INFO", logger="vidkern"):
        run(kernels, Case((2, 2, 2), (3, 2), (1, 1, 2, 2)), last)
        assert "weight" not in caplog.text
        run(kernels, Case((2, 2, 2), (3, 2), (1, 1, 2, 2)), inputs)
    assert caplog.text.count("weight is not in channels_last_3d and is converted at each call") == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_reach_what_the_definition_reaches(kernels, value):
    case = Case((2, 2, 2), (3, 4), (1, 3, 4, 4), space_pad="reflect")
    inputs = random_inputs(case, torch.float32, kernels.device)
    inputs["x"][0, 1, 1, 2, 3] = value
    y, _ = run(kernels, case, inputs)
    wanted = reference.causal_conv3d(inputs["x"], inputs["weight"], None, None, None, *case.options.values())
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert not y.isfinite().all()


@pytest.mark.parametrize(("name", "axis"), [("x", 0), ("x", 2), ("x", 3), ("x", 4), ("weight", 0)])
def test_offsets_of_more_than_32_bits(kernels, name, axis):
    case = Case((2, 2, 2), (8, 2), (2, 2, 2, 2), cached=1)
    inputs = random_inputs(case, torch.bfloat16, kernels.device)
    dy = video(2, 2, 2, 2, 2).to(kernels.device, torch.bfloat16)
    near = inputs[name].contiguous(memory_format=torch.channels_last_3d)
    y, grads = run(kernels, case, inputs, dy)
    y_far, grads_far = run(kernels, case, {**inputs, name: far_apart(near, axis)}, dy)
    assert torch.equal(y_far, y)
    assert all(torch.equal(grads_far[name], grad) for name, grad in grads.items())


def test_the_operator_and_its_gradients_by_this_backend(full_precision, kernels):
    case = CASES["3x1x1 dilated cache"]
    inputs = random_inputs(case, torch.float32, kernels.device)
    upstream = [video(2, 8, 2, 3, 5).to(kernels.device, torch.float32)]

    def ours(*tensors: Tensor) -> Tensor:
        return ops.causal_conv3d(**dict(zip(inputs, tensors, strict=True)), **case.options)

    with vidkern.backend("triton"):
        y, grads = value_and_grads(ours, leaves(list(inputs.values()), torch.float32), upstream)
    direct, direct_grads = run(kernels, case, inputs, upstream[0])
    assert torch.equal(y[0], direct)
    assert all(torch.equal(grad, direct_grads[name]) for name, grad in zip(inputs, grads, strict=True))


def test_opcheck_by_this_backend(kernels):
    case = Case((2, 2, 2), (3, 4), (1, 1, 3, 2), time_pad="first_frame", space_pad="replicate")
    inputs = random_inputs(case, torch.float32, kernels.device)
    x, weight = (inputs[name].requires_grad_() for name in ("x", "weight"))
    arguments = (x, weight, None, None, None, *(list(v) if isinstance(v, tuple) else v for v in case.options.values()))
    with vidkern.backend("triton"):
        torch.library.opcheck(torch.ops.vidkern.causal_conv3d.default, arguments)

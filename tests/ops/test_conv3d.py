"""The causal convolution and its stream as users call them: definition, bits, gradients, compilation, bad input."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vidkern
from tests.ops.common import assert_compiles_once, assert_value_and_grads
from vidkern import ops

KERNELS = [(3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1), (2, 2, 2)]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "x".join(map(str, kernel)))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_time_pad = pytest.mark.parametrize("time_pad", ["zeros", "first_frame"])
definition_and_choice = pytest.mark.parametrize("backend", ["reference", None])
every_space_pad = pytest.mark.parametrize("space_pad", ["zeros", "replicate", "reflect"])


def video(*shape: int, dtype=torch.float64, requires_grad=False) -> Tensor:
    """Return a random channels-last video."""
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    return x.requires_grad_(requires_grad)


def around(size: int, dilation: int) -> tuple[int, int]:
    return (size - 1) * dilation // 2, (size - 1) * dilation - (size - 1) * dilation // 2


def plain_conv(
    x,
    weight,
    bias=None,
    cache=None,
    stride=1,
    dilation=1,
    time_pad="zeros",
    space_pad="zeros",
    layout=torch.channels_last_3d,
):
    """Pad by PyTorch's own modes, one after another, then convolve the whole clip, channels last as ours is."""
    (kt, kh, kw), (dt, dh, dw) = weight.shape[2:], (dilation,) * 3 if isinstance(dilation, int) else dilation
    if cache is not None:
        x = torch.cat((cache, x), 2)
    elif time_pad == "zeros":
        x = F.pad(x, (0, 0, 0, 0, (kt - 1) * dt, 0))
    else:
        x = torch.cat([x[:, :, :1]] * ((kt - 1) * dt) + [x], 2)
    mode = "constant" if space_pad == "zeros" else space_pad
    x = F.pad(x, (*around(kw, dw), *around(kh, dh), 0, 0), mode=mode)
    return F.conv3d(x.contiguous(memory_format=layout), weight, bias, stride, 0, dilation)


def written_out(x, weight, stride, dilation, time_pad, space_pad):
    """Sum over taps, each gathered from x by where it lies: no padding is made."""

    def places(outputs: int, step: int, tap: int, spread: int, before: int, size: int, mode: str):
        at = torch.arange(outputs) * step + tap * spread - before
        inside = (at >= 0) & (at < size)
        if mode == "reflect":
            at = (size - 1) - ((size - 1) - at.abs()).abs()
        return at.clamp(0, size - 1), inside | torch.tensor(mode != "zeros")

    sizes, kernel = x.shape[2:], weight.shape[2:]
    outputs = [-(-size // step) for size, step in zip(sizes, stride, strict=True)]
    befores = [(kernel[0] - 1) * dilation[0], *(around(k, d)[0] for k, d in zip(kernel[1:], dilation[1:], strict=True))]
    modes = ["replicate" if time_pad == "first_frame" else "zeros", space_pad, space_pad]
    y = torch.zeros(x.shape[0], weight.shape[0], *outputs, dtype=x.dtype)
    for taps in itertools.product(*map(range, kernel)):
        found = [places(*a) for a in zip(outputs, stride, taps, dilation, befores, sizes, modes, strict=True)]
        (t, t_in), (h, h_in), (w, w_in) = found
        values = x[:, :, t][:, :, :, h][..., w]
        values = values * (t_in[:, None, None] & h_in[:, None] & w_in)
        y += torch.einsum("oc,bcthw->bothw", weight[(..., *taps)], values)
    return y


@every_kernel
@every_time_pad
@every_space_pad
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("dilation", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_values_in_float64(kernel, time_pad, space_pad, stride, dilation):
    torch.manual_seed(0)
    x, weight = video(2, 3, 4, 5, 6), torch.randn(4, 3, *kernel, dtype=torch.float64)
    options = {"stride": stride, "dilation": dilation, "time_pad": time_pad, "space_pad": space_pad}
    y = ops.causal_conv3d(x, weight, **options)
    torch.testing.assert_close(y, written_out(x, weight, **options))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@every_kernel
@every_dtype
@pytest.mark.parametrize(("time_pad", "space_pad"), [("zeros", "zeros"), ("first_frame", "replicate")])
def test_value_and_gradients_meet_the_contract(kernel, dtype, time_pad, space_pad):
    torch.manual_seed(0)
    inputs = [video(2, 8, 5, 6, 7), torch.randn(16, 8, *kernel).double(), torch.randn(16).double()]
    options = {"stride": (1, 2, 1), "time_pad": time_pad, "space_pad": space_pad}
    assert_value_and_grads(
        lambda *args: ops.causal_conv3d(*args, **options),
        lambda *args: plain_conv(*args, **options),
        inputs,
        [video(2, 16, 5, 3, 7)],
        dtype,
    )


@every_dtype
def test_cache_and_residual_meet_the_contract(dtype):
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 3, 3, 3).double()
    inputs = [video(2, 8, 3, 5, 4), weight, torch.randn(16).double(), video(2, 8, 4, 5, 4), video(2, 16, 3, 5, 4)]
    assert_value_and_grads(
        lambda x, w, b, cache, residual: ops.causal_conv3d(
            x, w, b, cache=cache, residual=residual, dilation=(2, 1, 1), space_pad="reflect"
        ),
        lambda x, w, b, cache, residual: plain_conv(x, w, b, cache, dilation=(2, 1, 1), space_pad="reflect") + residual,
        inputs,
        [video(2, 16, 3, 5, 4)],
        dtype,
    )


@definition_and_choice
@every_kernel
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("stride", "dilation"), [((1, 1, 1), (1, 1, 1)), ((2, 1, 2), (1, 2, 3)), ((1, 2, 1), (2, 2, 3))]
)
def test_float32_is_as_near_as_the_nearest_library_call(kernel, batch, stride, dilation, backend):
    """Libraries sum in other orders for another layout, batch, stride or dilation; some are several times nearer."""
    torch.manual_seed(0)
    inputs = [video(batch, 64, 3, 8, 9), torch.randn(16, 64, *kernel).double()]
    options = {"stride": stride, "dilation": dilation, "space_pad": "replicate"}
    upstream = [torch.randn_like(plain_conv(*inputs, **options))]
    for layout in (torch.channels_last_3d, torch.contiguous_format):
        with vidkern.backend(backend):
            assert_value_and_grads(
                lambda *args: ops.causal_conv3d(*args, **options),
                lambda *args, layout=layout: plain_conv(*args, **options, layout=layout),
                inputs,
                upstream,
                torch.float32,
            )


def test_a_frame_does_not_see_later_ones():
    torch.manual_seed(0)
    x, weight = video(1, 4, 6, 5, 5, dtype=torch.float32), torch.randn(4, 4, 3, 3, 3)
    changed = x.clone()
    changed[:, :, 4:] += 1
    before, after = ops.causal_conv3d(x, weight), ops.causal_conv3d(changed, weight)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert (before[:, :, 4:] - after[:, :, 4:]).abs().amin((0, 1, 3, 4)).min() > 0


SPLITS = [(9,), (1, 8), (1, 4, 4), (2, 3, 4), (1,) * 9, (0, 5, 0, 0, 4), (8, 1)]


def stream(x: Tensor, split: tuple[int, ...], *args, **options) -> tuple[Tensor, Tensor]:
    outputs, cache = [], None
    for chunk in x.split(split, 2):
        y, cache = ops.causal_conv3d_stream(chunk, cache, *args, **options)
        outputs.append(y)
    return torch.cat(outputs, 2), cache


@every_kernel
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@every_time_pad
def test_a_stream_gives_the_whole_clips_bits_for_any_split(kernel, stride, dilation, time_pad):
    torch.manual_seed(0)
    x, weight, bias = video(2, 5, 9, 6, 7, dtype=torch.float32), torch.randn(6, 5, *kernel), torch.randn(6)
    options = {"stride": (stride, 1, 2), "dilation": (dilation, 1, 1), "time_pad": time_pad, "space_pad": "replicate"}
    whole = ops.causal_conv3d(x, weight, bias, **options)
    before = (kernel[0] - 1) * dilation
    for split in SPLITS:
        first_is_empty = split[0] == 0 and time_pad == "first_frame" and before > 0
        odd_chunks = stride == 2 and before == 0 and any(n % 2 for n in split)
        if first_is_empty or odd_chunks:
            with pytest.raises(ValueError, match="x must have"):
                stream(x, split, weight, bias, **options)
            continue
        y, cache = stream(x, split, weight, bias, **options)
        assert torch.equal(y, whole), split
        kept = before - (stride == 2 and before > 0 and 9 % 2 == 1)
        assert torch.equal(cache[:, :, max(0, kept - 9) :], x[:, :, 9 - min(kept, 9) :])


@definition_and_choice
@every_dtype
@every_kernel
def test_a_stream_gives_the_same_bits_in_every_dtype_and_layout(dtype, kernel, backend):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 8, 6, 5, 6).to(dtype), torch.randn(4, 8, *kernel).to(dtype)
    with vidkern.backend(backend):
        whole = ops.causal_conv3d(x, weight)
        assert torch.equal(stream(x, (1, 2, 3), weight)[0], whole)
        assert torch.equal(ops.causal_conv3d(x.contiguous(memory_format=torch.channels_last_3d), weight), whole)


def test_gradients_flow_through_the_cache():
    torch.manual_seed(0)
    x = video(1, 3, 6, 4, 4, requires_grad=True)
    weight = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 2, 6, 4, 4, dtype=torch.float64)
    whole = torch.autograd.grad(ops.causal_conv3d(x, weight), (x, weight), upstream)
    parts = torch.autograd.grad(stream(x, (1, 2, 3), weight)[0], (x, weight), upstream)
    for got, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_new_cache_does_not_share_memory_with_the_input():
    x, weight = video(1, 3, 6, 4, 4), torch.randn(2, 3, 3, 3, 3, dtype=torch.float64)
    _, cache = ops.causal_conv3d_stream(x, None, weight)
    assert cache.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert cache.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("case", ["plain", "everything"])
def test_opcheck(case):
    torch.manual_seed(0)
    x = video(2, 3, 4, 5, 6, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, 3, requires_grad=True)
    rest = (None, None, None, [1, 1, 1], [1, 1, 1], "zeros", "zeros")
    if case == "everything":
        bias = torch.randn(4, requires_grad=True)
        cache = video(2, 3, 3, 5, 6, dtype=torch.float32, requires_grad=True)
        residual = video(2, 4, 2, 3, 6, dtype=torch.float32, requires_grad=True)
        rest = (bias, cache, residual, [2, 2, 1], [2, 1, 1], "first_frame", "reflect")
    torch.library.opcheck(torch.ops.vidkern.causal_conv3d.default, (x, weight, *rest))


@pytest.mark.parametrize("wanted", [[True] * 4, [False, True, False, False], [True, False, True, False]], ids=str)
def test_opcheck_of_the_backward(wanted):
    torch.manual_seed(0)
    x, cache, weight = video(2, 3, 4, 5, 6), video(2, 3, 2, 5, 6), torch.randn(4, 3, 3, 3, 3).double()
    rest = ([1, 1, 1], [1, 1, 1], "zeros", "replicate", wanted)
    operator = torch.ops.vidkern.causal_conv3d_backward.default
    torch.library.opcheck(operator, (video(2, 4, 4, 5, 6), x, weight, cache, *rest))


@every_time_pad
@every_space_pad
@pytest.mark.parametrize("cached", [False, True])
def test_gradcheck(time_pad, space_pad, cached):
    torch.manual_seed(0)
    x = video(1, 2, 3, 3, 4, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    residual = video(1, 2, 2 if cached else 3, 2, 4, requires_grad=True)
    stride = (2 if cached else 1, 2, 1)
    cache = video(1, 2, 2, 3, 4, requires_grad=True) if cached else None

    def function(x, weight, bias, residual, cache=None):
        return ops.causal_conv3d(
            x,
            weight,
            bias,
            stride=stride,
            dilation=(1, 1, 2),
            time_pad=time_pad,
            space_pad=space_pad,
            cache=cache,
            residual=residual,
        )

    inputs = (x, weight, bias, residual) + ((cache,) if cached else ())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_a_gradient_that_is_not_wanted_is_not_made():
    torch.manual_seed(0)
    x, weight = video(1, 2, 3, 4, 4), torch.randn(2, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    (dweight,) = torch.autograd.grad(ops.causal_conv3d(x, weight).sum(), weight)
    (wanted,) = torch.autograd.grad(plain_conv(x, weight).sum(), weight)
    torch.testing.assert_close(dweight, wanted)


def test_compiles_once_for_every_batch_frames_and_size():
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)

    def make(batch: int, frames: int, height: int, width: int) -> list[Tensor]:
        return [video(batch, 3, frames, height, width, dtype=torch.float32, requires_grad=True), weight, bias]

    def function(x, weight, bias):
        return ops.causal_conv3d(x, weight, bias, stride=(1, 2, 2), time_pad="first_frame")

    assert_compiles_once(function, make, [(2, 5, 6, 7), (5, 3, 4, 9), (4, 8, 5, 5), (6, 2, 8, 3)])


def test_a_compiled_stream_sees_through_its_cache():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, 3)

    def make(batch: int, frames: int, height: int) -> list[Tensor]:
        return [video(batch, 3, n, height, 7, dtype=torch.float32) for n in (frames, 2)]

    def function(x, cache):
        return ops.causal_conv3d_stream(x, cache, weight)

    assert_compiles_once(function, make, [(5, 6, 8), (2, 3, 5), (4, 8, 9)])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)], ids=str)
def test_empty_tensors(shape):
    x = video(*shape, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, 3, requires_grad=True)
    y = ops.causal_conv3d(x, weight)
    assert y.shape == (shape[0], 4, *shape[2:])
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_a_stream_of_single_and_no_frames():
    torch.manual_seed(0)
    x, weight = video(1, 3, 3, 4, 4, dtype=torch.float32), torch.randn(2, 3, 3, 1, 1)
    y, cache = ops.causal_conv3d_stream(x[:, :, :1], None, weight)
    none, same = ops.causal_conv3d_stream(x[:, :, :0], cache, weight)
    assert torch.equal(y, ops.causal_conv3d(x, weight)[:, :, :1])
    assert none.shape == (1, 2, 0, 4, 4)
    assert torch.equal(same, cache)


@every_dtype
def test_slices_of_a_longer_clip_are_read_in_place(dtype):
    torch.manual_seed(0)
    clip, weight = video(2, 8, 7, 6, 8, dtype=dtype), torch.randn(4, 8, 3, 3, 3).to(dtype)
    some = clip[:, :, 1:6, :5, 2:]
    packed = some.clone(memory_format=torch.channels_last_3d)
    assert torch.equal(ops.causal_conv3d(some, weight), ops.causal_conv3d(packed, weight))


def test_another_layout_is_converted_and_the_log_says_so(caplog, monkeypatch):
    from vidkern import _dispatch

    monkeypatch.setattr(_dispatch, "_log_dispatch", True)
    monkeypatch.setattr(_dispatch, "_told", set())
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 4, 5, 6), torch.randn(4, 3, 3, 3, 3)
    with caplog.at_level("INFO", logger="vidkern"):
        last = ops.causal_conv3d(x.contiguous(memory_format=torch.channels_last_3d), weight)
        assert "converted" not in caplog.text
        first = ops.causal_conv3d(x, weight)
    assert torch.equal(first, last)
    assert caplog.text.count("conv3d: x is not in channels_last_3d and is converted") == 1


X = video(2, 3, 4, 5, 6, dtype=torch.float32)
W = torch.randn(4, 3, 3, 3, 3)
CACHE = video(2, 3, 2, 5, 6, dtype=torch.float32)
BAD = [
    ("a list", ([1.0], W), {}, TypeError, "x must be a torch.Tensor, got list"),
    ("four dimensions", (X[0], W), {}, ValueError, "x must be (B, C, F, H, W), got 4 dimensions"),
    ("integers", (X.long(), W), {}, TypeError, "x must be float32 or"),
    ("weight of two dimensions", (X, W[0, 0, 0]), {}, ValueError, "weight must be (Cout, Cin, kT, kH, kW)"),
    (
        "5x5x5",
        (X, torch.randn(4, 3, 5, 5, 5)),
        {},
        ValueError,
        "kernel must be one of 3x3x3, 3x1x1, 1x3x3, 1x1x1, 2x2x2",
    ),
    (
        "other channels",
        (X, W[:, :2]),
        {},
        ValueError,
        "weight must be (Cout, Cin = 3, kT, kH, kW), got (4, 2, 3, 3, 3)",
    ),
    ("no output channels", (X, W[:0]), {}, ValueError, "got (0, 3, 3, 3, 3)"),
    ("weight of another dtype", (X, W.double()), {}, TypeError, "weight must be float32, got float64"),
    (
        "weight elsewhere",
        (X, W.to("meta")),
        {},
        ValueError,
        f"weight must be on the device of x ({X.device}), got meta",
    ),
    ("bias of another length", (X, W, torch.randn(3)), {}, ValueError, "bias must be (Cout,) = (4,), got (3,)"),
    ("stride 3", (X, W), {"stride": 3}, ValueError, "stride must be 1 or 2 along each axis, got 3"),
    (
        "stride of two",
        (X, W),
        {"stride": (1, 2)},
        TypeError,
        "stride must be an int or (time, height, width), got (1, 2)",
    ),
    ("stride as a float", (X, W), {"stride": 1.0}, TypeError, "stride must be an int"),
    ("dilation 0", (X, W), {"dilation": 0}, ValueError, "dilation must be positive, got 0"),
    ("time_pad", (X, W), {"time_pad": "edge"}, ValueError, "time_pad must be one of zeros, first_frame, got 'edge'"),
    ("space_pad", (X, W), {"space_pad": 0}, ValueError, "space_pad must be one of zeros, replicate, reflect, got 0"),
    (
        "too small to reflect",
        (X[..., :1], W),
        {"space_pad": "reflect"},
        ValueError,
        "x must have a width of at least 2 to be padded by reflect for a kernel of 3, got 1",
    ),
    (
        "cache of one frame",
        (X, W),
        {"cache": CACHE[:, :, :1]},
        ValueError,
        "cache must be (B, C, (kT - 1) * dT, H, W) = (2, 3, 2, 5, 6), got (2, 3, 1, 5, 6)",
    ),
    ("cache of another dtype", (X, W), {"cache": CACHE.half()}, TypeError, "cache must be float32, got float16"),
    (
        "residual of x's shape",
        (X, W),
        {"residual": X},
        ValueError,
        "residual must be (B, Cout, F', H', W') = (2, 4, 4, 5, 6), got (2, 3, 4, 5, 6)",
    ),
]


@pytest.mark.parametrize(("case", "args", "options", "error", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_gets_one_clear_error(case, args, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.causal_conv3d(*args, **options)

"""norm_silu_pad as users call it: the padded input of a causal convolution."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.common import assert_compiles_once, assert_value_and_grads
from tests.ops.test_conv3d import around, every_dtype, every_space_pad, every_time_pad, video
from vidkern import ops

NORMS = [("rms", 1), ("group", 1), ("group", 4)]
every_norm = pytest.mark.parametrize(("norm", "groups"), NORMS, ids=str)


def plain(
    x,
    weight,
    bias=None,
    cache=None,
    *,
    norm,
    groups,
    kernel=(3, 3, 3),
    dilation=(1, 1, 1),
    time_pad="zeros",
    space_pad="zeros",
):
    """Norm by PyTorch's own functions, then SiLU, then pad by PyTorch's own modes."""
    if norm == "rms":
        normed = F.rms_norm(x.movedim(1, -1), x.shape[1:2], weight, 1e-6).movedim(-1, 1)
        normed = normed if bias is None else normed + bias[:, None, None, None]
    else:
        normed = F.group_norm(x, groups, weight, bias, 1e-6)
    act, before = F.silu(normed), (kernel[0] - 1) * dilation[0]
    if cache is not None:
        act = torch.cat((cache, act), 2)
    elif time_pad == "zeros":
        act = F.pad(act, (0, 0, 0, 0, before, 0))
    else:
        act = torch.cat([act[:, :, :1]] * before + [act], 2)
    mode = "constant" if space_pad == "zeros" else space_pad
    return F.pad(act, (*around(kernel[2], dilation[2]), *around(kernel[1], dilation[1]), 0, 0), mode=mode)


def vector(size: int = 8) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


@every_norm
@every_dtype
@pytest.mark.parametrize("cached", [False, True])
def test_value_and_gradients_meet_the_contract(norm, groups, dtype, cached):
    torch.manual_seed(0)
    inputs = [video(2, 8, 3, 5, 4), vector(), vector()] + ([video(2, 8, 2, 5, 4)] if cached else [])

    def ours(x, weight, bias, cache=None):
        return ops.norm_silu_pad(x, weight, cache, norm=norm, groups=groups, bias=bias)

    def theirs(x, weight, bias, cache=None):
        return plain(x, weight, bias, cache, norm=norm, groups=groups)

    assert_value_and_grads(ours, theirs, inputs, [video(2, 8, 5, 7, 6)], dtype)


@every_norm
@every_time_pad
@every_space_pad
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 3, 3), (2, 2, 2)], ids=str)
def test_values_in_float64(norm, groups, time_pad, space_pad, kernel):
    torch.manual_seed(0)
    x, weight = video(2, 8, 3, 5, 4), vector()
    options = {"norm": norm, "groups": groups, "kernel": kernel, "time_pad": time_pad, "space_pad": space_pad}
    got = ops.norm_silu_pad(x, weight, **options)
    torch.testing.assert_close(got, plain(x, weight, **options))
    assert got.is_contiguous(memory_format=torch.channels_last_3d)


def test_large_means_and_rows_of_one_value_keep_their_accuracy():
    torch.manual_seed(0)
    x = video(1, 8, 2, 3, 3) + 1000
    x[:, :, 1] = 5.0
    for norm, groups in NORMS:
        assert_value_and_grads(
            lambda x, w, norm=norm, groups=groups: ops.norm_silu_pad(x, w, norm=norm, groups=groups),
            lambda x, w, norm=norm, groups=groups: plain(x, w, norm=norm, groups=groups),
            [x, vector()],
            [video(1, 8, 4, 5, 5)],
            torch.float32,
        )


def test_it_is_the_input_of_the_convolution_chunk_after_chunk():
    torch.manual_seed(0)
    x, weight, conv = video(1, 8, 6, 5, 4), vector(), torch.randn(4, 8, 3, 3, 3, dtype=torch.float64)
    act = F.silu(F.rms_norm(x.movedim(1, -1), (8,), weight, 1e-6).movedim(-1, 1))
    whole = ops.causal_conv3d(act, conv)
    cache, outputs = None, []
    for chunk in x.split((1, 2, 3), 2):
        padded = ops.norm_silu_pad(chunk, weight, cache, norm="rms")
        cache = padded[:, :, chunk.shape[2] :, 1:6, 1:5]
        outputs.append(F.conv3d(padded, conv))
    torch.testing.assert_close(torch.cat(outputs, 2), whole)


def test_rms_is_wans_norm():
    torch.manual_seed(0)
    x, weight = video(1, 8, 2, 3, 3), vector()
    wan = F.normalize(x, dim=1) * 8**0.5 * weight[:, None, None, None]
    torch.testing.assert_close(ops.norm_silu_pad(x, weight, norm="rms", kernel=1, eps=1e-24), F.silu(wan))


@every_norm
@every_space_pad
@pytest.mark.parametrize("cached", [False, True])
def test_gradcheck(norm, groups, space_pad, cached):
    torch.manual_seed(0)
    x = video(1, 4, 2, 3, 3, requires_grad=True)
    weight, bias = vector(4).requires_grad_(), vector(4).requires_grad_()
    inputs = (x, weight, bias) + ((video(1, 4, 2, 3, 3, requires_grad=True),) if cached else ())

    def function(x, weight, bias, cache=None):
        return ops.norm_silu_pad(
            x, weight, cache, norm=norm, groups=groups, bias=bias, time_pad="first_frame", space_pad=space_pad
        )

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@every_norm
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(norm, groups, full):
    torch.manual_seed(0)
    x = video(2, 8, 3, 4, 5, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True) if full else None
    cache = video(2, 8, 2, 4, 5, dtype=torch.float32, requires_grad=True) if full else None
    rest = (norm, groups, 1e-6, [3, 3, 3], [1, 1, 1], "zeros", "reflect")
    operator = torch.ops.vidkern.norm_silu_pad.default
    torch.library.opcheck(operator, (x, weight, bias, cache, *rest))
    x, weight, bias, cache = (None if t is None else t.detach() for t in (x, weight, bias, cache))
    padded, mean, rstd = operator(x, weight, bias, cache, *rest)
    backward = torch.ops.vidkern.norm_silu_pad_backward.default
    torch.library.opcheck(
        backward, (torch.randn_like(padded), x, weight, bias, cache, mean, rstd, *rest[:2], *rest[3:])
    )


@every_norm
def test_compiles_once_for_every_batch_frames_and_size(norm, groups):
    torch.manual_seed(0)
    weight = torch.randn(8, requires_grad=True)

    def make(batch: int, frames: int, height: int, width: int) -> list[Tensor]:
        return [video(batch, 8, frames, height, width, dtype=torch.float32, requires_grad=True), weight]

    def function(x, weight):
        return ops.norm_silu_pad(x, weight, norm=norm, groups=groups)

    assert_compiles_once(function, make, [(5, 3, 6, 7), (2, 5, 4, 9), (4, 2, 5, 5)])


@every_norm
def test_empty_tensors(norm, groups):
    weight = torch.randn(8)
    for shape in [(0, 8, 2, 3, 3), (2, 8, 0, 3, 3)]:
        x = video(*shape, dtype=torch.float32, requires_grad=True)
        padded = ops.norm_silu_pad(x, weight, norm=norm, groups=groups)
        assert torch.equal(padded, torch.zeros(shape[0], 8, shape[2] + 2, 5, 5))
        assert torch.autograd.grad(padded.sum(), x)[0].shape == shape


@every_norm
def test_float32_vectors_beside_bfloat16(norm, groups):
    torch.manual_seed(0)
    x, weight = video(2, 8, 3, 4, 5, dtype=torch.bfloat16), torch.randn(8).bfloat16()
    got = ops.norm_silu_pad(x, weight.float(), norm=norm, groups=groups)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, ops.norm_silu_pad(x, weight, norm=norm, groups=groups))


X = video(2, 8, 4, 5, 6, dtype=torch.float32)
W = torch.randn(8)
BAD = [
    ("norm", (X, W), {"norm": "layer"}, ValueError, "norm must be one of rms, group, got 'layer'"),
    ("groups", (X, W), {"norm": "group", "groups": 3}, ValueError, "groups must divide the C = 8 channels of x, got 3"),
    ("groups of rms", (X, W), {"norm": "rms", "groups": 2}, ValueError, "groups must be 1 for norm='rms', got 2"),
    ("weight of another length", (X, W[:4]), {"norm": "rms"}, ValueError, "weight must be (C,) = (8,), got (4,)"),
    ("weight of another dtype", (X, W.half()), {"norm": "rms"}, TypeError, "weight must be float32, got float16"),
    (
        "bias of another dtype than weight",
        (X.bfloat16(), W),
        {"norm": "rms", "bias": W.bfloat16()},
        TypeError,
        "bias must be float32, got bfloat16",
    ),
    ("eps", (X, W), {"norm": "rms", "eps": 0.0}, ValueError, "eps must be a positive number, got 0.0"),
    ("kernel", (X, W), {"norm": "rms", "kernel": 5}, ValueError, "kernel must be one of 3x3x3"),
    ("cache", (X, W, X), {"norm": "rms"}, ValueError, "cache must be (B, C, (kT - 1) * dT, H, W) = (2, 8, 2, 5, 6)"),
    (
        "no first frame",
        (X[:, :, :0], W),
        {"norm": "rms", "time_pad": "first_frame"},
        ValueError,
        "x must have at least one frame for time_pad='first_frame', got 0",
    ),
]


@pytest.mark.parametrize(("case", "args", "options", "error", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_gets_one_clear_error(case, args, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.norm_silu_pad(*args, **options)

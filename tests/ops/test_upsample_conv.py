"""upsample_conv against doubling the frames and convolving them."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.common import KERNEL_DTYPES, assert_compiles_once, assert_value_and_grads
from vidkern import ops
from vidkern.nn import UpsampleConv


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    doubled = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
    return F.conv3d(doubled, weight[:, :, None], bias, padding=(0, 1, 1))


def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.upsample_conv(x, ops.upsample_phases(weight), bias)


def video(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("shape", [(2, 3, 2, 5, 4), (1, 4, 1, 1, 1), (1, 2, 3, 1, 6)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_values_in_float64(shape, biased):
    torch.manual_seed(0)
    x, weight = video(*shape), torch.randn(5, shape[1], 3, 3, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64) if biased else None
    y = ours(x, weight, bias)
    torch.testing.assert_close(y, plain(x, weight, bias), rtol=1e-14, atol=1e-14)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_value_and_gradients_meet_the_contract(dtype):
    torch.manual_seed(0)
    inputs = [video(2, 8, 3, 5, 4), torch.randn(6, 8, 3, 3).double(), torch.randn(6).double()]
    assert_value_and_grads(ours, plain, inputs, [video(2, 6, 3, 10, 8)], dtype)


def test_gradcheck():
    torch.manual_seed(0)
    inputs = video(1, 2, 2, 3, 2), torch.randn(3, 2, 3, 3).double(), torch.randn(3).double()
    assert torch.autograd.gradcheck(ours, tuple(tensor.requires_grad_() for tensor in inputs), fast_mode=True)


def test_a_3d_weight_of_one_frame_is_folded_alike():
    weight = torch.randn(4, 3, 1, 3, 3)
    assert torch.equal(ops.upsample_phases(weight), ops.upsample_phases(weight[:, :, 0]))


def test_four_ninths_of_the_products():
    weight = torch.randn(4, 3, 3, 3)
    assert ops.upsample_phases(weight).numel() * 9 == weight.numel() * 16  # of a quarter as many positions


def test_compiles_once_for_every_batch_frames_and_size():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)

    def make(batch: int, frames: int, height: int) -> list[Tensor]:
        return [video(batch, 3, frames, height, 7, dtype=torch.float32).requires_grad_(), weight]

    assert_compiles_once(ours, make, [(2, 5, 6), (5, 3, 4), (4, 2, 8)])


def test_the_module_folds_its_weight_once_until_it_changes(monkeypatch):
    torch.manual_seed(0)
    module, x = UpsampleConv(3, 4), video(1, 3, 2, 4, 5, dtype=torch.float32)
    assert set(module.state_dict()) == {"weight", "bias"}
    folds, fold = [], ops.upsample_phases
    monkeypatch.setattr(ops, "upsample_phases", lambda weight: folds.append(1) or fold(weight))
    with torch.no_grad():
        first = module(x)
        assert torch.equal(module(x), first)
        assert len(folds) == 1
        module.weight.mul_(2)
        torch.testing.assert_close(module(x), plain(x, module.weight, module.bias))
        assert len(folds) == 2
    module(x).sum().backward()
    wanted = torch.autograd.grad(plain(x, module.weight, module.bias).sum(), module.weight)[0]
    torch.testing.assert_close(module.weight.grad, wanted)


def test_the_module_obeys_autocast():
    module, x = UpsampleConv(3, 4), video(1, 3, 2, 4, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 5), (1, 3, 0, 4, 5)], ids=str)
def test_empty_tensors(shape):
    y = ours(video(*shape, dtype=torch.float32), torch.randn(4, 3, 3, 3))
    assert y.shape == (shape[0], 4, shape[2], 8, 10)


X, PHASES = video(1, 3, 2, 4, 5, dtype=torch.float32), ops.upsample_phases(torch.randn(4, 3, 3, 3))
BAD = [
    ("phases of other channels", (X, PHASES[:, :2]), ValueError, "phases must be (4 * Cout, Cin = 3, 2, 2)"),
    ("the weight itself", (X, torch.randn(4, 3, 3, 3)), ValueError, "as upsample_phases makes them, got (4, 3, 3, 3)"),
    ("another dtype", (X, PHASES.half()), TypeError, "phases must be float32, got float16"),
    ("bias", (X, PHASES, torch.randn(16)), ValueError, "bias must be (Cout,) = (4,), got (16,)"),
    ("four dimensions", (X[0], PHASES), ValueError, "x must be (B, C, F, H, W), got 4 dimensions"),
]


@pytest.mark.parametrize(("case", "args", "error", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_gets_one_clear_error(case, args, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.upsample_conv(*args)


def test_a_kernel_that_is_not_3x3_is_refused():
    with pytest.raises(ValueError, match=re.escape("weight must be (Cout, Cin, 3, 3), got (4, 3, 5, 5)")):
        ops.upsample_phases(torch.randn(4, 3, 5, 5))

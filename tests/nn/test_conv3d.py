"""CausalConv3d against torch's convolution of an explicitly padded clip, whole and in a stream."""

import pytest
import torch
import torch.nn.functional as F

from vidkern.nn import CausalConv3d, conv3d


def video(frames: int = 5) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 4, frames, 6, 7).to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), ((3, 1, 1), 1), ((1, 3, 3), (1, 2, 2))])
def test_it_is_a_convolution_of_the_past(kernel, stride):
    conv = CausalConv3d(4, 8, kernel, stride)
    x = video()
    kt, kh, kw = conv.kernel_size
    padded = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)).double()
    plain = F.conv3d(padded, conv.weight.double(), conv.bias.double(), stride)
    torch.testing.assert_close(conv(x).double(), plain, rtol=1e-5, atol=1e-6)


def test_residual_and_first_frame_padding():
    conv = CausalConv3d(4, 4, 3, time_pad="first_frame", bias=False)
    x = video()
    padded = F.pad(torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2), (1, 1, 1, 1))
    plain = F.conv3d(padded.double(), conv.weight.double()) + x.double()
    torch.testing.assert_close(conv(x, residual=x).double(), plain, rtol=1e-5, atol=1e-6)


def test_a_stream_gives_the_bits_of_the_whole_clip():
    conv, x, cache, chunks = CausalConv3d(4, 8, 3), video(), None, []
    for chunk in x.split([2, 1, 2], dim=2):
        y, cache = conv.stream(chunk, cache)
        chunks.append(y)
    assert torch.equal(torch.cat(chunks, dim=2), conv(x))


def test_under_autocast_it_computes_in_bfloat16_with_float32_gradients():
    conv, x = CausalConv3d(4, 8, 3), video()
    exact = conv(x)
    (wanted,) = torch.autograd.grad(exact.square().sum(), conv.weight)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        y = conv(x)
        first, cache = conv.stream(x[:, :, :2], None)
        second, _ = conv.stream(x[:, :, 2:], cache)
    assert y.dtype == first.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.01 * exact.norm()
    assert (torch.cat([first, second], dim=2).float() - exact).norm() < 0.01 * exact.norm()
    (ours,) = torch.autograd.grad(y.float().square().sum(), conv.weight)
    assert ours.dtype == torch.float32
    assert (ours - wanted).norm() < 0.02 * wanted.norm()


def test_state_has_the_names_of_a_convolution():
    conv = CausalConv3d(4, 8, (3, 1, 1))
    assert {name: tuple(value.shape) for name, value in conv.state_dict().items()} == {
        "weight": (8, 4, 3, 1, 1),
        "bias": (8,),
    }


def test_the_weight_is_prepared_once_until_it_changes(monkeypatch):
    laid_out = []

    def on_a_gpu(weight: torch.Tensor) -> torch.Tensor:
        laid_out.append(1)
        return weight.contiguous(memory_format=torch.channels_last_3d)

    monkeypatch.setattr(conv3d, "channels_inside", on_a_gpu)
    conv, x = CausalConv3d(4, 8, 3), video()
    wanted = conv(x)
    laid_out.clear()
    with torch.no_grad():
        assert torch.equal(conv(x), wanted)
        assert torch.equal(conv.stream(x, None)[0], wanted)
        assert len(laid_out) == 1
        conv.weight.mul_(2)
        torch.testing.assert_close(
            conv(x) - conv.bias[:, None, None, None], 2 * (wanted - conv.bias[:, None, None, None])
        )
        assert len(laid_out) == 2
        conv.load_state_dict({name: torch.zeros_like(value) for name, value in conv.state_dict().items()}, assign=True)
        assert not conv(x).any()
    conv(x).sum().backward()
    assert conv.weight.grad.count_nonzero() == conv.weight.numel()
    assert set(conv.state_dict()) == {"weight", "bias"}

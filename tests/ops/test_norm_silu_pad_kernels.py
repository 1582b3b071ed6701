"""The kernels that write a padded input, against float64: C++, and CUDA (on the emulator without a GPU)."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.ops.backends import Kernels, kernels_of
from tests.ops.common import KERNEL_DTYPES, assert_contract, far_apart, leaves, poisoned_empty, value_and_grads
from tests.ops.test_norm_silu_pad import plain
from vidkern.ops.conv3d import reference

EPS = 1e-6
NORMS = [("rms", 1), ("group", 1), ("group", 4)]
every_norm = pytest.mark.parametrize(("norm", "groups"), NORMS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)

#: kernel, dilation, time_pad, space_pad, cached
PADS = [
    ((3, 3, 3), (1, 1, 1), "zeros", "zeros", False),
    ((3, 3, 3), (1, 1, 1), "first_frame", "replicate", True),
    ((2, 2, 2), (2, 2, 1), "first_frame", "reflect", False),
    ((3, 1, 1), (1, 1, 1), "first_frame", "zeros", False),
    ((1, 3, 3), (1, 2, 2), "zeros", "reflect", False),
    ((3, 3, 3), (2, 1, 2), "zeros", "replicate", True),
]
every_pad = pytest.mark.parametrize("pads", PADS, ids=lambda pads: "-".join(map(str, pads)))


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    torch.manual_seed(0)
    return kernels_of("conv3d", request.param)


def video(kernels: Kernels, *shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, device=kernels.device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last_3d)


def cache_of(kernels: Kernels, x: Tensor, pads: tuple) -> Tensor | None:
    kernel, dilation, *_, cached = pads
    frames = reference.extent(kernel[0], dilation[0])
    return video(kernels, *x.shape[:2], frames, *x.shape[3:], dtype=x.dtype) if cached else None


def check(kernels: Kernels, x: Tensor, norm: str, groups: int, pads: tuple, biased: bool = True) -> None:
    """Hold the output, the statistics and every gradient against the contract, with unwritten elements poisoned."""
    kernel, dilation, time_pad, space_pad, _ = pads
    rest = (list(kernel), list(dilation), time_pad, space_pad)
    weight, bias = (torch.randn(x.shape[1], device=x.device).to(x.dtype) for _ in range(2))
    inputs = (x, weight, bias if biased else None, cache_of(kernels, x, pads))
    with poisoned_empty():
        padded, mean, rstd = kernels.find("norm_silu_pad")(*inputs, norm, groups, EPS, *rest)
    dpadded = video(kernels, *padded.shape, dtype=x.dtype)
    with poisoned_empty():
        grads = kernels.find("norm_silu_pad_backward")(dpadded, *inputs, mean, rstd, norm, groups, *rest)
    assert padded.is_contiguous(memory_format=torch.channels_last_3d)
    _check_statistics(x, mean, rstd, norm, groups)
    given = [tensor for tensor in inputs if tensor is not None]

    def function(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        left = list(others)
        bias = left.pop(0) if biased else None
        options = {"kernel": kernel, "dilation": dilation, "time_pad": time_pad, "space_pad": space_pad}
        return plain(x, weight, bias, left.pop(0) if left else None, norm=norm, groups=groups, **options)

    plain_out, plain_grads = value_and_grads(function, leaves(given, x.dtype), [dpadded])
    exact_out, exact_grads = value_and_grads(function, leaves(given, torch.float64), [dpadded])
    assert_contract("padded", padded, plain_out[0], exact_out[0])
    ours = [grad for grad, tensor in zip(grads, inputs, strict=True) if tensor is not None]
    for i, triple in enumerate(zip(ours, plain_grads, exact_grads, strict=True)):
        assert_contract(f"gradient of input {i}", *triple)


def _check_statistics(x: Tensor, mean: Tensor, rstd: Tensor, norm: str, groups: int) -> None:
    wide = x.double()
    if norm == "rms":
        exact = (wide.square().mean(1) + EPS).rsqrt()
    else:
        grouped = wide.unflatten(1, (groups, -1)).flatten(2)
        exact = (grouped.var(2, correction=0) + EPS).rsqrt()
        torch.testing.assert_close(mean.double(), grouped.mean(2), rtol=0, atol=1e-6 * float(x.abs().max()))
    torch.testing.assert_close(rstd.double(), exact, rtol=4e-6, atol=0)


@every_norm
@every_pad
def test_contract(kernels, norm, groups, pads):
    check(kernels, video(kernels, 1, 16, 2, 4, 4, dtype=torch.float32), norm, groups, pads)


@every_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_contract_in_16_bits(kernels, norm, groups, dtype):
    check(kernels, video(kernels, 1, 16, 2, 4, 4, dtype=dtype), norm, groups, PADS[1])


@every_norm
@pytest.mark.parametrize("channels", [8, 72, 520])
def test_channels_that_fill_part_of_a_warp_or_several_loads_of_a_lane(kernels, norm, groups, channels):
    check(kernels, video(kernels, 2, channels, 1, 2, 3, dtype=torch.bfloat16), norm, groups, PADS[0], biased=False)


@pytest.mark.parametrize("channels", [9, 12, 17])
def test_any_number_of_channels_on_the_cpu(channels):
    torch.manual_seed(0)
    cpu = kernels_of("conv3d", "cpu")
    for norm, dtype in itertools.product(("rms", "group"), KERNEL_DTYPES):
        check(cpu, video(cpu, 2, channels, 2, 3, 5, dtype=dtype), norm, 1, PADS[5])


@pytest.mark.parametrize("norm", ["rms", "group"])
def test_rows_longer_than_a_block_takes(kernels, norm):
    check(kernels, video(kernels, 1, 8, 1, 2, 70, dtype=torch.float32), norm, 1, PADS[0])


@every_norm
def test_large_means_keep_their_accuracy(kernels, norm, groups):
    x = video(kernels, 1, 8, 2, 5, 9, dtype=torch.float32) + 1000
    x[:, :, 1, 2] = 5.0
    check(kernels, x, norm, groups, PADS[0])


def test_slices_are_read_in_place(kernels):
    clip = video(kernels, 2, 16, 4, 5, 6, dtype=torch.bfloat16)
    some = clip[:, :8, 1:3, 1:, 2:]
    args = (torch.ones(8, dtype=torch.bfloat16, device=clip.device), None, None, "group", 2, 1e-6)
    rest = ([3, 3, 3], [1, 1, 1], "zeros", "reflect")
    find = kernels.find("norm_silu_pad")
    packed = some.clone(memory_format=torch.channels_last_3d)
    for got, wanted in zip(find(some, *args, *rest), find(packed, *args, *rest), strict=True):
        assert torch.equal(got, wanted)


@every_dtype
@every_pad
def test_padding_alone_copies_and_its_gradient_adds(kernels, dtype, pads):
    kernel, dilation, time_pad, space_pad, _ = pads
    x, rest = video(kernels, 2, 8, 2, 4, 5, dtype=dtype), (list(kernel), list(dilation), time_pad, space_pad)
    cache = cache_of(kernels, x, pads)
    with poisoned_empty():
        padded = kernels.find("causal_pad")(x, cache, *rest)
    assert torch.equal(padded, reference.pad(x, cache, *rest))
    dpadded = video(kernels, *padded.shape, dtype=dtype)
    with poisoned_empty():
        ours = kernels.find("causal_pad_backward")(dpadded, cache, *rest)
    exact = reference.pad_backward(dpadded.double(), cache, *rest)
    for name, got, wanted in zip(("dx", "dcache"), ours, exact, strict=True):
        assert_contract(name, got, wanted.to(dtype), wanted)


@every_norm
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_go_where_the_definition_sends_them(kernels, norm, groups, bad):
    x, rest = video(kernels, 2, 8, 2, 2, 3, dtype=torch.float32), ([3, 3, 3], [1, 1, 1], "first_frame", "zeros")
    x[1, 3, 1, 0, 2] = bad
    args = (torch.ones(8, device=x.device), None, None, norm, groups, 1e-6)
    ours, wanted = (find(x, *args, *rest) for find in (kernels.find("norm_silu_pad"), reference.norm_silu_pad))
    assert torch.equal(ours[0].isfinite(), wanted[0].isfinite())


def test_the_same_call_gives_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    cpu = kernels_of("conv3d", "cpu")
    x = video(cpu, 2, 24, 5, 12, 40, dtype=torch.float32)
    args = (torch.randn(24), torch.randn(24), None, "group", 4)
    rest = ([3, 3, 3], [1, 1, 1], "zeros", "zeros")
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        padded, mean, rstd = cpu.find("norm_silu_pad")(x, *args, 1e-6, *rest)
        grads = cpu.find("norm_silu_pad_backward")(padded, x, *args[:3], mean, rstd, *args[3:], *rest)
        results.append((padded, mean, rstd, *grads))
    torch.set_num_threads(1)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("norm", "groups", "dim"), [("rms", 1, 0), ("rms", 1, 3), ("group", 2, 2), ("group", 2, 4)])
def test_offsets_of_more_than_32_bits(kernels, norm, groups, dim):
    x = video(kernels, 2, 8, 2, 2, 2, dtype=torch.bfloat16)
    weight, rest = torch.randn(8, device=kernels.device), ([1, 1, 1], [1, 1, 1], "zeros", "zeros")

    def run(x: Tensor) -> list[Tensor]:
        padded, *statistics = kernels.find("norm_silu_pad")(x, weight, None, None, norm, groups, EPS, *rest)
        dpadded = far_apart(padded, dim) if x.stride(dim) == 2**31 else padded
        backward = kernels.find("norm_silu_pad_backward")
        return [padded, *backward(dpadded, x, weight, None, None, *statistics, norm, groups, *rest)]

    assert all(torch.equal(a, b) for a, b in zip(run(far_apart(x, dim)), run(x), strict=True))

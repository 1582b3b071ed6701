"""The convolutions of CogVideoX's and Wan's video VAEs, chunk after chunk, against padding and calling a library."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import default_device
from benchmarks.harness import AUTOMATIC, Problem
from benchmarks.sample_clock import sample_clock
from vidkern import ops

pytestmark = pytest.mark.benchmark(group="conv3d", timer=sample_clock)

ON_GPU = default_device().type == "cuda"
CHANNELS_LAST = torch.channels_last_3d


@dataclass(frozen=True)
class Layer:
    """A convolution of one chunk of a stream: its output is (frames, height, width) with cout channels."""

    name: str
    cin: int
    cout: int
    frames: int
    height: int
    width: int
    kernel: tuple[int, int, int] = (3, 3, 3)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cin, self.cout, *self.kernel, self.frames, self.height, self.width

    @property
    def positions(self) -> int:
        return self.frames * self.height * self.width

    @property
    def weights(self) -> int:
        return self.cin * self.cout * self.kernel[0] * self.kernel[1] * self.kernel[2]


#: CogVideoX at 480x720, Wan2.1 at 480x832, Wan2.2 at 704x1280: a chunk in the steady state.
LAYERS = [
    Layer("Wan2.1 384", 384, 384, 2, 120, 208),
    Layer("Wan2.1 96", 96, 96, 4, 480, 832),
    Layer("CogVideoX 128", 128, 128, 8, 480, 720),
    Layer("CogVideoX 512", 512, 512, 2, 60, 90),
    Layer("Wan2.2 1024", 1024, 1024, 2, 88, 160),
    Layer("CogVideoX 256", 256, 256, 4, 120, 180),
    Layer("CogVideoX 256 wide", 256, 256, 8, 240, 360),
    Layer("CogVideoX out", 128, 3, 8, 480, 720),
    Layer("Wan2.1 384 first", 384, 384, 1, 60, 104),
    Layer("Wan2.1 192", 192, 192, 4, 240, 416),
    Layer("Wan2.1 out", 96, 3, 4, 480, 832),
    Layer("Wan2.1 time", 384, 768, 1, 60, 104, (3, 1, 1)),
    Layer("Wan2.2 512", 512, 512, 4, 176, 320),
    Layer("Wan2.2 256", 256, 256, 4, 352, 640),
]

#: A CPU gets at most so many frames and positions of a frame, none of the widest layers, and 16 bits for a few.
CPU_FRAMES, CPU_POSITIONS, CPU_WEIGHTS, CPU_HALF_LAYERS = 2, 500, 4_500_000, 3


def layers() -> list[Layer]:
    """Return the layers, in full on a GPU and scaled down on a CPU."""
    if ON_GPU:
        return LAYERS
    found: dict[tuple[int, ...], Layer] = {}  # by shape: scaled down, some are the same
    for layer in LAYERS:
        scale = max(1.0, (layer.height * layer.width / CPU_POSITIONS) ** 0.5)
        height, width = int(layer.height / scale), int(layer.width / scale)
        frames = min(layer.frames, CPU_FRAMES)
        if layer.weights <= CPU_WEIGHTS:
            scaled = dataclasses.replace(layer, frames=frames, height=height, width=width)
            found.setdefault((scaled.weights, scaled.positions), scaled)
    return list(found.values())


def padded(x: Tensor, cache: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Put the cache before x and zeros around it, as public models do."""
    height, width = kernel[1] // 2, kernel[2] // 2
    return F.pad(torch.cat((cache, x), 2), (width, width, height, height))


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
    return F.conv3d(padded(x, cache, weight.shape[2:]), weight, bias)


def our_conv(x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
    return ops.causal_conv3d(x, weight, bias, cache=cache)


def conv_inputs(layer: Layer, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return x, weight, bias and cache, channels last."""
    frames, size = layer.kernel[0] - 1, (layer.height, layer.width)
    x = torch.randn(1, layer.cin, layer.frames, *size, device=device)
    cache = torch.randn(1, layer.cin, frames, *size, device=device)
    weight = torch.randn(layer.cout, layer.cin, *layer.kernel, device=device) * (layer.weights / layer.cout) ** -0.5
    tensors = (x, weight, torch.randn(layer.cout, device=device), cache)
    return [t.to(dtype).contiguous(memory_format=CHANNELS_LAST) if t.dim() == 5 else t.to(dtype) for t in tensors]


def conv_problem(layer: Layer, dtype: torch.dtype, backward: bool) -> Problem:
    """Return one layer. Forward, eager and compiled PyTorch have NCDHW tensors; with a backward pass, channels last."""

    def make_inputs(device: torch.device) -> list[Tensor]:
        inputs = conv_inputs(layer, dtype, device)
        x, weight, _, cache = inputs
        return inputs if backward else [*inputs, x.contiguous(), weight.contiguous(), cache.contiguous()]

    def first(*inputs: Tensor) -> Tensor:
        _, _, bias, _, x, weight, cache = inputs
        return plain_conv(x, weight, bias, cache)

    passes = 3 if backward else 1
    elements = layer.positions * (layer.cin + layer.cout) + layer.weights
    return Problem(
        family="conv3d",
        operator="causal_conv3d",
        shape_name=layer.name,
        shape=layer.shape,
        dtype=dtype,
        backward=backward,
        ours=our_conv if backward else lambda *inputs: our_conv(*inputs[:4]),
        plain=plain_conv if backward else first,
        make_inputs=make_inputs,
        traffic_bytes=passes * elements * dtype.itemsize,
        flops=passes * 2 * layer.weights * layer.positions,
        libraries={} if backward else {"channels-last": lambda *inputs: plain_conv(*inputs[:4])},
    )


def norm_problem(layer: Layer, norm: str, dtype: torch.dtype, backward: bool) -> Problem:
    """Return the norm, SiLU and padding before one layer: Wan's RMS norm, or CogVideoX's 32 groups."""
    groups = 32 if norm == "group" else 1

    def plain(x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
        if norm == "rms":
            normed = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)
        else:
            normed = F.group_norm(x, groups, weight, bias, 1e-6)
        return padded(F.silu(normed), cache, layer.kernel)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
        eps = 1e-24 / x.shape[1] if norm == "rms" else 1e-6  # F.normalize divides by max(|x|, 1e-12)
        return ops.norm_silu_pad(x, weight, cache, norm=norm, groups=groups, bias=bias, eps=eps, kernel=layer.kernel)

    def make_inputs(device: torch.device) -> list[Tensor]:
        x, _, _, cache = conv_inputs(layer, dtype, device)
        return [x, *(torch.randn(layer.cin, device=device).to(dtype) for _ in range(2)), cache]

    passes = {"rms": (2, 3), "group": (3, 5)}[norm]
    return Problem(
        family="conv3d",
        operator="norm_silu_pad",
        shape_name=f"{layer.name} {norm}",
        shape=layer.shape,
        dtype=dtype,
        backward=backward,
        ours=ours,
        plain=plain,
        make_inputs=make_inputs,
        traffic_bytes=sum(passes[: 1 + backward]) * layer.positions * layer.cin * dtype.itemsize,
    )


def upsample_problem(layer: Layer, dtype: torch.dtype) -> Problem:
    """Return the doubling of a layer's frames and the 3x3 convolution after it; the weight is folded beforehand."""

    def plain(x: Tensor, weight: Tensor, phases: Tensor) -> Tensor:
        doubled = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        return F.conv3d(doubled, weight[:, :, None], padding=(0, 1, 1))

    def make_inputs(device: torch.device) -> list[Tensor]:
        x, weight, *_ = conv_inputs(layer, dtype, device)
        weight = weight[:, :, 0].contiguous()
        return [x, weight, ops.upsample_phases(weight)]

    return Problem(
        family="conv3d",
        operator="upsample_conv",
        shape_name=layer.name,
        shape=layer.shape,
        dtype=dtype,
        backward=False,
        ours=lambda x, weight, phases: ops.upsample_conv(x, phases),
        plain=plain,
        make_inputs=make_inputs,
        flops=2 * 16 * layer.cin * layer.cout * layer.positions,
        backends=(AUTOMATIC,),
    )


def dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes, the most telling first."""
    return (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32, torch.bfloat16)


def problems() -> list[Problem]:
    """Return what is timed, the most telling first: a run may be cut short."""
    every, (telling, other) = layers(), dtypes()
    found = [conv_problem(layer, telling, False) for layer in every]
    normed = [layer for layer in every if layer.cout > 3 and layer.kernel == (3, 3, 3)][:3]
    found += [
        norm_problem(layer, norm, telling, backward)
        for backward in (False, True)
        for layer in normed
        for norm in ("rms", "group")
    ]
    found += [upsample_problem(layer, telling) for layer in normed]
    trained = telling if ON_GPU else other  # a CPU's float32 gradients are the definition's
    found += [conv_problem(layer, trained, True) for layer in normed]
    return found + [conv_problem(layer, other, False) for layer in (every if ON_GPU else every[:CPU_HALF_LAYERS])]


def small_problems() -> list[Problem]:
    """Return a small, ragged case of every kernel: what compute-sanitizer runs."""
    layer, found = Layer("ragged", 40, 24, 2, 5, 7), []
    makers: list[Callable[[torch.dtype], Problem]] = [
        lambda dtype: conv_problem(layer, dtype, True),
        lambda dtype: norm_problem(dataclasses.replace(layer, cin=64), "rms", dtype, True),
        lambda dtype: norm_problem(dataclasses.replace(layer, cin=64), "group", dtype, True),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        found += [make(dtype) for make in makers]
    return found


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_speed(problem: Problem, measured: Any) -> None:
    measured(problem)

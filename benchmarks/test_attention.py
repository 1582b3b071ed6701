"""Temporal attention against rearranging and calling a library, and Latte-XL's blocks against the public arithmetic."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.baselines.plain import PlainBlock
from benchmarks.environment import default_device
from benchmarks.harness import AUTOMATIC, Problem
from benchmarks.sample_clock import sample_clock
from vidkern import ops
from vidkern.nn import DividedSpaceTimeBlock

pytestmark = pytest.mark.benchmark(group="attention", timer=sample_clock)

ON_GPU = default_device().type == "cuda"

#: SDPA's backends that a GPU may have; each is a baseline of its own.
SDPA_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Heads:
    """A named qkv (B, F, N, 3, H, d)."""

    name: str
    batch: int
    frames: int
    tokens: int
    heads: int
    d: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.frames, self.tokens, 3, self.heads, self.d

    @property
    def elements(self) -> int:
        """Elements of o."""
        return self.batch * self.frames * self.tokens * self.heads * self.d


def sdpa_temporal(qkv: Tensor) -> Tensor:
    """Temporal attention as public models compute it: rearrange, call the library, rearrange back."""
    q, k, v = rearrange(qkv, "b f n three h d -> three (b n) h f d").contiguous()
    o = F.scaled_dot_product_attention(q, k, v)
    return rearrange(o, "(b n) h f d -> b f n h d", b=qkv.shape[0]).contiguous()


def sdpa_strided(qkv: Tensor) -> Tensor:
    """The same for one clip on views: nothing is rearranged before the library."""
    q, k, v = qkv[0].permute(2, 1, 3, 0, 4)  # (N, H, F, d) each
    return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)[None].contiguous()


def flash_attn_temporal(qkv: Tensor) -> Tensor:
    """The same with the flash-attn package."""
    from flash_attn import flash_attn_qkvpacked_func

    o = flash_attn_qkvpacked_func(rearrange(qkv, "b f n three h d -> (b n) f three h d").contiguous())
    return rearrange(o, "(b n) f h d -> b f n h d", b=qkv.shape[0]).contiguous()


def _with_backend(backend: SDPBackend) -> Function:
    def function(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa_temporal(qkv)

    return function


def libraries(shape: Heads, dtype: torch.dtype) -> Mapping[str, Function]:
    """Return the ways to call a library that this device and shape allow."""
    found: dict[str, Function] = {}
    if ON_GPU:
        found |= {name: _with_backend(backend) for name, backend in SDPA_BACKENDS.items()}
        if importlib.util.find_spec("flash_attn") and dtype != torch.float32:
            found["flash-attn"] = flash_attn_temporal
    if shape.batch == 1:
        found["sdpa-strided"] = sdpa_strided
    return found


def temporal_problem(shape: Heads, dtype: torch.dtype, backward: bool) -> Problem:
    """Return temporal attention of one packed qkv."""
    products = 2 + 5 * backward  # q k^T, p v; and again q k^T, do v^T, p^T do, ds k, ds^T q
    return Problem(
        family="attention",
        operator="temporal_attention_packed",
        shape_name=shape.name,
        shape=shape.shape,
        dtype=dtype,
        backward=backward,
        ours=ops.temporal_attention,
        plain=sdpa_temporal,
        make_inputs=lambda device: [torch.randn(shape.shape, device=device).to(dtype)],
        traffic_bytes=(4 + 7 * backward) * shape.elements * dtype.itemsize,
        flops=products * 2 * shape.elements * shape.frames,
        libraries=libraries(shape, dtype),
    )


def biased_problem(shape: Heads, dtype: torch.dtype, backward: bool) -> Problem:
    """Return temporal attention of one packed qkv with a bias (H, F, F), which has a gradient."""

    def plain(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = rearrange(qkv, "b f n three h d -> three (b n) h f d")
        return rearrange(F.scaled_dot_product_attention(q, k, v, bias), "(b n) h f d -> b f n h d", b=shape.batch)

    def make_inputs(device: torch.device) -> list[Tensor]:
        bias = torch.randn(shape.heads, shape.frames, shape.frames, device=device)
        return [torch.randn(shape.shape, device=device).to(dtype), bias.to(dtype)]

    return dataclasses.replace(
        temporal_problem(shape, dtype, backward),
        shape_name=f"{shape.name} bias",
        ours=lambda qkv, bias: ops.temporal_attention(qkv, bias=bias),
        plain=plain,
        make_inputs=make_inputs,
        libraries={},
    )


class Blocks(nn.Module):
    """One spatial and one temporal Latte block of ours."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.space = DividedSpaceTimeBlock(hidden_size, heads, "spatial")
        self.time = DividedSpaceTimeBlock(hidden_size, heads, "temporal")

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x, branch = self.space(x, c)
        x, branch = self.time(x, c, branch)
        return ops.gate_residual(x, *branch)


class PlainBlocks(nn.Module):
    """The same blocks as the public code computes them."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.space = PlainBlock(hidden_size, heads, 4.0, "softmax")
        self.time = PlainBlock(hidden_size, heads, 4.0, "softmax")

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        frames, tokens = x.shape[1:3]
        x = self.space(rearrange(x, "b f n d -> (b f) n d"), rearrange(c, "b f d -> (b f) 1 d"))
        x = rearrange(x, "(b f) n d -> (b n) f d", f=frames)
        x = self.time(x, c.repeat_interleave(tokens, 0))
        return rearrange(x, "(b n) f d -> b f n d", n=tokens)


def block_problem(shape: Heads, dtype: torch.dtype, backward: bool) -> Problem:
    """Return a pair of Latte blocks; the gradient is that of the tokens, the condition and every weight."""
    size = shape.heads * shape.d
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours, plain = Blocks(size, shape.heads), PlainBlocks(size, shape.heads)
        weights = {name: 0.02 * torch.randn_like(value) for name, value in ours.state_dict().items()}

    def call(module: nn.Module) -> Function:
        return lambda x, c, *values: functional_call(module, dict(zip(weights, values, strict=True)), (x, c))

    def make_inputs(device: torch.device) -> list[Tensor]:
        x = torch.randn(shape.batch, shape.frames, shape.tokens, size, device=device)
        c = torch.randn(shape.batch, shape.frames, size, device=device)
        return [tensor.to(device, dtype, copy=True) for tensor in (x, c, *weights.values())]

    return Problem(
        family="attention",
        operator="latte_blocks",
        shape_name=shape.name,
        shape=(shape.batch, shape.frames, shape.tokens, size),
        dtype=dtype,
        backward=backward,
        ours=call(ours),
        plain=call(plain),
        make_inputs=make_inputs,
        backends=(AUTOMATIC,),
    )


def shapes() -> list[Heads]:
    """Return Latte-XL's heads at each number of frames, then other numbers of tokens and head sizes.

    A GPU gets whole clips, a CPU a quarter of the tokens or fewer.
    """
    batch, tokens = (4, 256) if ON_GPU else (1, 64)
    found = [Heads(f"F{frames} N{tokens} d72", batch, frames, tokens, 16, 72) for frames in (16, 8, 32, 64, 128)]
    found += [Heads(f"F16 N{tokens} d{d}", batch, 16, tokens, heads, d) for heads, d in ((12, 64), (8, 128))]
    if ON_GPU:
        found += [Heads(f"F16 N{tokens} d72", 1, 16, tokens, 16, 72) for tokens in (1024, 4096)]
    return found


def problems() -> list[Problem]:
    """Return what is timed, the most telling first: a run may be cut short."""
    both = [True, False]
    xl, *others = shapes()
    found = [temporal_problem(xl, dtype, b) for dtype in (torch.bfloat16, torch.float32) for b in both]
    found += [temporal_problem(shape, torch.bfloat16, backward) for shape in others for backward in both]
    batch, tokens = (4, 256) if ON_GPU else (1, 8)
    blocks = Heads("Latte-XL blocks", batch, 16, tokens, 16, 72)
    return found + [block_problem(blocks, torch.bfloat16 if ON_GPU else torch.float32, backward) for backward in both]


def small_problems() -> list[Problem]:
    """Return a small, ragged case of every kernel, with and without a bias: what compute-sanitizer runs."""
    sizes = [(5, 72), (20, 64), (40, 128), (7, 32), (24, 80), (3, 96)]
    return [
        make(Heads(f"F{frames} d{d}", 2, frames, 3, 2, d), dtype, True)
        for frames, d in sizes
        for dtype in (torch.float32, torch.bfloat16)
        for make in (temporal_problem, biased_problem)
    ]


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_speed(problem: Problem, measured: Any) -> None:
    measured(problem)

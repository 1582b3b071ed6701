"""The causal convolution in Triton: an implicit GEMM that gathers each tile of the padded clip from where it lies.

    forward           y (positions, Cout)   = clip (positions, taps * Cin)   weight (taps * Cin, Cout)
    input gradient    dx (positions, Cin)   = dy (positions, taps * Cout)    weight (taps * Cout, Cin)
    weight gradient   dw (Cout, Cin) of a tap = dy^T (Cout, positions)       clip (positions, Cin)

A tile of positions lies within one frame, so a tap reads one frame for the whole tile: of the cache, of x or of the
padding. Each output's sum runs over the taps, and over the channels of each, whatever else is computed with it: a
stream has the bits of the whole clip. Batch, frames, sizes, channels and strides are run-time values: a change of them
compiles nothing but another tile.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidkern import _extension
from vidkern._dispatch import tell
from vidkern.ops.conv3d import reference

MIN_TILE = 16  # the least that tl.dot takes
LOAD_BYTES = 16
ENOUGH_PROGRAMS = 1024  # to fill a GPU a few times over
SHORTEST_RUN = 16  # tiles of positions that a partial sum of the weight's or the bias's gradient takes
SUM_ROWS, SUM_RUNS, SUM_WIDTH = 32, 8, 128  # positions, runs and channels that are added side by side
MAX_WARPS = 8
MAX_REGISTERS = 128  # of a thread where loads are wide: two programs of MAX_WARPS share a multiprocessor
PIECE_TERMS = 128  # of a float32 sum, which are summed on their own: one long sum loses digits


@dataclass(frozen=True)
class Tile:
    """One program's share of a matrix product: m x n sums, k terms at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int  # tiles of operands on their way


@triton.constexpr_function
def _operand(x, interpreted):
    """Return the type that tl.dot takes: the interpreter's is wrong in bfloat16."""
    return tl.float32 if interpreted else x.dtype.element_ty


@triton.constexpr_function
def _offset(wide):
    """Return the type of offsets within a frame, or within the weight."""
    return tl.int64 if wide else tl.int32


@triton.jit
def _source(
    at,
    tap,
    size,
    before,
    dilation,
    stride,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Return (offset, inside): what a tap of the output position ``at`` reads along one axis, padded by ``before``."""
    if TRANSPOSED:
        first, step = at + before, -tap * dilation
    else:
        first, step = at * STRIDE - before, tap * dilation
    if TRANSPOSED and STRIDE > 1:
        index = first + step
        inside = (index >= 0) & (index % STRIDE == 0) & (index < size * STRIDE)
        return index // STRIDE * stride, inside
    if PAD == "zeros":  # apart, so that what no tap changes is computed once
        return first * stride + step * stride, (first >= -step) & (first < size - step)
    index = first + step
    if PAD == "reflect":
        index = size - 1 - tl.abs(size - 1 - tl.abs(index))
    return tl.minimum(tl.maximum(index, 0), size - 1) * stride, at >= 0


@triton.jit
def _places(
    x,  # (B, C, F, H, W), unit stride in C
    cache,  # the frames before x, or None
    b,
    t,
    h,
    w,
    wanted,
    tap,
    sizes,
    befores,
    dilations,
    x_strides,
    cache_strides,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TIME_PAD: tl.constexpr,
    SPACE_PAD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CACHE_LIKE_X: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Return (frame, offsets, inside): where what a tap reads for the outputs (b, t, h, w) begins."""
    i, j, l = tap // (KERNEL[1] * KERNEL[2]), tap // KERNEL[2] % KERNEL[1], tap % KERNEL[2]
    x_b, x_f, x_h, x_w = x_strides
    f, f_in = _source(t, i, sizes[0], befores[0], dilations[0], 1, STRIDE[0], TIME_PAD, TRANSPOSED)
    frames = x
    if cache is not None:
        cached = f < 0
        frames, f, f_in = tl.where(cached, cache, x), tl.where(cached, f + befores[0], f), f_in | cached
        x_b, x_f = tl.where(cached, cache_strides[0], x_b), tl.where(cached, cache_strides[1], x_f)
        if not CACHE_LIKE_X:
            x_h, x_w = tl.where(cached, cache_strides[2], x_h), tl.where(cached, cache_strides[3], x_w)
    frame = frames + (b.to(tl.int64) * x_b + f.to(tl.int64) * x_f) * UNIT
    x_h, x_w = x_h.to(OFFSET), x_w.to(OFFSET)
    row, row_in = _source(h, j, sizes[1], befores[1], dilations[1], x_h, STRIDE[1], SPACE_PAD, TRANSPOSED)
    column, column_in = _source(w, l, sizes[2], befores[2], dilations[2], x_w, STRIDE[2], SPACE_PAD, TRANSPOSED)
    return frame, (row + column) * UNIT, wanted & row_in & column_in & f_in


@triton.jit
def _load(frame, offsets, inside, channels, channel_count, WHOLE: tl.constexpr):
    """Return the tile (positions, channels); WHOLE tells that no channel lies beyond the last."""
    inside = inside[:, None]
    if not WHOLE:
        inside = inside & (channels < channel_count)[None, :]
    return tl.load(frame + (offsets[:, None] + channels[None, :]), mask=inside, other=0.0)


@triton.jit
def _carry(sums, total, step, PIECE: tl.constexpr):
    """Add the sums of a finished piece to the total, and begin anew; 0 is one piece of any length."""
    if PIECE == 0:
        return sums, total
    if step % PIECE == PIECE - 1:
        total += sums
        sums = tl.zeros_like(sums)
    return sums, total


RUN_TIME = [
    "frames",
    "height",
    "width",
    "x_frames",
    "x_height",
    "x_width",
    "channel_units",
    "x_channel_units",
    "head_frames",
]
RUN_TIME += ["before_t", "before_h", "before_w", "dilation_t", "dilation_h", "dilation_w", "chunks", "run"]
RUN_TIME += [f"{name}_{axis}" for name in ("x", "cache", "residual", "dy") for axis in "bfhw"]
RUN_TIME += [f"weight_{axis}" for axis in "ofhw"]


@triton.jit(do_not_specialize=RUN_TIME)
def _convolve(
    x,  # (B, Cx, Fx, Hx, Wx), unit stride in Cx: the clip; dy if transposed
    cache,  # (B, Cx, before_t, Hx, Wx)
    weight,  # (Cout, Cin, kT, kH, kW), unit stride in Cin
    bias,  # (C,)
    residual,  # (B, C, F, H, W), unit stride in C
    y,  # (B, C, F, H, W), channels last
    head,  # what the first head_frames of y go to instead
    frames,
    height,
    width,
    channel_units,
    head_frames,
    x_frames,
    x_height,
    x_width,
    x_channel_units,
    before_t,
    before_h,
    before_w,
    dilation_t,
    dilation_h,
    dilation_w,
    x_b,
    x_f,
    x_h,
    x_w,
    cache_b,
    cache_f,
    cache_h,
    cache_w,
    weight_o,
    weight_f,
    weight_h,
    weight_w,
    residual_b,
    residual_f,
    residual_h,
    residual_w,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TIME_PAD: tl.constexpr,
    SPACE_PAD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CACHE_LIKE_X: tl.constexpr,
    WHOLE: tl.constexpr,
    X_UNIT: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    OFFSET: tl.constexpr = _offset(WIDE)
    OPERAND: tl.constexpr = _operand(x, INTERPRETED)
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    channels, x_channels = channel_units * Y_UNIT, x_channel_units * X_UNIT
    program, columns, tiles = tl.program_id(0), tl.cdiv(channels, N), tl.cdiv(height * width, M)
    image = program // columns // tiles
    b, t = image // frames, image % frames
    m = program // columns % tiles * M + tl.arange(0, M)
    n = program % columns * N + tl.arange(0, N)
    h, w, m_in, n_in = m // width, m % width, m < height * width, n < channels

    sums, total = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    for tap in tl.range(TAPS, flatten=True):  # one loop of copies on their way; places are found once a tap
        frame, offsets, inside = _places(
            *(x, cache, b, t, h, w, m_in, tap),
            (x_frames, x_height, x_width),
            (before_t, before_h, before_w),
            (dilation_t, dilation_h, dilation_w),
            (x_b, x_f, x_h, x_w),
            (cache_b, cache_f, cache_h, cache_w),
            *(KERNEL, STRIDE, TIME_PAD, SPACE_PAD, TRANSPOSED, CACHE_LIKE_X, X_UNIT, OFFSET),
        )
        i, j, l = tap // (KERNEL[1] * KERNEL[2]), tap // KERNEL[2] % KERNEL[1], tap % KERNEL[2]
        weights = weight + (i * weight_f.to(OFFSET) + j * weight_h.to(OFFSET) + l * weight_w.to(OFFSET)) * WEIGHT_UNIT
        for first in range(0, x_channels, K):
            k = first + tl.arange(0, K)
            a = _load(frame, offsets, inside, k, x_channels, WHOLE)
            if TRANSPOSED:
                c_places = weights + (k.to(OFFSET) * weight_o * WEIGHT_UNIT)[:, None] + n[None, :]
            else:
                c_places = weights + (n.to(OFFSET) * weight_o * WEIGHT_UNIT)[None, :] + k[:, None]
            c_in = n_in[None, :] if WHOLE else (k < x_channels)[:, None] & n_in[None, :]
            c = tl.load(c_places, mask=c_in, other=0.0)
            sums = tl.dot(a.to(OPERAND), c.to(OPERAND), sums, input_precision=PRECISION)
            sums, total = _carry(sums, total, tap * tl.cdiv(x_channels, K) + first // K, PIECE)
    sums += total

    if bias is not None:
        sums += tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
    inside = m_in[:, None] & n_in[None, :]
    if residual is not None:
        residual += (b.to(tl.int64) * residual_b + t.to(tl.int64) * residual_f) * Y_UNIT
        places = (h.to(OFFSET) * residual_h + w.to(OFFSET) * residual_w) * Y_UNIT
        sums += tl.load(residual + places[:, None] + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if head is not None:
        first = t < head_frames
        y = tl.where(first, head, y)
        image = tl.where(first, b * head_frames + t, b * (frames - head_frames) + t - head_frames)
    y += image.to(tl.int64) * height * width * channels
    places = m.to(OFFSET) * channels
    tl.store(y + places[:, None] + n[None, :], sums.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def _weight_gradient(
    dy,  # (B, Cout, F, H, W), unit stride in Cout
    x,  # (B, Cin, Fx, Hx, Wx), unit stride in Cin
    cache,  # (B, Cin, before_t, Hx, Wx)
    partials,  # (runs, Cout, taps, Cin), float32
    frames,
    height,
    width,
    channel_units,
    x_frames,
    x_height,
    x_width,
    x_channel_units,
    before_t,
    before_h,
    before_w,
    dilation_t,
    dilation_h,
    dilation_w,
    chunks,
    run,
    dy_b,
    dy_f,
    dy_h,
    dy_w,
    x_b,
    x_f,
    x_h,
    x_w,
    cache_b,
    cache_f,
    cache_h,
    cache_w,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TIME_PAD: tl.constexpr,
    SPACE_PAD: tl.constexpr,
    CACHE_LIKE_X: tl.constexpr,
    WHOLE: tl.constexpr,
    X_UNIT: tl.constexpr,
    DY_UNIT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    OFFSET: tl.constexpr = _offset(WIDE)
    OPERAND: tl.constexpr = _operand(x, INTERPRETED)
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    channels, x_channels = channel_units * DY_UNIT, x_channel_units * X_UNIT
    program, rows, columns = tl.program_id(0), tl.cdiv(channels, M), tl.cdiv(x_channels, N)
    tap = program % TAPS
    n = program // TAPS % columns * N + tl.arange(0, N)
    m = program // TAPS // columns % rows * M + tl.arange(0, M)
    part = program // TAPS // columns // rows
    chunks_of_frame = tl.cdiv(height * width, K)

    sums, total = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    first = part * run
    for chunk in range(first, tl.minimum(first + run, chunks)):
        image = chunk // chunks_of_frame
        b, t = image // frames, image % frames
        k = chunk % chunks_of_frame * K + tl.arange(0, K)
        h, w, k_in = k // width, k % width, k < height * width
        places = (h.to(OFFSET) * dy_h + w.to(OFFSET) * dy_w) * DY_UNIT
        dy_frame = dy + (b.to(tl.int64) * dy_b + t.to(tl.int64) * dy_f) * DY_UNIT
        grad = tl.load(dy_frame + places[None, :] + m[:, None], mask=k_in[None, :] & (m < channels)[:, None], other=0.0)
        frame, offsets, inside = _places(
            *(x, cache, b, t, h, w, k_in, tap),
            (x_frames, x_height, x_width),
            (before_t, before_h, before_w),
            (dilation_t, dilation_h, dilation_w),
            (x_b, x_f, x_h, x_w),
            (cache_b, cache_f, cache_h, cache_w),
            *(KERNEL, STRIDE, TIME_PAD, SPACE_PAD, False, CACHE_LIKE_X, X_UNIT, OFFSET),
        )
        a = _load(frame, offsets, inside, n, x_channels, WHOLE)
        sums = tl.dot(grad.to(OPERAND), a.to(OPERAND), sums, input_precision=PRECISION)
        sums, total = _carry(sums, total, chunk - first, PIECE)
    sums += total
    rows_of_all = (part.to(tl.int64) * channels + m) * TAPS + tap
    places = rows_of_all * x_channels
    tl.store(partials + places[:, None] + n[None, :], sums, mask=(m < channels)[:, None] & (n < x_channels)[None, :])


@triton.jit(do_not_specialize=RUN_TIME)
def _bias_gradient(
    dy,  # (B, C, F, H, W), unit stride in C
    partials,  # (runs, C), float32; float64 beside float32
    frames,
    height,
    width,
    channel_units,
    chunks,
    run,
    dy_b,
    dy_f,
    dy_h,
    dy_w,
    DY_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    OFFSET: tl.constexpr = _offset(WIDE)
    channels = channel_units * DY_UNIT
    part, columns = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    chunks_of_frame = tl.cdiv(height * width, ROWS)
    SUM: tl.constexpr = partials.dtype.element_ty
    sums = tl.zeros((ROWS, WIDTH), SUM)
    for chunk in range(part * run, tl.minimum(part * run + run, chunks)):
        image = chunk // chunks_of_frame
        position = chunk % chunks_of_frame * ROWS + tl.arange(0, ROWS)
        b, t, h, w = image // frames, image % frames, position // width, position % width
        places = (h.to(OFFSET) * dy_h + w.to(OFFSET) * dy_w) * DY_UNIT
        dy_frame = dy + (b.to(tl.int64) * dy_b + t.to(tl.int64) * dy_f) * DY_UNIT
        inside = (position < height * width)[:, None] & (columns < channels)[None, :]
        sums += tl.load(dy_frame + places[:, None] + columns[None, :], mask=inside, other=0.0).to(SUM)
    tl.store(partials + part.to(tl.int64) * channels + columns, tl.sum(sums, 0), mask=columns < channels)


@triton.jit(do_not_specialize=["runs", "taps", "channels"])
def _sum_runs(partials, totals, runs, taps, channels, RUNS: tl.constexpr, WIDTH: tl.constexpr):
    """(runs, rows, taps, C) -> (rows, C, taps), in a fixed order."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    for tap in range(taps):
        sums = tl.zeros((RUNS, WIDTH), partials.dtype.element_ty)
        for first in range(0, runs, RUNS):
            run = first + tl.arange(0, RUNS)
            places = ((run.to(tl.int64) * rows + row) * taps + tap) * channels
            inside = (run < runs)[:, None] & (c < channels)[None, :]
            sums += tl.load(partials + places[:, None] + c[None, :], mask=inside, other=0.0)
        total = tl.sum(sums, 0).to(totals.dtype.element_ty)
        tl.store(totals + (row * channels + c) * taps + tap, total, mask=c < channels)


def _power_of_two(size: int, largest: int) -> int:
    return min(largest, max(MIN_TILE, triton.next_power_of_2(size)))


def _columns(channels: int) -> int:
    """Return a tile's columns: few beyond the last channel, yet many, as each column reads a whole tile of rows."""
    cost = {128: 1.0, 64: 1.15, 32: 1.5, 16: 2.0}  # of a column, guessed
    return min(cost, key=lambda n: triton.cdiv(channels, n) * n * cost[n])


def _tile(rows: int, channels: int, terms: int, dtype: torch.dtype, precision: str, capability: int) -> Tile:
    """Return the tile for a product of so many rows, columns and terms of a tap."""
    if dtype != torch.float32:
        long = capability >= 9 and terms % 64 == 0  # wgmma wants many terms, and none beyond the last
        m, n, k, stages = _power_of_two(rows, 128), _columns(channels), 64 if long else 32, 3 if long else 4
    elif precision == "tf32":
        m, n, k, stages = _power_of_two(rows, 128), min(64, _columns(channels)), 32, 3
    else:
        m, n, k, stages = _power_of_two(rows, 64), min(64, _columns(channels)), 16, 3
    return Tile(m, n, _power_of_two(terms, k), min(MAX_WARPS, max(1, m // 32, m * n // 1024)), stages)


def _capability(device: torch.device) -> int:
    """Return the major compute capability; the interpreter has none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _precision(dtype: torch.dtype) -> str:
    """Return "tf32" for float32 where PyTorch's own convolutions take it."""
    allowed = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and allowed == "tf32" else "ieee"


def _strides(x: Tensor | None, unit: int = 1) -> list[int]:
    """Return the strides of all but the channels, in units of so many elements; an axis of one position has none."""
    if x is None:
        return [0] * 4
    return [x.stride(axis) // unit if x.shape[axis] > 1 else 0 for axis in (0, 2, 3, 4)]


def _unit(*tensors: Tensor | None) -> int:
    """Return how many channels a load can take at once wherever a position of the tensors begins."""
    some = [x for x in tensors if x is not None]
    width = LOAD_BYTES // some[0].element_size()
    return width if all(n % width == 0 for x in some for n in (x.shape[1], *_strides(x))) else 1


def _is_wide(weight: Tensor | None, *videos: Tensor | None) -> bool:
    """Whether offsets within the weight, or within a frame, need 64 bits."""
    spans = [_span(x, (1, 3, 4)) for x in videos if x is not None]
    return max(spans + ([] if weight is None else [_span(weight, range(5))])) >= 2**31


def _span(x: Tensor, axes: Iterable[int]) -> int:
    return sum((x.shape[axis] - 1) * x.stride(axis) for axis in axes)


def _constants(dtype: torch.dtype, tile: Tile, precision: str, aligned: bool) -> dict[str, Any]:
    return {
        "M": tile.m,
        "N": tile.n,
        "K": tile.k,
        "PIECE": PIECE_TERMS // tile.k if dtype == torch.float32 else 0,
        "PRECISION": precision,
        "INTERPRETED": _extension.interpreting(),
        "num_warps": tile.warps,
        "maxnreg": MAX_REGISTERS if aligned and tile.warps == MAX_WARPS else None,
        "num_stages": tile.stages,
    }


def _befores(x: Tensor, cache: Tensor | None, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return how many positions come before the first of x along (time, height, width)."""
    frames = reference.extent(kernel[0], dilation[0]) if cache is None else cache.shape[2]
    return [frames, *(reference.around(kernel[axis], dilation[axis])[0] for axis in (1, 2))]


def _present(cache: Tensor | None) -> Tensor | None:
    return None if cache is None or cache.shape[2] == 0 else cache


def _prepared(weight: Tensor) -> Tensor:
    """Return the weight with unit stride in Cin, in which it is read 16 bytes at a time."""
    if weight.stride(1) == 1 or weight.shape[1] == 1:
        return weight
    tell("conv3d: weight is not in channels_last_3d and is converted at each call")
    return weight.contiguous(memory_format=torch.channels_last_3d)


def _launch_convolve(
    x: Tensor,
    cache: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    head: Tensor | None,
    befores: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
    transposed: bool,
) -> None:
    """Fill head and y, one after the other in time, with the convolution of x, or its transpose."""
    batch, channels, frames, height, width = y.shape
    head_frames = 0 if head is None else head.shape[2]
    frames += head_frames
    weight, precision = _prepared(weight), _precision(x.dtype)
    tile = _tile(height * width, channels, x.shape[1], x.dtype, precision, _capability(x.device))
    programs = batch * frames * triton.cdiv(height * width, tile.m) * triton.cdiv(channels, tile.n)
    x_unit, weight_unit, y_unit = _unit(x, cache), _unit(weight), _unit(y, residual)
    with torch.cuda.device_of(x):
        _convolve[(programs,)](
            *(x, cache, weight, bias, residual, y, head),
            *(frames, height, width, channels // y_unit, head_frames),
            *(*x.shape[2:], x.shape[1] // x_unit, *befores, *dilation),
            *(*_strides(x, x_unit), *_strides(cache, x_unit)),
            *(*_strides(weight, weight_unit), *_strides(residual, y_unit)),
            KERNEL=tuple(weight.shape[2:]),
            STRIDE=tuple(stride),
            TIME_PAD="replicate" if time_pad == "first_frame" and cache is None else "zeros",
            SPACE_PAD=space_pad,
            TRANSPOSED=transposed,
            CACHE_LIKE_X=cache is None or _strides(x)[2:] == _strides(cache)[2:],
            WHOLE=x.shape[1] % tile.k == 0,
            X_UNIT=x_unit,
            WEIGHT_UNIT=weight_unit,
            WIDE=_is_wide(weight, x, cache, residual, y, head),
            Y_UNIT=y_unit,
            **_constants(x.dtype, tile, precision, min(x_unit, weight_unit) > 1),
        )


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> Tensor:
    """Return y (B, Cout, F', H', W'), channels last."""
    y = reference.empty_output(x, weight, cache, stride, dilation)
    if y.numel() > 0:
        befores = _befores(x, cache, weight.shape[2:], dilation)
        _launch_convolve(
            *(x, _present(cache), weight, bias, residual, y, None),
            *(befores, stride, dilation, time_pad, space_pad, False),
        )
    return y


def _input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cache: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> tuple[Tensor, Tensor]:
    """Return (dx, dcache): at once beside zeros; else the padded clip's, in float32, folded to where it came from."""
    kernel = weight.shape[2:]
    befores = _befores(x, cache, kernel, dilation)
    extents = [befores[0], *(reference.extent(kernel[axis], dilation[axis]) for axis in (1, 2))]
    options = (stride, dilation, "zeros", "zeros", True)
    if (space_pad != "zeros" and any(extents[1:])) or (cache is None and time_pad == "first_frame" and befores[0] > 0):
        sizes = [size + extent for size, extent in zip(x.shape[2:], extents, strict=True)]
        padded = _video(x, sizes, torch.float32)
        _launch_convolve(dy, None, weight, None, None, padded, None, [0, 0, 0], *options)
        grads = reference.pad_backward(padded, cache, kernel, dilation, time_pad, space_pad)
        dx, dcache = (grad.to(x.dtype) for grad in grads)
        return dx, dcache
    dx = _video(x, x.shape[2:], x.dtype)
    dcache = None if cache is None else _video(cache, cache.shape[2:], x.dtype)
    shifts = befores if cache is None else [0, *befores[1:]]
    _launch_convolve(dy, None, weight, None, None, dx, _present(dcache), shifts, *options)
    return dx, x.new_empty(0) if dcache is None else dcache


def _video(like: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    shape = (*like.shape[:2], *sizes)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last_3d)


def _launch_weight_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cache: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> Tensor:
    """Return dweight, contiguous: partial sums over runs of positions, then their sum."""
    batch, channels, frames, height, width = dy.shape
    taps, x_channels, precision = weight[0, 0].numel(), x.shape[1], _precision(x.dtype)
    tile = _tile(channels, x_channels, height * width, x.dtype, precision, _capability(x.device))
    chunks = batch * frames * triton.cdiv(height * width, tile.k)
    programs = triton.cdiv(channels, tile.m) * triton.cdiv(x_channels, tile.n) * taps
    run = triton.cdiv(chunks, min(triton.cdiv(ENOUGH_PROGRAMS, programs), triton.cdiv(chunks, SHORTEST_RUN)))
    runs = triton.cdiv(chunks, run)
    partials = x.new_empty((runs, channels, taps, x_channels), dtype=torch.float32)
    dweight = weight.new_empty(weight.shape)
    befores, cache = _befores(x, cache, weight.shape[2:], dilation), _present(cache)
    x_unit, dy_unit = _unit(x, cache), _unit(dy)
    with torch.cuda.device_of(x):
        _weight_gradient[(programs * runs,)](
            *(dy, x, cache, partials, frames, height, width, channels // dy_unit, *x.shape[2:], x_channels // x_unit),
            *(*befores, *dilation, chunks, run),
            *(*_strides(dy, dy_unit), *_strides(x, x_unit), *_strides(cache, x_unit)),
            KERNEL=tuple(weight.shape[2:]),
            STRIDE=tuple(stride),
            TIME_PAD="replicate" if time_pad == "first_frame" and cache is None else "zeros",
            SPACE_PAD=space_pad,
            CACHE_LIKE_X=cache is None or _strides(x)[2:] == _strides(cache)[2:],
            WHOLE=x_channels % tile.n == 0,
            X_UNIT=x_unit,
            DY_UNIT=dy_unit,
            WIDE=_is_wide(None, dy, x, cache),
            **_constants(x.dtype, tile, precision, min(x_unit, dy_unit) > 1),
        )
        _launch_sum(partials, dweight, channels, taps, x_channels)
    return dweight


def _launch_sum(partials: Tensor, totals: Tensor, rows: int, taps: int, channels: int) -> None:
    _sum_runs[(rows, triton.cdiv(channels, SUM_WIDTH))](
        partials, totals, partials.shape[0], taps, channels, RUNS=SUM_RUNS, WIDTH=SUM_WIDTH
    )


def _launch_bias_gradient(dy: Tensor) -> Tensor:
    batch, channels, frames, height, width = dy.shape
    chunks = batch * frames * triton.cdiv(height * width, SUM_ROWS)
    run = max(SHORTEST_RUN, triton.cdiv(chunks, ENOUGH_PROGRAMS))
    runs = triton.cdiv(chunks, run)
    wide = torch.float64 if dy.dtype == torch.float32 else torch.float32
    partials = dy.new_empty((runs, channels), dtype=wide)
    dbias, unit = dy.new_empty(channels), _unit(dy)
    with torch.cuda.device_of(dy):
        _bias_gradient[(runs, triton.cdiv(channels, SUM_WIDTH))](
            *(dy, partials, frames, height, width, channels // unit, chunks, run, *_strides(dy, unit)),
            DY_UNIT=unit,
            WIDE=_is_wide(None, dy),
            ROWS=SUM_ROWS,
            WIDTH=SUM_WIDTH,
        )
        _launch_sum(partials, dbias, 1, 1, channels)
    return dbias


def causal_conv3d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cache: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias, dcache); ``wanted`` says which of them, and the others are empty."""
    options = (stride, dilation, time_pad, space_pad)
    if dy.numel() == 0:
        return reference.causal_conv3d_backward(dy, x, weight, cache, *options, wanted)
    dx, dweight, dbias, dcache = (x.new_empty(0) for _ in range(4))
    if wanted[0] or wanted[3]:
        grads = _input_gradient(dy, x, weight, cache, *options)
        dx, dcache = (
            grad.contiguous(memory_format=torch.channels_last_3d) if want and grad.dim() == 5 else grad.new_empty(0)
            for grad, want in zip(grads, (wanted[0], wanted[3]), strict=True)
        )
    if wanted[1]:
        dweight = _launch_weight_gradient(dy, x, weight, cache, *options)
    if wanted[2]:
        dbias = _launch_bias_gradient(dy)
    return dx, dweight, dbias, dcache

"""The modulation operators in Triton: a program takes a run of one frame's tokens, a few at a time.

A row is a tuple of pieces of one power-of-two width W (1152 = 9 * 128), so that all have one layout and nothing is
padded to 2048. Batch, frames and tokens are run-time values, so a change of them compiles nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_RUN = 16  # tokens
BACKWARD_RUN = 32
MIN_WIDTH = 16  # columns
MAX_WASTE = 1 / 16  # of a row, in its last piece
SUM_WIDTH = 256


def piece_width(channels: int) -> int:
    """Return the widest power of two whose multiples reach D with little left over."""
    width = triton.next_power_of_2(channels)
    while width > MIN_WIDTH and triton.cdiv(channels, width) * width > (1 + MAX_WASTE) * channels:
        width //= 2
    return max(width, MIN_WIDTH)


def tile(channels: int, elements: int, warps: int) -> dict[str, int]:
    """Return a program's piece width, tokens at a time and warps, for about so many elements of a piece a thread."""
    width = piece_width(channels)
    tokens = max(1, min(8, 32 * warps * elements // width))
    return {"W": width, "TOKENS": tokens, "num_warps": min(16, max(warps, tokens * width // (32 * 16)))}


@triton.jit
def _column(W: tl.constexpr, p: tl.constexpr):
    return p * W + tl.arange(0, W)


@triton.jit
def _vector_piece(vector, p: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Load a piece of a frame's vector beside every token, from L1: in registers vectors would crowd out the rows."""
    column = _column(W, p)[None, :] + tl.zeros((TOKENS, 1), tl.int32)
    return tl.load(vector + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def _load_rows(rows, inside, D: tl.constexpr, W: tl.constexpr):
    tiles = ()
    for p in tl.static_range(tl.cdiv(D, W)):
        column = _column(W, p)[None, :]
        mask = inside[:, None] & (column < D)
        tiles = tiles + (tl.load(rows[:, None] + column, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _store_rows(rows, tiles, inside, D: tl.constexpr, W: tl.constexpr):
    for p in tl.static_range(tl.cdiv(D, W)):
        column = _column(W, p)[None, :]
        tl.store(rows[:, None] + column, tiles[p], mask=inside[:, None] & (column < D))


@triton.jit
def _sum(tiles):
    total = tl.sum(tiles[0], 1)
    for p in tl.static_range(1, len(tiles)):
        total += tl.sum(tiles[p], 1)
    return total


@triton.jit
def _dot(a, b):
    total = tl.sum(a[0] * b[0], 1)
    for p in tl.static_range(1, len(a)):
        total += tl.sum(a[p] * b[p], 1)
    return total


@triton.jit
def _center(tiles, mean, D: tl.constexpr, W: tl.constexpr):  # zeros stay at D and beyond
    centered = ()
    for p in tl.static_range(tl.cdiv(D, W)):
        column = _column(W, p)[None, :]
        centered = centered + (tl.where(column < D, tiles[p] - mean[:, None], 0.0),)
    return centered


@triton.jit
def _zero_rows(TOKENS: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(tl.cdiv(D, W)):
        tiles = tiles + (tl.zeros((TOKENS, W), tl.float32),)
    return tiles


@triton.jit
def _store_sum(row, tiles, D: tl.constexpr, W: tl.constexpr):  # the sum over the tokens of a tile
    for p in tl.static_range(tl.cdiv(D, W)):
        column = _column(W, p)
        tl.store(row + column, tl.sum(tiles[p], 0), mask=column < D)


@triton.jit
def _run(frames, tokens, RUN: tl.constexpr):
    """Return (b, f, first token, frame index) of this program's run."""
    runs = tl.cdiv(tokens, RUN)
    frame = (tl.program_id(0) // runs).to(tl.int64)
    return frame // frames, frame % frames, (tl.program_id(0) % runs) * RUN, frame


@triton.jit(do_not_specialize=["frames", "tokens"])
def _layer_norm_modulate(
    x,  # (B, F, N, D)
    shift,  # (B, F, D)
    scale,
    y,  # (B, F, N, D), contiguous
    mean,  # (B, F, N), float32
    rstd,
    frames,
    tokens,
    eps,
    x_b,
    x_f,
    x_n,
    shift_b,
    shift_f,
    scale_b,
    scale_f,
    D: tl.constexpr,
    W: tl.constexpr,
    RUN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    b, f, first, frame = _run(frames, tokens, RUN)
    scale += b * scale_b + f * scale_f
    shift += b * shift_b + f * shift_f
    for step in range(RUN // TOKENS):
        n = first + step * TOKENS + tl.arange(0, TOKENS)
        inside = n < tokens
        token = frame * tokens + n
        rows = _load_rows(x + b * x_b + f * x_f + n.to(tl.int64) * x_n, inside, D, W)
        rough_mean = _sum(rows) / D
        # the mean is taken twice: `slip` is what rounding left over, and matters where |mean| >> deviation
        rows = _center(rows, rough_mean, D, W)
        slip = _sum(rows) / D
        variance = _dot(rows, rows) / D - slip * slip
        r = tl.rsqrt(tl.where(variance < 0, 0.0, variance) + eps)
        out = ()
        for p in tl.static_range(tl.cdiv(D, W)):
            gain = 1.0 + _vector_piece(scale, p, TOKENS, D, W)
            normed = (rows[p] - slip[:, None]) * r[:, None]
            out = out + (normed * gain + _vector_piece(shift, p, TOKENS, D, W),)
        _store_rows(y + token * D, out, inside, D, W)
        tl.store(mean + token, rough_mean + slip, mask=inside)
        tl.store(rstd + token, r, mask=inside)


@triton.jit(do_not_specialize=["frames", "tokens"])
def _layer_norm_modulate_backward(
    dy,  # (B, F, N, D)
    x,
    scale,  # (B, F, D)
    mean,  # (B, F, N), float32
    rstd,
    dx,  # (B, F, N, D), contiguous
    dshift,  # (B, F, runs, D), float32
    dscale,
    frames,
    tokens,
    dy_b,
    dy_f,
    dy_n,
    x_b,
    x_f,
    x_n,
    scale_b,
    scale_f,
    D: tl.constexpr,
    W: tl.constexpr,
    RUN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    b, f, first, frame = _run(frames, tokens, RUN)
    scale += b * scale_b + f * scale_f
    shift_sums = _zero_rows(TOKENS, D, W)
    scale_sums = _zero_rows(TOKENS, D, W)
    for step in range(RUN // TOKENS):
        n = first + step * TOKENS + tl.arange(0, TOKENS)
        inside = n < tokens
        token = frame * tokens + n
        grads = _load_rows(dy + b * dy_b + f * dy_f + n.to(tl.int64) * dy_n, inside, D, W)
        rows = _load_rows(x + b * x_b + f * x_f + n.to(tl.int64) * x_n, inside, D, W)
        m = tl.load(mean + token, mask=inside, other=0.0)
        r = tl.load(rstd + token, mask=inside, other=0.0)
        normed = ()
        dnormed = ()
        new_shift_sums = ()
        new_scale_sums = ()
        for p in tl.static_range(tl.cdiv(D, W)):
            normed = normed + ((rows[p] - m[:, None]) * r[:, None],)
            dnormed = dnormed + (grads[p] * (1.0 + _vector_piece(scale, p, TOKENS, D, W)),)
            new_shift_sums = new_shift_sums + (shift_sums[p] + grads[p],)
            new_scale_sums = new_scale_sums + (scale_sums[p] + grads[p] * normed[p],)
        shift_sums = new_shift_sums
        scale_sums = new_scale_sums
        grad = _sum(dnormed) / D
        along = _dot(dnormed, normed) / D
        out = ()
        for p in tl.static_range(tl.cdiv(D, W)):
            out = out + (r[:, None] * (dnormed[p] - grad[:, None] - normed[p] * along[:, None]),)
        _store_rows(dx + token * D, out, inside, D, W)
    row = tl.program_id(0).to(tl.int64) * D
    _store_sum(dshift + row, shift_sums, D, W)
    _store_sum(dscale + row, scale_sums, D, W)


@triton.jit(do_not_specialize=["runs"])
def _sum_runs(partial_a, partial_b, total_a, total_b, runs, D: tl.constexpr, WIDTH: tl.constexpr):
    """(B, F, runs, D) -> (B, F, D), twice, in the order of the runs."""
    frame = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    a = tl.zeros((WIDTH,), tl.float32)
    b = tl.zeros((WIDTH,), tl.float32)
    for run in range(runs):
        at = (frame * runs + run) * D + column
        a += tl.load(partial_a + at, mask=column < D, other=0.0)
        b += tl.load(partial_b + at, mask=column < D, other=0.0)
    tl.store(total_a + frame * D + column, a, mask=column < D)
    tl.store(total_b + frame * D + column, b, mask=column < D)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (LN(x) * (1 + scale) + shift, mean, rstd)."""
    batch, frames, tokens, channels = x.shape
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:3], dtype=torch.float32) for _ in range(2))
    programs = batch * frames * triton.cdiv(tokens, FORWARD_RUN)
    if programs > 0:
        with torch.cuda.device_of(x):
            _layer_norm_modulate[(programs,)](
                x,
                shift,
                scale,
                y,
                mean,
                rstd,
                frames,
                tokens,
                eps,
                *x.stride()[:3],
                *shift.stride()[:2],
                *scale.stride()[:2],
                D=channels,
                RUN=FORWARD_RUN,
                **tile(channels, elements=8, warps=4),
            )
    return y, mean, rstd


def layer_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dshift, dscale)."""
    batch, frames, tokens, channels = x.shape
    runs = triton.cdiv(tokens, BACKWARD_RUN)
    dx = x.new_empty(x.shape)
    partial = [x.new_empty((batch, frames, runs, channels), dtype=torch.float32) for _ in range(2)]
    dshift, dscale = (x.new_empty((batch, frames, channels), dtype=torch.float32) for _ in range(2))
    if batch * frames == 0:
        return dx, dshift, dscale
    with torch.cuda.device_of(x):
        if runs > 0:
            _layer_norm_modulate_backward[(batch * frames * runs,)](
                dy,
                x,
                scale,
                mean,
                rstd,
                dx,
                *partial,
                frames,
                tokens,
                *dy.stride()[:3],
                *x.stride()[:3],
                *scale.stride()[:2],
                D=channels,
                RUN=BACKWARD_RUN,
                **tile(channels, elements=2, warps=4),
            )
        _sum_runs[(batch * frames, triton.cdiv(channels, SUM_WIDTH))](
            *partial, dshift, dscale, runs, D=channels, WIDTH=SUM_WIDTH
        )
    return dx, dshift, dscale

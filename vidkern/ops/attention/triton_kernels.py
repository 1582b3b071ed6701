"""The temporal attention operators in Triton: a program takes problems (b, n, h) of F queries and F keys.

Up to 32 frames are one tile. More are cut into tiles of queries and of keys, and the softmax runs along the keys. A row
of d channels is a tuple of pieces whose widths are powers of two (72 = 64 + 8 of 16), so that nothing is padded to 128.
Batch, frames, tokens, heads and strides are run-time values: a change of them compiles nothing but another tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidkern import _extension

MIN_TILE = 16  # rows or channels: the least that tl.dot takes
ONE_TILE_FRAMES = 32
MAX_WARPS = 8
PACK = 8  # elements: the widest load, of 16 bytes in 16 bits
ENOUGH_PROGRAMS = 8192  # to fill any GPU, where a program takes several problems for the bias's gradient
SUM_SLICES, SUM_WIDTH = 8, 64  # runs and elements that are added side by side


@triton.constexpr_function
def pieces(d: int) -> list[tuple[int, int]]:
    """Return (first channel, width) of every piece of a row."""
    first = 1 << (d.bit_length() - 1)
    rest = d - first
    return [(0, first)] + ([(first, max(MIN_TILE, triton.next_power_of_2(rest)))] if rest else [])


@triton.constexpr_function
def _piece_count(d):
    return len(pieces(d))


@triton.constexpr_function
def _piece_start(d, p):
    return pieces(d)[p][0]


@triton.constexpr_function
def _piece_width(d, p):
    return pieces(d)[p][1]


@triton.jit
def _frames(first, TILE: tl.constexpr):
    return first + tl.arange(0, TILE)


@triton.jit
def _channels(p: tl.constexpr, D: tl.constexpr):
    return _piece_start(D, p) + tl.arange(0, _piece_width(D, p))


@triton.jit
def _piece(rows, f, stride_f, frames, p: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr):
    """Return (pointers, mask) of a piece of the rows of some frames f."""
    channels = _channels(p, D)
    offsets = tl.multiple_of(f.to(tl.int64) * stride_f, UNIT)
    return rows + offsets[:, None] + channels[None, :], (f < frames)[:, None] & (channels < D)[None, :]


@triton.jit
def _load(rows, first, stride_f, frames, D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr):
    f = _frames(first, TILE)
    tiles = ()
    for p in tl.static_range(_piece_count(D)):
        pointers, mask = _piece(rows, f, stride_f, frames, p, D, UNIT)
        tiles = tiles + (tl.load(pointers, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _store(rows, tiles, first, stride_f, frames, D: tl.constexpr, TILE: tl.constexpr):
    f = _frames(first, TILE)
    for p in tl.static_range(_piece_count(D)):
        pointers, mask = _piece(rows, f, stride_f, frames, p, D, D & -D)
        tl.store(pointers, tiles[p], mask=mask)


@triton.jit
def _scaled(tiles, factor):
    out = ()
    for p in tl.static_range(len(tiles)):
        out = out + (tiles[p] * factor,)
    return out


@triton.constexpr_function
def _operand(tokens, interpreted):
    """Return the type that tl.dot takes: the interpreter's is wrong in bfloat16."""
    return tl.float32 if interpreted else tokens.dtype.element_ty


@triton.jit
def _operands(tiles, OPERAND: tl.constexpr):
    out = ()
    for p in tl.static_range(len(tiles)):
        out = out + (tiles[p].to(OPERAND),)
    return out


@triton.jit
def _pairs(x):
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _turn(tiles, cos, sin, first, frames, BACK: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """Rotate tiles of q or k by the angles of their frames, or their gradients back, in float32."""
    f = _frames(first, TILE)
    out = ()
    for p in tl.static_range(len(tiles)):
        pointers, mask = _piece(cos, f, D, frames, p, D, D & -D)
        cos_even, cos_odd = _pairs(tl.load(pointers, mask=mask, other=0.0))
        pointers, mask = _piece(sin, f, D, frames, p, D, D & -D)
        sin_even, sin_odd = _pairs(tl.load(pointers, mask=mask, other=0.0))
        even, odd = _pairs(tiles[p].to(tl.float32))
        if BACK:
            turned = tl.join(even * cos_even + odd * sin_odd, odd * cos_odd - even * sin_even)
        else:
            turned = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
        # zeros stay zeros, but this keeps Triton from turning in tl.dot's layout, with several times the registers
        out = out + (tl.where(mask, tl.reshape(turned, tiles[p].shape), 0.0),)
    return out


@triton.jit
def _load_turned(
    rows,
    first,
    stride_f,
    frames,
    cos,
    sin,
    D: tl.constexpr,
    TILE: tl.constexpr,
    OPERAND: tl.constexpr,
    UNIT: tl.constexpr,
):
    tiles = _load(rows, first, stride_f, frames, D, TILE, UNIT)
    if cos is not None:
        tiles = _turn(tiles, cos, sin, first, frames, False, D, TILE)
    return _operands(tiles, OPERAND)


@triton.jit
def _store_turned_back(rows, grad, first, stride_f, frames, scale, cos, sin, D: tl.constexpr, TILE: tl.constexpr):
    grad = _scaled(grad, scale)
    if cos is not None:
        grad = _turn(grad, cos, sin, first, frames, True, D, TILE)
    _store(rows, grad, first, stride_f, frames, D, TILE)


@triton.jit
def _product(a, b):
    """Return a b^T of two tiles of rows."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for p in tl.static_range(1, len(a)):
        s = tl.dot(a[p], tl.trans(b[p]), s, input_precision="ieee")
    return s


@triton.jit
def _zeros(D: tl.constexpr, TILE: tl.constexpr):
    tiles = ()
    for p in tl.static_range(_piece_count(D)):
        tiles = tiles + (tl.zeros((TILE, _piece_width(D, p)), tl.float32),)
    return tiles


@triton.jit
def _accumulate(sums, weights, tiles):
    """Return sums + weights tiles."""
    weights = weights.to(tiles[0].dtype)
    out = ()
    for p in tl.static_range(len(tiles)):
        out = out + (tl.dot(weights, tiles[p], sums[p], input_precision="ieee"),)
    return out


@triton.jit
def _scores(q, k, first_query, first_key, frames, bias, scale, CAUSAL: tl.constexpr, TILE: tl.constexpr):
    """Return scale * q k^T + bias; -inf where a query does not see a key."""
    query, key = _frames(first_query, TILE)[:, None], _frames(first_key, TILE)[None, :]
    s = _product(q, k) * scale
    if bias is not None:
        s += tl.load(bias + query * frames + key, mask=(query < frames) & (key < frames), other=0.0)
    s = tl.where(key < frames, s, float("-inf"))
    if CAUSAL:
        s = tl.where(key <= query, s, float("-inf"))
    return s


@triton.jit
def _take(s, top, total):
    """Add a tile of keys to a running softmax: return (exp(s - base), base, fade of the old sums, top, total)."""
    before = top
    top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # a query that sees no key
    fade = tl.exp(before - base)
    e = tl.exp(s - base[:, None])
    return e, base, fade, top, total * fade + tl.sum(e, 1)


@triton.jit
def _inverse(total):
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def _differentiate(p, dp, delta, first_query, first_key, frames, TILE: tl.constexpr):
    """Return p and the scores' gradient ds, 0 beyond the frames."""
    inside = (_frames(first_query, TILE) < frames)[:, None] & (_frames(first_key, TILE) < frames)[None, :]
    return tl.where(inside, p, 0.0), tl.where(inside, p * (dp - delta[:, None]), 0.0)


@triton.jit
def _head(tensor, position, h, tokens, stride_b, stride_n, stride_h, UNIT: tl.constexpr):
    b, n = position // tokens, position % tokens
    return tensor + tl.multiple_of(
        b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h, UNIT
    )


RUN_TIME = ["frames", "tokens", "heads", "positions", "run", "runs"]
RUN_TIME += [f"{name}_{axis}" for name in ("q", "k", "v", "do") for axis in "bfnh"]


@triton.jit(do_not_specialize=RUN_TIME)
def _forward(
    q,  # (B, F, N, H, d)
    k,
    v,
    o,  # contiguous
    bias,  # (H, F, F), float32, contiguous, as are
    cos,  # (F, d)
    sin,
    scale,
    frames,
    tokens,
    heads,
    q_b,
    q_f,
    q_n,
    q_h,
    k_b,
    k_f,
    k_n,
    k_h,
    v_b,
    v_f,
    v_n,
    v_h,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    UNIT: tl.constexpr,
):
    OPERAND: tl.constexpr = _operand(q, INTERPRETED)
    tiles = 1 if ONE_TILE else tl.cdiv(frames, TILE)
    program = tl.program_id(0)
    first_query, h, position = program % tiles * TILE, program // tiles % heads, program // tiles // heads
    q = _head(q, position, h, tokens, q_b, q_n, q_h, UNIT)
    k = _head(k, position, h, tokens, k_b, k_n, k_h, UNIT)
    v = _head(v, position, h, tokens, v_b, v_n, v_h, UNIT)
    o_n = heads.to(tl.int64) * D
    o_f = tokens * o_n
    o = _head(o, position, h, tokens, frames * o_f, o_n, D, D & -D)
    if bias is not None:
        bias += h.to(tl.int64) * frames * frames
    q_tile = _load_turned(q, first_query, q_f, frames, cos, sin, D, TILE, OPERAND, UNIT)
    top, total = tl.full((TILE,), float("-inf"), tl.float32), tl.zeros((TILE,), tl.float32)
    sums = _zeros(D, TILE)
    for first_key in range(0, TILE if ONE_TILE else frames, TILE):
        k_tile = _load_turned(k, first_key, k_f, frames, cos, sin, D, TILE, OPERAND, UNIT)
        v_tile = _operands(_load(v, first_key, v_f, frames, D, TILE, UNIT), OPERAND)
        s = _scores(q_tile, k_tile, first_query, first_key, frames, bias, scale, CAUSAL, TILE)
        e, _, fade, top, total = _take(s, top, total)
        sums = _accumulate(_scaled(sums, fade[:, None]), e, v_tile)
    _store(o, _scaled(sums, _inverse(total)[:, None]), first_query, o_f, frames, D, TILE)


@triton.jit(do_not_specialize=RUN_TIME)
def _backward_one_tile(
    do,  # (B, F, N, H, d)
    q,
    k,
    v,
    dq,  # contiguous, or parts of contiguous (B, F, N, 3, H, d)
    dk,
    dv,
    dbias,  # (runs, H, F, F), float32
    bias,  # (H, F, F), float32, contiguous, as are
    cos,  # (F, d)
    sin,
    scale,
    frames,
    tokens,
    heads,
    positions,
    run,
    do_b,
    do_f,
    do_n,
    do_h,
    q_b,
    q_f,
    q_n,
    q_h,
    k_b,
    k_f,
    k_n,
    k_h,
    v_b,
    v_f,
    v_n,
    v_h,
    PARTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    UNIT: tl.constexpr,
):
    OPERAND: tl.constexpr = _operand(q, INTERPRETED)
    program = tl.program_id(0)
    h, first = program % heads, program // heads * run
    if bias is not None:
        bias += h.to(tl.int64) * frames * frames
    grad_n = heads.to(tl.int64) * (PARTS * D)
    grad_f = tokens * grad_n
    bias_sums = tl.zeros((TILE, TILE), tl.float32)
    for position in range(first, tl.minimum(first + run, positions)):
        q_rows = _head(q, position, h, tokens, q_b, q_n, q_h, UNIT)
        k_rows = _head(k, position, h, tokens, k_b, k_n, k_h, UNIT)
        v_rows = _head(v, position, h, tokens, v_b, v_n, v_h, UNIT)
        do_rows = _head(do, position, h, tokens, do_b, do_n, do_h, UNIT)
        q_tile = _load_turned(q_rows, 0, q_f, frames, cos, sin, D, TILE, OPERAND, UNIT)
        k_tile = _load_turned(k_rows, 0, k_f, frames, cos, sin, D, TILE, OPERAND, UNIT)
        v_tile = _operands(_load(v_rows, 0, v_f, frames, D, TILE, UNIT), OPERAND)
        do_tile = _operands(_load(do_rows, 0, do_f, frames, D, TILE, UNIT), OPERAND)
        s = _scores(q_tile, k_tile, 0, 0, frames, bias, scale, CAUSAL, TILE)
        e, _, _, _, total = _take(s, tl.full((TILE,), float("-inf"), tl.float32), tl.zeros((TILE,), tl.float32))
        p = e * _inverse(total)[:, None]
        dp = _product(do_tile, v_tile)
        p, ds = _differentiate(p, dp, tl.sum(p * dp, 1), 0, 0, frames, TILE)
        if dbias is not None:
            bias_sums += ds
        zeros = _zeros(D, TILE)
        dq_rows = _head(dq, position, h, tokens, frames * grad_f, grad_n, D, D & -D)
        dk_rows = _head(dk, position, h, tokens, frames * grad_f, grad_n, D, D & -D)
        dv_rows = _head(dv, position, h, tokens, frames * grad_f, grad_n, D, D & -D)
        _store(dv_rows, _accumulate(zeros, tl.trans(p), do_tile), 0, grad_f, frames, D, TILE)
        _store_turned_back(dq_rows, _accumulate(zeros, ds, k_tile), 0, grad_f, frames, scale, cos, sin, D, TILE)
        _store_turned_back(
            dk_rows, _accumulate(zeros, tl.trans(ds), q_tile), 0, grad_f, frames, scale, cos, sin, D, TILE
        )
    if dbias is not None:
        query, key = _frames(0, TILE)[:, None], _frames(0, TILE)[None, :]
        dbias += program.to(tl.int64) * frames * frames
        tl.store(dbias + query * frames + key, bias_sums, mask=(query < frames) & (key < frames))


@triton.jit(do_not_specialize=RUN_TIME)
def _backward(
    do,  # (B, F, N, H, d)
    q,
    k,
    v,
    dq,  # contiguous, or parts of contiguous (B, F, N, 3, H, d)
    dk,
    dv,
    dbias,  # (runs, H, F, F), float32
    softmax,  # (runs, H, 3, F), float32: what queries leave for keys
    bias,  # (H, F, F), float32, contiguous, as are
    cos,  # (F, d)
    sin,
    scale,
    frames,
    tokens,
    heads,
    positions,
    run,
    do_b,
    do_f,
    do_n,
    do_h,
    q_b,
    q_f,
    q_n,
    q_h,
    k_b,
    k_f,
    k_n,
    k_h,
    v_b,
    v_f,
    v_n,
    v_h,
    PARTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    UNIT: tl.constexpr,
):
    OPERAND: tl.constexpr = _operand(q, INTERPRETED)
    program = tl.program_id(0)
    h, first = program % heads, program // heads * run
    if bias is not None:
        bias += h.to(tl.int64) * frames * frames
    if dbias is not None:
        dbias += program.to(tl.int64) * frames * frames
    softmax += program.to(tl.int64) * 3 * frames
    grad_n = heads.to(tl.int64) * (PARTS * D)
    grad_f = tokens * grad_n
    for position in range(first, tl.minimum(first + run, positions)):
        q_rows = _head(q, position, h, tokens, q_b, q_n, q_h, UNIT)
        k_rows = _head(k, position, h, tokens, k_b, k_n, k_h, UNIT)
        v_rows = _head(v, position, h, tokens, v_b, v_n, v_h, UNIT)
        do_rows = _head(do, position, h, tokens, do_b, do_n, do_h, UNIT)
        dq_rows = _head(dq, position, h, tokens, frames * grad_f, grad_n, D, D & -D)
        dk_rows = _head(dk, position, h, tokens, frames * grad_f, grad_n, D, D & -D)
        dv_rows = _head(dv, position, h, tokens, frames * grad_f, grad_n, D, D & -D)
        for first_query in range(0, frames, TILE):
            q_tile = _load_turned(q_rows, first_query, q_f, frames, cos, sin, D, TILE, OPERAND, UNIT)
            do_tile = _operands(_load(do_rows, first_query, do_f, frames, D, TILE, UNIT), OPERAND)
            top, total = tl.full((TILE,), float("-inf"), tl.float32), tl.zeros((TILE,), tl.float32)
            base, delta = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
            for first_key in range(0, frames, TILE):
                k_tile = _load_turned(k_rows, first_key, k_f, frames, cos, sin, D, TILE, OPERAND, UNIT)
                v_tile = _operands(_load(v_rows, first_key, v_f, frames, D, TILE, UNIT), OPERAND)
                s = _scores(q_tile, k_tile, first_query, first_key, frames, bias, scale, CAUSAL, TILE)
                e, base, fade, top, total = _take(s, top, total)
                delta = delta * fade + tl.sum(e * _product(do_tile, v_tile), 1)
            inverse = _inverse(total)
            delta *= inverse
            query = _frames(first_query, TILE)
            tl.store(softmax + query, base, mask=query < frames)
            tl.store(softmax + frames + query, inverse, mask=query < frames)
            tl.store(softmax + 2 * frames + query, delta, mask=query < frames)
            sums = _zeros(D, TILE)
            for first_key in range(0, frames, TILE):
                k_tile = _load_turned(k_rows, first_key, k_f, frames, cos, sin, D, TILE, OPERAND, UNIT)
                v_tile = _operands(_load(v_rows, first_key, v_f, frames, D, TILE, UNIT), OPERAND)
                s = _scores(q_tile, k_tile, first_query, first_key, frames, bias, scale, CAUSAL, TILE)
                p = tl.exp(s - base[:, None]) * inverse[:, None]
                _, ds = _differentiate(p, _product(do_tile, v_tile), delta, first_query, first_key, frames, TILE)
                if dbias is not None:
                    key = _frames(first_key, TILE)[None, :]
                    inside = (query < frames)[:, None] & (key < frames)
                    total_so_far = dbias + query[:, None] * frames + key
                    before = tl.load(total_so_far, mask=inside & (position > first), other=0.0)
                    tl.store(total_so_far, before + ds, mask=inside)
                sums = _accumulate(sums, ds, k_tile)
            _store_turned_back(dq_rows, sums, first_query, grad_f, frames, scale, cos, sin, D, TILE)
        tl.debug_barrier()
        for first_key in range(0, frames, TILE):
            k_tile = _load_turned(k_rows, first_key, k_f, frames, cos, sin, D, TILE, OPERAND, UNIT)
            v_tile = _operands(_load(v_rows, first_key, v_f, frames, D, TILE, UNIT), OPERAND)
            dk_sums, dv_sums = _zeros(D, TILE), _zeros(D, TILE)
            for first_query in range(0, frames, TILE):
                q_tile = _load_turned(q_rows, first_query, q_f, frames, cos, sin, D, TILE, OPERAND, UNIT)
                do_tile = _operands(_load(do_rows, first_query, do_f, frames, D, TILE, UNIT), OPERAND)
                query = _frames(first_query, TILE)
                base = tl.load(softmax + query, mask=query < frames, other=0.0)
                inverse = tl.load(softmax + frames + query, mask=query < frames, other=0.0)
                delta = tl.load(softmax + 2 * frames + query, mask=query < frames, other=0.0)
                s = _scores(q_tile, k_tile, first_query, first_key, frames, bias, scale, CAUSAL, TILE)
                p = tl.exp(s - base[:, None]) * inverse[:, None]
                p, ds = _differentiate(p, _product(do_tile, v_tile), delta, first_query, first_key, frames, TILE)
                dv_sums = _accumulate(dv_sums, tl.trans(p), do_tile)
                dk_sums = _accumulate(dk_sums, tl.trans(ds), q_tile)
            _store(dv_rows, dv_sums, first_key, grad_f, frames, D, TILE)
            _store_turned_back(dk_rows, dk_sums, first_key, grad_f, frames, scale, cos, sin, D, TILE)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["runs", "size"])
def _sum_runs(partials, totals, runs, size, SLICES: tl.constexpr, WIDTH: tl.constexpr):
    """(runs, size) -> (size,), in a fixed order."""
    i = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros((SLICES, WIDTH), tl.float32)
    for first in range(0, runs, SLICES):
        run = first + tl.arange(0, SLICES)
        inside = (run < runs)[:, None] & (i < size)[None, :]
        sums += tl.load(partials + run.to(tl.int64)[:, None] * size + i[None, :], mask=inside, other=0.0)
    tl.store(totals + i, tl.sum(sums, 0), mask=i < size)


def _tile(frames: int, wide: bool, backward: bool) -> int:
    """Return how many queries, and how many keys, a tile holds."""
    if frames <= ONE_TILE_FRAMES:
        return max(MIN_TILE, triton.next_power_of_2(frames))
    return 32 if wide or backward else 64


def _resources(tile: int, one_tile: bool, d: int, wide: bool, plain: bool, backward: bool) -> dict[str, Any]:
    """Return the warps that share a tile, and their registers: no spills in one tile, and many programs on a GPU."""
    if one_tile and plain and not wide:
        short = backward and tile == MIN_TILE and d not in (72, 80)  # it does with fewer than it would take
        return {"num_warps": tile // MIN_TILE * (2 if backward and d > 80 else 1), "maxnreg": 168 if short else None}
    warps = tile // MIN_TILE * (2 if wide else 1) * (2 if d > 80 else 1)
    if backward:
        warps = 2 * warps if tile == MIN_TILE else MAX_WARPS
    return {"num_warps": min(MAX_WARPS, warps)}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:4]]


def _constants(
    x: Tensor, strides: list[int], bias: Tensor | None, cos: Tensor | None, causal: bool, backward: bool
) -> dict[str, Any]:
    frames, d, wide = x.shape[1], x.shape[-1], x.dtype == torch.float32
    tile, one_tile = _tile(frames, wide, backward), frames <= ONE_TILE_FRAMES
    return {
        "CAUSAL": causal,
        "D": d,
        "TILE": tile,
        "INTERPRETED": _extension.interpreting(),
        "UNIT": PACK if all(stride % PACK == 0 for stride in strides) else 1,
        "num_stages": 1 if one_tile or cos is not None else 2,  # tables on their way take too much shared memory
        **_resources(tile, one_tile, d, wide, bias is None and cos is None, backward),
    }


def _table(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.to(torch.float32).contiguous()


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """Return o (B, F, N, H, d): attention over F at each (b, n) and head."""
    batch, frames, tokens, heads, _ = q.shape
    o = q.new_empty(q.shape)
    strides = _strides(q, k, v)
    constants = _constants(q, strides, bias, cos, causal, backward=False)
    programs = batch * tokens * heads * triton.cdiv(frames, constants["TILE"])
    if programs > 0:
        with torch.cuda.device_of(q):
            _forward[(programs,)](
                *(q, k, v, o, _table(bias), _table(cos), _table(sin), scale, frames, tokens, heads, *strides),
                ONE_TILE=frames <= ONE_TILE_FRAMES,
                **constants,
            )
    return o


def _launch_backward(
    do: Tensor,
    tokens_in: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, ...],
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> Tensor:
    """Fill grads, of q, k and v, and return the gradient of the bias, empty unless asked for."""
    q = tokens_in[0]
    batch, frames, tokens, heads, _ = q.shape
    positions, strides = batch * tokens, _strides(do, *tokens_in)
    constants = {
        "PARTS": 1 if grads[0].is_contiguous() else 3,
        **_constants(q, strides, bias, cos, causal, backward=True),
    }
    tiles = max(1, triton.cdiv(frames, constants["TILE"]))
    run = max(1, triton.cdiv(positions, max(1, ENOUGH_PROGRAMS // (heads * tiles)))) if bias_grad else 1
    runs = triton.cdiv(positions, run)

    def floats(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    partials = floats(runs, heads, frames, frames) if bias_grad else None
    totals = floats(heads, frames, frames) if bias_grad else floats(0)
    options = (_table(bias), _table(cos), _table(sin), scale, frames, tokens, heads, positions, run, *strides)
    with torch.cuda.device_of(q):
        if q.numel() > 0 and frames <= ONE_TILE_FRAMES:
            _backward_one_tile[(runs * heads,)](do, *tokens_in, *grads, partials, *options, **constants)
        elif q.numel() > 0:
            softmax = floats(runs, heads, 3, frames)
            _backward[(runs * heads,)](do, *tokens_in, *grads, partials, softmax, *options, **constants)
        if totals.numel() > 0:
            _sum_runs[(triton.cdiv(totals.numel(), SUM_WIDTH),)](
                partials, totals, runs, totals.numel(), SLICES=SUM_SLICES, WIDTH=SUM_WIDTH
            )
    return totals


def temporal_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dbias), with everything computed again from the inputs; dbias is empty unless asked for."""
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dbias = _launch_backward(do, (q, k, v), (dq, dk, dv), bias, cos, sin, scale, causal, bias_grad)
    return dq, dk, dv, dbias


def temporal_attention_packed(
    qkv: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Return :func:`temporal_attention` of the three parts of qkv (B, F, N, 3, H, d)."""
    q, k, v = qkv.unbind(3)
    return temporal_attention(q, k, v, bias, cos, sin, scale, causal)


def temporal_attention_packed_backward(
    do: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dqkv, dbias)."""
    q, k, v = qkv.unbind(3)
    dqkv = qkv.new_empty(qkv.shape)
    dbias = _launch_backward(do, (q, k, v), dqkv.unbind(3), bias, cos, sin, scale, causal, bias_grad)
    return dqkv, dbias

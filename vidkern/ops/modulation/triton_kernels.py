"""The modulation operators in Triton: a program takes a run of one frame's tokens, one after another.

A row is a tuple of pieces whose widths are powers of two (1152 = 1024 + 128), so that nothing is padded to 2048. All
threads of a program share a row, and hold their columns of the frame's vectors and of the vectors' gradients; the next
row is on its way while one is worked on. Batch, frames, tokens, strides and the length of a run are run-time values: a
change of them compiles nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_PIECE = 16  # columns
MAX_WASTE = 1 / 16  # of a row, beyond its last column
PACK = 8  # elements: the widest load, of 16 bytes in 16 bits
MAX_WARPS = 16
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 24, 12  # of a row that a thread may hold
SHORTEST_RUN, LONGEST_RUN = 8, 32  # tokens
ENOUGH_PROGRAMS = 1000  # to fill a GPU a few times over
SUM_WIDTH = 128  # columns


@triton.constexpr_function
def pieces(channels: int) -> list[tuple[int, int]]:
    """Return (first column, width) of every piece of a row."""
    found, start = [], 0
    while start < channels:
        rest = channels - start
        width = triton.next_power_of_2(rest)
        if width - rest > MAX_WASTE * channels:
            width //= 2
        found.append((start, max(width, MIN_PIECE)))
        start += found[-1][1]
    return found


@triton.constexpr_function
def _piece_count(channels):
    return len(pieces(channels))


@triton.constexpr_function
def _piece_start(channels, p):
    return pieces(channels)[p][0]


@triton.constexpr_function
def _piece_width(channels, p):
    return pieces(channels)[p][1]


@triton.jit
def _columns(p: tl.constexpr, D: tl.constexpr):
    return _piece_start(D, p) + tl.arange(0, _piece_width(D, p))


@triton.jit
def _load_row(row, wanted, D: tl.constexpr):
    tiles = ()
    for p in tl.static_range(_piece_count(D)):
        columns = _columns(p, D)
        tiles = tiles + (tl.load(row + columns, mask=wanted & (columns < D), other=0.0),)
    return tiles


@triton.jit
def _store_row(row, tiles, D: tl.constexpr):
    for p in tl.static_range(_piece_count(D)):
        columns = _columns(p, D)
        tl.store(row + columns, tiles[p], mask=columns < D)


@triton.jit
def _zero_row(D: tl.constexpr):
    tiles = ()
    for p in tl.static_range(_piece_count(D)):
        tiles = tiles + (tl.zeros((_piece_width(D, p),), tl.float32),)
    return tiles


@triton.jit
def _wide(tiles):
    out = ()
    for p in tl.static_range(len(tiles)):
        out = out + (tiles[p].to(tl.float32),)
    return out


@triton.jit
def _gain(scale):
    out = ()
    for p in tl.static_range(len(scale)):
        out = out + (1.0 + scale[p],)
    return out


@triton.jit
def _add(a, b):
    out = ()
    for p in tl.static_range(len(a)):
        out = out + (a[p] + b[p],)
    return out


@triton.jit
def _multiply(a, b):
    out = ()
    for p in tl.static_range(len(a)):
        out = out + (a[p] * b[p],)
    return out


@triton.jit
def _multiply_add(a, b, c):
    out = ()
    for p in tl.static_range(len(a)):
        out = out + (a[p] * b[p] + c[p],)
    return out


@triton.jit
def _mean(tiles, D: tl.constexpr):
    total = tl.sum(tiles[0])
    for p in tl.static_range(1, len(tiles)):
        total += tl.sum(tiles[p])
    return total / D


@triton.jit
def _center(row, mean, D: tl.constexpr):  # zeros stay beyond D
    out = ()
    for p in tl.static_range(_piece_count(D)):
        out = out + (tl.where(_columns(p, D) < D, row[p] - mean, 0.0),)
    return out


@triton.jit
def _normalize(row, mean, rstd):
    out = ()
    for p in tl.static_range(len(row)):
        out = out + ((row[p] - mean) * rstd,)
    return out


@triton.jit
def _layer_norm(row, eps, D: tl.constexpr):
    """Return (LN(row), mean, rstd); the mean is taken twice, for a row whose |mean| is far above its deviation."""
    rough_mean = _mean(row, D)
    row = _center(row, rough_mean, D)
    slip = _mean(row, D)  # what rounding left over
    variance = _mean(_multiply(row, row), D) - slip * slip
    rstd = tl.rsqrt(tl.where(variance < 0, 0.0, variance) + eps)
    return _normalize(row, slip, rstd), rough_mean + slip, rstd


@triton.jit
def _norm_backward(dnormed, normed, rstd, NORM: tl.constexpr, D: tl.constexpr):
    along = _mean(_multiply(dnormed, normed), D)
    grad = _mean(dnormed, D) if NORM == "layer" else 0.0
    out = ()
    for p in tl.static_range(len(normed)):
        out = out + (rstd * (dnormed[p] - grad - normed[p] * along),)
    return out


@triton.jit
def _run(frames, tokens, run):
    """Return (b, f, first token, last token, frame index) of this program's run."""
    program, runs = tl.program_id(0).to(tl.int64), tl.cdiv(tokens, run)
    frame, first = program // runs, program % runs * run
    return frame // frames, frame % frames, first, tl.minimum(first + run, tokens), frame


@triton.jit
def _frame_of(tensor, b, f, stride_b, stride_f, UNIT: tl.constexpr):
    return tensor + tl.multiple_of(b * stride_b + f * stride_f, UNIT)


@triton.jit
def _load_token(frame, n, last, stride_n, D: tl.constexpr, UNIT: tl.constexpr):
    return _load_row(frame + tl.multiple_of(n * stride_n, UNIT), n < last, D)


@triton.jit
def _load_vector(vector, b, f, stride_b, stride_f, D: tl.constexpr, UNIT: tl.constexpr):
    return _wide(_load_row(_frame_of(vector, b, f, stride_b, stride_f, UNIT), True, D))


RUN_TIME = ["frames", "tokens", "run"]
RUN_TIME += [f"{name}_{axis}" for name in ("x", "y", "dh", "dz") for axis in "bfn"]
RUN_TIME += [f"{name}_{axis}" for name in ("gate", "shift", "scale") for axis in "bf"]


@triton.jit(do_not_specialize=RUN_TIME)
def _forward(
    x,  # (B, F, N, D)
    y,
    gate,  # (B, F, D)
    shift,
    scale,
    z,  # (B, F, N, D), contiguous
    h,
    mean,  # (B, F, N), float32
    rstd,
    eps,
    frames,
    tokens,
    run,
    x_b,
    x_f,
    x_n,
    y_b,
    y_f,
    y_n,
    gate_b,
    gate_f,
    shift_b,
    shift_f,
    scale_b,
    scale_f,
    NORM: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, f, first, last, frame = _run(frames, tokens, run)
    x = _frame_of(x, b, f, x_b, x_f, UNIT)
    x_next = _load_token(x, first, last, x_n, D, UNIT)
    if y is not None:
        y = _frame_of(y, b, f, y_b, y_f, UNIT)
        y_next = _load_token(y, first, last, y_n, D, UNIT)
        gates = _load_vector(gate, b, f, gate_b, gate_f, D, UNIT)
    if NORM != "none":
        gains = _gain(_load_vector(scale, b, f, scale_b, scale_f, D, UNIT))
        shifts = _load_vector(shift, b, f, shift_b, shift_f, D, UNIT)
    for n in range(first, last):
        token = frame * tokens + n
        row = _wide(x_next)
        x_next = _load_token(x, n + 1, last, x_n, D, UNIT)
        if y is not None:
            row = _multiply_add(gates, _wide(y_next), row)
            y_next = _load_token(y, n + 1, last, y_n, D, UNIT)
            _store_row(z + token * D, row, D)
        if NORM == "layer":
            row, m, r = _layer_norm(row, eps, D)
            tl.store(mean + token, m)
        if NORM == "rms":
            r = tl.rsqrt(_mean(_multiply(row, row), D) + eps)
            row = _normalize(row, 0.0, r)
        if NORM != "none":
            tl.store(rstd + token, r)
            _store_row(h + token * D, _multiply_add(row, gains, shifts), D)


@triton.jit(do_not_specialize=RUN_TIME)
def _backward(
    dh,  # (B, F, N, D)
    dz,
    x,
    y,
    gate,  # (B, F, D)
    scale,
    mean,  # (B, F, N), float32
    rstd,
    dx,  # (B, F, N, D), contiguous
    dy,
    dgate,  # (B, F, runs, D), float32
    dshift,
    dscale,
    frames,
    tokens,
    run,
    dh_b,
    dh_f,
    dh_n,
    dz_b,
    dz_f,
    dz_n,
    x_b,
    x_f,
    x_n,
    y_b,
    y_f,
    y_n,
    gate_b,
    gate_f,
    scale_b,
    scale_f,
    NORM: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, f, first, last, frame = _run(frames, tokens, run)
    if y is not None:
        y = _frame_of(y, b, f, y_b, y_f, UNIT)
        y_next = _load_token(y, first, last, y_n, D, UNIT)
        gate_sums = _zero_row(D)
    if dz is not None:
        dz = _frame_of(dz, b, f, dz_b, dz_f, UNIT)
    if NORM != "none":
        dh = _frame_of(dh, b, f, dh_b, dh_f, UNIT)
        dh_next = _load_token(dh, first, last, dh_n, D, UNIT)
        x = _frame_of(x, b, f, x_b, x_f, UNIT)
        x_next = _load_token(x, first, last, x_n, D, UNIT)
        shift_sums = _zero_row(D)
        scale_sums = _zero_row(D)
    for n in range(first, last):
        token = frame * tokens + n
        if y is not None:
            branch = _wide(y_next)
            y_next = _load_token(y, n + 1, last, y_n, D, UNIT)
        if dz is not None:
            dz_row = _load_token(dz, n, last, dz_n, D, UNIT)
        if NORM != "none":
            grad = _wide(dh_next)
            dh_next = _load_token(dh, n + 1, last, dh_n, D, UNIT)
            normed = _wide(x_next)
            x_next = _load_token(x, n + 1, last, x_n, D, UNIT)
            if y is not None:
                gates = _load_vector(gate, b, f, gate_b, gate_f, D, UNIT)
                normed = _multiply_add(gates, branch, normed)
            r = tl.load(rstd + token)
            normed = _normalize(normed, tl.load(mean + token) if NORM == "layer" else 0.0, r)
            shift_sums = _add(shift_sums, grad)
            scale_sums = _multiply_add(grad, normed, scale_sums)
            gains = _gain(_load_vector(scale, b, f, scale_b, scale_f, D, UNIT))
            through = _norm_backward(_multiply(grad, gains), normed, r, NORM, D)
            if dz is not None:
                total = _add(_wide(dz_row), through)
            else:
                total = through
            _store_row(dx + token * D, total, D)
        else:
            total = _wide(dz_row)
        if y is not None:
            gate_sums = _multiply_add(total, branch, gate_sums)
            gates = _load_vector(gate, b, f, gate_b, gate_f, D, UNIT)
            _store_row(dy + token * D, _multiply(gates, total), D)
    row = tl.program_id(0).to(tl.int64) * D
    if y is not None:
        _store_row(dgate + row, gate_sums, D)
    if NORM != "none":
        _store_row(dshift + row, shift_sums, D)
        _store_row(dscale + row, scale_sums, D)


@triton.jit(do_not_specialize=["runs"])
def _sum_runs(partials, totals, runs, D: tl.constexpr, WIDTH: tl.constexpr):
    """(B, F, runs, D) -> (B, F, D), in the order of the runs, for each of the tensors."""
    frame = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    for k in tl.static_range(len(totals)):
        if tl.program_id(2) == k:
            sums = tl.zeros((WIDTH,), tl.float32)
            for run in range(runs):
                sums += tl.load(partials[k] + (frame * runs + run) * D + columns, mask=columns < D, other=0.0)
            tl.store(totals[k] + frame * D + columns, sums, mask=columns < D)


def run_length(batch: int, frames: int, tokens: int) -> int:
    """Return how many tokens a program takes: the longest power of two that leaves enough programs."""
    run = LONGEST_RUN
    while run > SHORTEST_RUN and batch * frames * triton.cdiv(tokens, run) < ENOUGH_PROGRAMS:
        run //= 2
    return run


def warps(channels: int, elements: int) -> int:
    """Return how many warps share a row, so that a thread holds at most so many of its elements."""
    return min(MAX_WARPS, triton.next_power_of_2(triton.cdiv(channels, 32 * elements)))


def _strides(*tensors: Tensor | None, axes: int) -> list[int]:
    return [stride for t in tensors for stride in ([0] * axes if t is None else t.stride()[:axes])]


def _unit(strides: Sequence[int]) -> int:
    return PACK if all(stride % PACK == 0 for stride in strides) else 1


def _launch_forward(
    norm: str,
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Any, ...]:
    """Return (z, h, mean, rstd), None where the operator has no such result."""
    batch, frames, tokens, channels = x.shape
    z = None if y is None else x.new_empty(x.shape)
    h = None if norm == "none" else x.new_empty(x.shape)
    mean = x.new_empty(x.shape[:3], dtype=torch.float32) if norm == "layer" else None
    rstd = None if norm == "none" else x.new_empty(x.shape[:3], dtype=torch.float32)
    run = run_length(batch, frames, tokens)
    strides = [*_strides(x, y, axes=3), *_strides(gate, shift, scale, axes=2)]
    programs = batch * frames * triton.cdiv(tokens, run)
    if programs > 0:
        with torch.cuda.device_of(x):
            _forward[(programs,)](
                *(x, y, gate, shift, scale, z, h, mean, rstd, eps, frames, tokens, run, *strides),
                NORM=norm,
                D=channels,
                UNIT=_unit(strides),
                num_warps=warps(channels, FORWARD_ELEMENTS),
            )
    return z, h, mean, rstd


def _launch_backward(
    norm: str,
    dh: Tensor | None,
    dz: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> tuple[Any, ...]:
    """Return (dx, dy, dgate, dshift, dscale), None where the operator has no such result."""
    like: Any = y if x is None else x
    batch, frames, tokens, channels = like.shape
    run = run_length(batch, frames, tokens)
    runs = triton.cdiv(tokens, run)
    dx = None if x is None else like.new_empty(like.shape)
    dy = None if y is None else like.new_empty(like.shape)
    has = (y is not None, x is not None, x is not None)  # dgate, dshift, dscale
    partials, totals = (
        [like.new_empty(shape, dtype=torch.float32) if wanted else None for wanted in has]
        for shape in ((batch, frames, runs, channels), (batch, frames, channels))
    )
    strides = [*_strides(dh, dz, x, y, axes=3), *_strides(gate, scale, axes=2)]
    if batch * frames > 0:
        with torch.cuda.device_of(like):
            if runs > 0:
                _backward[(batch * frames * runs,)](
                    *(dh, dz, x, y, gate, scale, mean, rstd, dx, dy, *partials, frames, tokens, run, *strides),
                    NORM=norm,
                    D=channels,
                    UNIT=_unit(strides),
                    num_warps=warps(channels, BACKWARD_ELEMENTS),
                )
            _sum_runs[(batch * frames, triton.cdiv(channels, SUM_WIDTH), sum(has))](
                tuple(p for p in partials if p is not None),
                tuple(t for t in totals if t is not None),
                runs,
                D=channels,
                WIDTH=SUM_WIDTH,
                num_warps=1,
            )
    return dx, dy, *totals


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (LN(x) * (1 + scale) + shift, mean, rstd)."""
    _, y, mean, rstd = _launch_forward("layer", x, shift=shift, scale=scale, eps=eps)
    return y, mean, rstd


def layer_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dshift, dscale)."""
    dx, _, _, dshift, dscale = _launch_backward("layer", dy, None, x, None, None, scale, mean, rstd)
    return dx, dshift, dscale


def rms_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (RMS(x) * (1 + scale) + shift, rstd)."""
    _, y, _, rstd = _launch_forward("rms", x, shift=shift, scale=scale, eps=eps)
    return y, rstd


def rms_norm_modulate_backward(dy: Tensor, x: Tensor, scale: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dshift, dscale)."""
    dx, _, _, dshift, dscale = _launch_backward("rms", dy, None, x, None, None, scale, None, rstd)
    return dx, dshift, dscale


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * y."""
    return _launch_forward("none", x, y, gate)[0]


def gate_residual_backward(dz: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dy, dgate); the gradient of x is dz itself."""
    _, dy, dgate, _, _ = _launch_backward("none", None, dz, None, y, gate, None, None, None)
    return dy, dgate


def gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (z, LN(z) * (1 + scale) + shift, mean, rstd) with z = x + gate * y, normed before it is rounded."""
    z, h, mean, rstd = _launch_forward("layer", x, y, gate, shift, scale, eps)
    return z, h, mean, rstd


def gate_residual_modulate_backward(
    dh: Tensor,
    dz: Tensor | None,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dy, dgate, dshift, dscale); dz is None where nothing else reads z."""
    dx, dy, dgate, dshift, dscale = _launch_backward("layer", dh, dz, x, y, gate, scale, mean, rstd)
    return dx, dy, dgate, dshift, dscale


def gate_residual_rms_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (z, RMS(z) * (1 + scale) + shift, rstd) with z = x + gate * y, normed before it is rounded."""
    z, h, _, rstd = _launch_forward("rms", x, y, gate, shift, scale, eps)
    return z, h, rstd


def gate_residual_rms_modulate_backward(
    dh: Tensor, dz: Tensor | None, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dy, dgate, dshift, dscale); dz is None where nothing else reads z."""
    dx, dy, dgate, dshift, dscale = _launch_backward("rms", dh, dz, x, y, gate, scale, None, rstd)
    return dx, dy, dgate, dshift, dscale

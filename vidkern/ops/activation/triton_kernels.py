"""The activation operators in Triton: a program takes a run of rows over some of their columns.

Rows, strides and the length of a run are run-time values: a change of them compiles nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LINEAR, CUBIC = 1.5957691216, 0.044715  # 2 sqrt(2 / pi)
SATURATED = 12.0
LOG2_E = 1.4426950409
PACK = 8  # elements: the widest load, of 16 bytes in 16 bits
WARPS = 4
COLUMNS, ROWS = 512, 4  # of a tile: a thread has 16 elements of each tensor
FORWARD_RUN = 8  # rows
SHORTEST_RUN, LONGEST_RUN = 8, 64
ENOUGH_PROGRAMS = 1000  # to fill a GPU a few times over
SUM_COLUMNS, SUM_ROWS = 128, 32

RUN_TIME = ["rows", "run", "x_m", "dy_m"]


@triton.jit
def _sigmoid(z, LINEAR: tl.constexpr, CUBIC: tl.constexpr, SATURATED: tl.constexpr, LOG2_E: tl.constexpr):
    """Return sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3)), by which GELU multiplies z, and its derivative by z.

    Beyond SATURATED it is 0 or 1, without a cubic that overflows.
    """
    m = tl.abs(z)
    m = tl.where(m > SATURATED, SATURATED, m)
    square = m * m
    e = tl.exp2(m * (square * (-LINEAR * CUBIC * LOG2_E) - LINEAR * LOG2_E))
    near = 1.0 / (1.0 + e)
    far = e * near
    return tl.where(z < 0, far, near), near * far * (square * (3 * LINEAR * CUBIC) + LINEAR)


@triton.jit(do_not_specialize=RUN_TIME)
def _activation(
    dy,  # (M, D)
    x,
    bias,  # (D,)
    dx,  # (M, D), contiguous
    y,
    sums,  # (runs, D), float32
    rows,
    run,
    dy_m,
    x_m,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    SATURATED: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    which = tl.program_id(0).to(tl.int64)
    first = which // CHUNKS * run
    last = tl.minimum(first + run, rows)
    columns = (which % CHUNKS * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)[None, :]
    if bias is not None:
        biases = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    if sums is not None:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(first, last, ROWS):
        row = n + tl.arange(0, ROWS)[:, None].to(tl.int64)
        wanted = (row < last) & (columns < D)
        z = tl.load(x + tl.multiple_of(row * x_m, (1, UNIT)) + columns, mask=wanted, other=0.0).to(tl.float32)
        if bias is not None:
            z += biases
        sigmoid, slope = _sigmoid(z, LINEAR, CUBIC, SATURATED, LOG2_E)
        if y is not None:
            tl.store(y + row * D + columns, z * sigmoid, mask=wanted)
        if dy is not None:
            grad = tl.load(dy + tl.multiple_of(row * dy_m, (1, UNIT)) + columns, mask=wanted, other=0.0).to(tl.float32)
            grad *= z * slope + sigmoid
            tl.store(dx + row * D + columns, grad, mask=wanted)
            if sums is not None:
                total += grad
    if sums is not None:
        tl.store(sums + which // CHUNKS * D + columns, tl.sum(total, 0, keep_dims=True), mask=columns < D)


@triton.jit(do_not_specialize=["runs"])
def _sum_runs(partial, sums, runs, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(runs, D) -> (D,), in a fixed order."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, runs, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + row.to(tl.int64) * D + columns, mask=(row < runs) & (columns < D), other=0.0)
    tl.store(sums + columns, tl.sum(total, 0, keep_dims=True), mask=columns < D)


def run_length(rows: int, channels: int) -> int:
    """Return how many rows a program sums: the longest power of two that leaves enough programs."""
    run, chunks = LONGEST_RUN, triton.cdiv(channels, COLUMNS)
    while run > SHORTEST_RUN and triton.cdiv(rows, run) * chunks < ENOUGH_PROGRAMS:
        run //= 2
    return run


def _launch(
    dy: Tensor | None, x: Tensor, bias: Tensor | None, *, activation: bool, summed: bool
) -> tuple[Any, Any, Any]:
    """Return (dx, y, dbias), None where the operator has no such result."""
    rows, channels = x.shape
    dx = None if dy is None else x.new_empty(x.shape)
    y = x.new_empty(x.shape) if activation else None
    run = run_length(rows, channels) if summed else FORWARD_RUN
    runs = triton.cdiv(rows, run)
    partial = x.new_empty((runs, channels), dtype=torch.float32) if summed else None
    strides = (0 if dy is None else dy.stride(0), x.stride(0))
    with torch.cuda.device_of(x):
        if rows:
            _activation[(runs * triton.cdiv(channels, COLUMNS),)](
                dy, x, bias, dx, y, partial, rows, run, *strides, channels,
                UNIT=PACK if all(stride % PACK == 0 for stride in strides) else 1, ROWS=ROWS, COLUMNS=COLUMNS,
                LINEAR=LINEAR, CUBIC=CUBIC, SATURATED=SATURATED, LOG2_E=LOG2_E, num_warps=WARPS,
            )  # fmt: skip
        return dx, y, None if partial is None else _sum(partial)


def _sum(partial: Tensor) -> Tensor:
    runs, channels = partial.shape
    sums = partial.new_empty(channels)
    _sum_runs[(triton.cdiv(channels, SUM_COLUMNS),)](partial, sums, runs, channels, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS)
    return sums


def gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return GELU(x + bias)."""
    return _launch(None, x, bias, activation=True, summed=False)[1]


def gelu_tanh_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (dx, dbias), dbias (0,) without a bias."""
    dx, _, dbias = _launch(dy, x, bias, activation=False, summed=bias is not None)
    return dx, x.new_empty(0, dtype=torch.float32) if dbias is None else dbias


def gelu_mlp_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, GELU(x) again, the sum of dx over the rows)."""
    dx, y, dbias = _launch(dy, x, None, activation=True, summed=True)
    return dx, y, dbias

"""Clips (B, F, C, H, W) in Triton: which elements of which frames a program takes, and where they lie.

A program takes a run of TILE elements of one sample through some of its frames. Where a frame's elements lie one after
another, a clip's place is its strides (b, f) alone: those of c, h and w are None.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements
WARPS = 4
PACK = 8  # elements of a load: 16 bytes in 16 bits
NOISE_PACK = 4  # of one beside noise: as many as a Philox call draws, so that no element changes threads
ENOUGH_PROGRAMS = 1000  # two to three rounds of those that an A100 holds


@triton.jit
def part_of(frames, elements, together, blocks, TILE: tl.constexpr, UNIT: tl.constexpr):
    """Return (b, first frame, count of frames, first element, count of elements) of this program."""
    program = tl.program_id(0).to(tl.uint32)  # signed and 64-bit divisions are slow
    runs, blocks = runs_of(elements, TILE).to(tl.uint32), blocks.to(tl.uint32)
    block = program // runs
    first = (block % blocks).to(frames.dtype) * together
    start = tl.multiple_of((program % runs).to(elements.dtype) * TILE, TILE)
    count = tl.multiple_of(tl.minimum(elements - start, TILE), UNIT)
    return (block // blocks).to(tl.int64), first, tl.minimum(frames - first, together), start, count


@triton.jit
def runs_of(elements, TILE: tl.constexpr):
    """Return into how many runs a frame falls."""
    return (elements - 1) // TILE + 1


@triton.jit
def load_level(level, b, f, stride_b, stride_f):
    """Return a frame's value of (B, F), None of None."""
    if level is None:
        value = None
    else:
        value = tl.load(level + (b * stride_b + f.to(tl.int64) * stride_f))
    return value


@triton.jit
def load_part(clip, place, b, f, start, count, TILE: tl.constexpr, UNIT: tl.constexpr):
    """Return TILE elements of a frame, zero beyond the count; place is (b, f, c, h, w strides, H, W)."""
    stride_b, stride_f, stride_c, stride_h, stride_w, height, width = place
    lane = tl.arange(0, TILE)
    frame = b * stride_b + f.to(tl.int64) * stride_f
    if stride_c is None:
        places = clip + tl.multiple_of(frame + start, UNIT) + lane
    else:
        e = start + lane
        row = e // width
        c, h, w = (row // height).to(tl.int64), (row % height).to(tl.int64), (e % width).to(tl.int64)
        places = clip + frame + (c * stride_c + h * stride_h + w * stride_w)
    return tl.load(places, mask=lane < count, other=0.0)


@triton.jit
def store_part(clip, frame, elements, start, count, values, TILE: tl.constexpr, UNIT: tl.constexpr):
    """Round values to a contiguous clip's dtype and store them; ``frame`` is b * F + f."""
    lane = tl.arange(0, TILE)
    places = clip + tl.multiple_of(frame * elements + start, UNIT) + lane
    tl.store(places, values.to(clip.dtype.element_ty), mask=lane < count)


class Work(NamedTuple):
    """How the programs of a launch divide a clip; what :func:`part_of` is told."""

    frames: int
    elements: int
    together: int  # frames of a program
    blocks: int  # of frames in a sample


def programs_of(work: Work, batch: int) -> int:
    """Return how many programs take a clip."""
    return batch * work.blocks * triton.cdiv(work.elements, TILE)


def work_of(shape: Sequence[int], sharing: str) -> Work:
    """Divide a clip of a shape (B, F, ...): frames that share noise go to one program, while enough programs remain."""
    batch, frames, *rest = shape
    together = 1 if sharing == "independent" else max(frames, 1)
    work = Work(frames, math.prod(rest), together, triton.cdiv(frames, together))
    if sharing != "progressive":  # where a frame needs the one before
        while work.together > 1 and programs_of(work, batch) < ENOUGH_PROGRAMS:
            together = work.together // 2
            work = work._replace(together=together, blocks=triton.cdiv(frames, together))
    return work


class Place(NamedTuple):
    """A clip's strides."""

    b: int
    f: int
    c: int | None
    h: int | None
    w: int | None


def place_of(clip: Tensor | None) -> Place:
    """Return where a clip's elements lie; None has a place too."""
    if clip is None:
        return Place(0, 0, None, None, None)
    channels, height, width = clip.shape[2:]
    b, f, c, h, w = clip.stride()
    if (width < 2 or w == 1) and (height < 2 or h == width) and (channels < 2 or c == height * width):
        return Place(b, f, None, None, None)
    return Place(b, f, c, h, w)


def unit_of(elements: int, *places: Place, pack: int = NOISE_PACK) -> int:
    """Return how many neighbours may be loaded at once where the clips are dense."""
    strides = [stride for place in places if place.c is None for stride in (place.b, place.f)]
    return pack if all(size % pack == 0 for size in (elements, *strides)) else 1


def launch(kernel: Any, programs: int | tuple[int, int], like: Tensor, *args: Any, **options: Any) -> None:
    """Launch a kernel that rounds every operation by itself, where ``like`` lies."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    if math.prod(grid) > 0:
        with torch.cuda.device_of(like):
            kernel[grid](*args, **options, num_warps=WARPS, enable_fp_fusion=False)


def pair(level: Tensor | None) -> tuple[int, ...]:
    """Return the strides of (B, F), which None has too."""
    return (0, 0) if level is None else level.stride()

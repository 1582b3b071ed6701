"""The noise operators in Triton: a program draws a run of a sample's elements, frame by frame, beside what they meet.

Sums over a frame are a part from each of its runs, added up in their order by a second launch. Sizes, strides and the
division of the work are run-time values: a change of them compiles nothing. No result depends on the division.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidkern.ops.noise.triton_bound import decoder, distance_per_residual, divergence
from vidkern.ops.noise.triton_clips import (
    PACK,
    TILE,
    launch,
    load_level,
    load_part,
    pair,
    part_of,
    place_of,
    programs_of,
    runs_of,
    store_part,
    unit_of,
    work_of,
)
from vidkern.ops.noise.triton_generator import base_noise, fold_key, frame_noise, groups_of

BITS = tl.constexpr(1 / math.log(2))  # a nat
SLOPE_IN_BITS = tl.constexpr(0.5 / math.log(2))
SUM_TILE = 256  # runs

TABLES = ["mean_coef", "low", "high"]
PER_FRAME = ["key", "weight", "alpha", "sigma", "t", "dmse", "dvb", "slope", *TABLES]
RUN_TIME = ["key_stride", "first_sample", "frames", "elements", "together", "blocks", "height", "width", "steps"]
RUN_TIME += [f"{clip}_{axis}" for clip in ("x0", "dx_t", "dtarget", "pred", "residual") for axis in "bfchw"]
RUN_TIME += [f"{level}_{axis}" for level in PER_FRAME for axis in "bf"]
RUN_TIME += [f"{table}_stride" for table in TABLES]


@triton.jit
def _regressed(x, noise, alpha, sigma, KIND: tl.constexpr):
    if KIND == "epsilon":
        target = noise
    elif KIND == "v":
        target = alpha * noise - sigma * x
    elif KIND == "flow":
        target = noise - x
    else:
        target = x
    return target


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=PER_FRAME)
def _normal(
    key,
    weight,  # (B, F)
    out,  # (B, F, ...), contiguous
    key_stride,
    first_sample: tl.uint32,
    weight_b,
    weight_f,
    frames,
    elements,
    together,
    blocks,
    SHARING: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, first, taken, start, count = part_of(frames, elements, together, blocks, TILE, UNIT)
    k0, k1 = fold_key(key, key_stride)
    sample, groups = (first_sample + b).to(tl.uint32), groups_of(start, TILE)
    base = base_noise(groups, sample, None, k0, k1, SHARING)
    noise = tl.zeros((TILE,), tl.float32)
    for i in range(taken):
        f = first + i
        share = load_level(weight, b, f, weight_b, weight_f)
        noise = frame_noise(noise, base, groups, f, sample, None, k0, k1, share, SHARING)
        store_part(out, b * frames + f, elements, start, count, noise, TILE, UNIT)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=PER_FRAME)
def _add_noise(
    x0,  # (B, F, C, H, W)
    alpha,  # (B, F)
    sigma,
    key,
    weight,
    x_t,  # (B, F, C, H, W), contiguous
    target,
    x0_b,
    x0_f,
    x0_c,
    x0_h,
    x0_w,
    alpha_b,
    alpha_f,
    sigma_b,
    sigma_f,
    key_stride,
    first_sample: tl.uint32,
    weight_b,
    weight_f,
    frames,
    elements,
    together,
    blocks,
    height,
    width,
    TARGET: tl.constexpr,
    SHARING: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, first, taken, start, count = part_of(frames, elements, together, blocks, TILE, UNIT)
    k0, k1 = fold_key(key, key_stride)
    sample, groups = (first_sample + b).to(tl.uint32), groups_of(start, TILE)
    base = base_noise(groups, sample, None, k0, k1, SHARING)
    noise = tl.zeros((TILE,), tl.float32)
    x0_place = (x0_b, x0_f, x0_c, x0_h, x0_w, height, width)
    for i in range(taken):
        f = first + i
        x = load_part(x0, x0_place, b, f, start, count, TILE, UNIT).to(tl.float32)
        a = load_level(alpha, b, f, alpha_b, alpha_f)
        s = load_level(sigma, b, f, sigma_b, sigma_f)
        share = load_level(weight, b, f, weight_b, weight_f)
        noise = frame_noise(noise, base, groups, f, sample, None, k0, k1, share, SHARING)
        frame = b * frames + f
        store_part(x_t, frame, elements, start, count, a * x + s * noise, TILE, UNIT)
        if TARGET is not None:
            store_part(target, frame, elements, start, count, _regressed(x, noise, a, s, TARGET), TILE, UNIT)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=PER_FRAME)
def _add_noise_backward(
    dx_t,  # (B, F, C, H, W)
    dtarget,
    x0,
    alpha,  # (B, F)
    sigma,
    key,
    weight,
    dx0,  # (B, F, C, H, W), contiguous
    dalpha,  # (B, F, runs)
    dsigma,
    dx_t_b,
    dx_t_f,
    dx_t_c,
    dx_t_h,
    dx_t_w,
    dtarget_b,
    dtarget_f,
    dtarget_c,
    dtarget_h,
    dtarget_w,
    x0_b,
    x0_f,
    x0_c,
    x0_h,
    x0_w,
    alpha_b,
    alpha_f,
    sigma_b,
    sigma_f,
    key_stride,
    first_sample: tl.uint32,
    weight_b,
    weight_f,
    frames,
    elements,
    together,
    blocks,
    height,
    width,
    TARGET: tl.constexpr,
    SHARING: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, first, taken, start, count = part_of(frames, elements, together, blocks, TILE, UNIT)
    k0, k1 = fold_key(key, key_stride)
    sample, groups = (first_sample + b).to(tl.uint32), groups_of(start, TILE)
    base = base_noise(groups, sample, None, k0, k1, SHARING)
    noise = tl.zeros((TILE,), tl.float32)
    dx_t_place = (dx_t_b, dx_t_f, dx_t_c, dx_t_h, dx_t_w, height, width)
    dtarget_place = (dtarget_b, dtarget_f, dtarget_c, dtarget_h, dtarget_w, height, width)
    x0_place = (x0_b, x0_f, x0_c, x0_h, x0_w, height, width)
    for i in range(taken):
        f = first + i
        x = load_part(x0, x0_place, b, f, start, count, TILE, UNIT).to(tl.float32)
        a = load_level(alpha, b, f, alpha_b, alpha_f)
        s = load_level(sigma, b, f, sigma_b, sigma_f)
        share = load_level(weight, b, f, weight_b, weight_f)
        noise = frame_noise(noise, base, groups, f, sample, None, k0, k1, share, SHARING)
        dx = tl.zeros((TILE,), tl.float32)
        da = dx
        ds = dx
        if dx_t is not None:
            grad = load_part(dx_t, dx_t_place, b, f, start, count, TILE, UNIT).to(tl.float32)
            dx = a * grad
            da = grad * x
            ds = grad * noise
        if dtarget is not None:
            grad = load_part(dtarget, dtarget_place, b, f, start, count, TILE, UNIT).to(tl.float32)
            if TARGET == "v":
                dx = dx - s * grad
                da = da + grad * noise
                ds = ds - grad * x
            elif TARGET == "flow":
                dx = dx - grad
            elif TARGET == "x0":
                dx = dx + grad
        frame = b * frames + f
        store_part(dx0, frame, elements, start, count, dx, TILE, UNIT)
        part = frame * runs_of(elements, TILE) + start // TILE
        tl.store(dalpha + part, tl.sum(da))
        tl.store(dsigma + part, tl.sum(ds))


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=PER_FRAME)
def _mse(
    pred,  # (B, F, C, H, W)
    x0,
    alpha,  # (B, F)
    sigma,
    key,
    weight,
    residual,  # (B, F, C, H, W), contiguous
    mse,  # (B, F, runs)
    divisor,
    pred_b,
    pred_f,
    pred_c,
    pred_h,
    pred_w,
    x0_b,
    x0_f,
    x0_c,
    x0_h,
    x0_w,
    alpha_b,
    alpha_f,
    sigma_b,
    sigma_f,
    key_stride,
    first_sample: tl.uint32,
    weight_b,
    weight_f,
    frames,
    elements,
    together,
    blocks,
    height,
    width,
    PREDICTION: tl.constexpr,
    SHARING: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, first, taken, start, count = part_of(frames, elements, together, blocks, TILE, UNIT)
    k0, k1 = fold_key(key, key_stride)
    sample, groups = (first_sample + b).to(tl.uint32), groups_of(start, TILE)
    base = base_noise(groups, sample, None, k0, k1, SHARING)
    noise = tl.zeros((TILE,), tl.float32)
    pred_place = (pred_b, pred_f, pred_c, pred_h, pred_w, height, width)
    x0_place = (x0_b, x0_f, x0_c, x0_h, x0_w, height, width)
    inside = tl.arange(0, TILE) < count
    for i in range(taken):
        f = first + i
        out = load_part(pred, pred_place, b, f, start, count, TILE, UNIT).to(tl.float32)
        x = out
        if PREDICTION != "epsilon":
            x = load_part(x0, x0_place, b, f, start, count, TILE, UNIT).to(tl.float32)
        a = load_level(alpha, b, f, alpha_b, alpha_f)
        s = load_level(sigma, b, f, sigma_b, sigma_f)
        share = load_level(weight, b, f, weight_b, weight_f)
        noise = frame_noise(noise, base, groups, f, sample, None, k0, k1, share, SHARING)
        r = out - _regressed(x, noise, a, s, PREDICTION)
        frame = b * frames + f
        store_part(residual, frame, elements, start, count, r, TILE, UNIT)
        squares = tl.sum(tl.where(inside, r * r, 0.0))
        tl.store(mse + (frame * runs_of(elements, TILE) + start // TILE), tl.div_rn(squares, divisor))


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=PER_FRAME)
def _mse_backward(
    dmse,  # (B, F)
    residual,  # (B, F, C, H, W)
    dpred,  # (B, F, C, H, W), contiguous
    factor,
    dmse_b,
    dmse_f,
    residual_b,
    residual_f,
    residual_c,
    residual_h,
    residual_w,
    frames,
    elements,
    together,
    blocks,
    height,
    width,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, f, _, start, count = part_of(frames, elements, together, blocks, TILE, UNIT)
    place = (residual_b, residual_f, residual_c, residual_h, residual_w, height, width)
    r = load_part(residual, place, b, f, start, count, TILE, UNIT).to(tl.float32)
    scale = load_level(dmse, b, f, dmse_b, dmse_f) * factor
    store_part(dpred, b * frames + f, elements, start, count, scale * r, TILE, UNIT)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=PER_FRAME)
def _hybrid_loss(
    pred,  # (B, F, C, H, W), the first half of a model's channels
    fraction,  # the second half
    x0,
    alpha,  # (B, F)
    sigma,
    t,
    mean_coef,  # (T)
    low,
    high,
    key,
    weight,
    factors,  # (B, F, 2C, H, W), contiguous
    slope,  # (B, F), contiguous
    mse,  # (B, F, runs)
    vb,
    divisor,
    pred_b,
    pred_f,
    pred_c,
    pred_h,
    pred_w,
    x0_b,
    x0_f,
    x0_c,
    x0_h,
    x0_w,
    alpha_b,
    alpha_f,
    sigma_b,
    sigma_f,
    t_b,
    t_f,
    mean_coef_stride,
    low_stride,
    high_stride,
    steps,
    key_stride,
    first_sample: tl.uint32,
    weight_b,
    weight_f,
    frames,
    elements,
    together,
    blocks,
    height,
    width,
    PREDICTION: tl.constexpr,
    SHARING: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, first, taken, start, count = part_of(frames, elements, together, blocks, TILE, UNIT)
    k0, k1 = fold_key(key, key_stride)
    sample, groups = (first_sample + b).to(tl.uint32), groups_of(start, TILE)
    base = base_noise(groups, sample, None, k0, k1, SHARING)
    noise = tl.zeros((TILE,), tl.float32)
    pred_place = (pred_b, pred_f, pred_c, pred_h, pred_w, height, width)
    x0_place = (x0_b, x0_f, x0_c, x0_h, x0_w, height, width)
    inside = tl.arange(0, TILE) < count
    for i in range(taken):
        f = first + i
        out = load_part(pred, pred_place, b, f, start, count, TILE, UNIT).to(tl.float32)
        v = load_part(fraction, pred_place, b, f, start, count, TILE, UNIT).to(tl.float32)
        x = out
        if PREDICTION != "epsilon":
            x = load_part(x0, x0_place, b, f, start, count, TILE, UNIT).to(tl.float32)
        a = load_level(alpha, b, f, alpha_b, alpha_f)
        s = load_level(sigma, b, f, sigma_b, sigma_f)
        share = load_level(weight, b, f, weight_b, weight_f)
        noise = frame_noise(noise, base, groups, f, sample, None, k0, k1, share, SHARING)
        r = out - _regressed(x, noise, a, s, PREDICTION)

        step = tl.minimum(tl.maximum(load_level(t, b, f, t_b, t_f), 0), steps - 1)
        log_low = tl.load(low + step * low_stride)
        half_range = (tl.load(high + step * high_stride) - log_low) * 0.5
        distance = tl.load(mean_coef + step * mean_coef_stride) * distance_per_residual(a, s, PREDICTION) * r
        excess = (v + 1.0) * half_range
        if step == 0:
            if PREDICTION == "epsilon":
                x = load_part(x0, x0_place, b, f, start, count, TILE, UNIT).to(tl.float32)
            bound, bound_slope = decoder(x, distance, (log_low + excess) * 0.5)
        else:
            bound, bound_slope = divergence(distance, log_low, excess)

        frame = b * frames + f
        store_part(factors, 2 * frame, elements, start, count, r, TILE, UNIT)
        store_part(factors, 2 * frame + 1, elements, start, count, bound_slope, TILE, UNIT)
        tl.store(slope + frame, half_range * SLOPE_IN_BITS, mask=start == 0)
        part = frame * runs_of(elements, TILE) + start // TILE
        tl.store(mse + part, tl.div_rn(tl.sum(tl.where(inside, r * r, 0.0)), divisor))
        tl.store(vb + part, tl.div_rn(tl.sum(tl.where(inside, bound, 0.0)) * BITS, divisor))


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=PER_FRAME)
def _hybrid_loss_backward(
    dmse,  # (B, F)
    dvb,
    residual,  # (B, F, C, H, W), the factors' first half
    bound_slope,  # the second half
    slope,  # (B, F)
    dout,  # (B, F, 2C, H, W), contiguous
    factor,
    divisor,
    dmse_b,
    dmse_f,
    dvb_b,
    dvb_f,
    residual_b,
    residual_f,
    residual_c,
    residual_h,
    residual_w,
    slope_b,
    slope_f,
    frames,
    elements,
    together,
    blocks,
    height,
    width,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, f, _, start, count = part_of(frames, elements, together, blocks, TILE, UNIT)
    place = (residual_b, residual_f, residual_c, residual_h, residual_w, height, width)
    of_pred = load_part(residual, place, b, f, start, count, TILE, UNIT).to(tl.float32)
    of_fraction = load_part(bound_slope, place, b, f, start, count, TILE, UNIT).to(tl.float32)
    dpred = load_level(dmse, b, f, dmse_b, dmse_f) * factor
    dfraction = load_level(dvb, b, f, dvb_b, dvb_f) * load_level(slope, b, f, slope_b, slope_f)
    frame = 2 * (b * frames + f)
    store_part(dout, frame, elements, start, count, dpred * of_pred, TILE, UNIT)
    store_part(dout, frame + 1, elements, start, count, tl.div_rn(dfraction, divisor) * of_fraction, TILE, UNIT)


@triton.jit(do_not_specialize=["runs"])
def _sum_runs(parts, totals, divisor, runs, SUM_TILE: tl.constexpr):
    """(B, F, runs) -> (B, F), for each of the tensors."""
    frame = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(len(totals)):
        if tl.program_id(1) == k:
            sums = tl.zeros((SUM_TILE,), tl.float32)
            for first in range(0, runs, SUM_TILE):
                run = first + tl.arange(0, SUM_TILE)
                sums += tl.load(parts[k] + (frame * runs + run), mask=run < runs, other=0.0)
            tl.store(totals[k] + frame, tl.div_rn(tl.sum(sums), divisor))


class FrameSums:
    """Sums over each frame of a clip, float32 (B, F): every run's part, and its total."""

    def __init__(self, clip: Tensor, count: int) -> None:
        """``count`` tensors of sums; where a frame is one run, its part is the total."""
        batch, frames, *rest = clip.shape
        self.runs = triton.cdiv(math.prod(rest), TILE)
        self.totals = tuple(clip.new_empty((batch, frames), dtype=torch.float32) for _ in range(count))
        self.parts = self.totals
        if self.runs != 1:
            self.parts = tuple(clip.new_empty((batch, frames, self.runs), dtype=torch.float32) for _ in range(count))

    def add_up(self, divisor: float) -> tuple[Tensor, ...]:
        """Return the totals over the divisor, which the part has where it is the total."""
        if self.runs != 1:
            first = self.totals[0]
            grid = first.numel(), len(self.totals)
            launch(_sum_runs, grid, first, self.parts, self.totals, divisor, self.runs, SUM_TILE=SUM_TILE)
        return self.totals


def philox_normal(
    shape: Sequence[int],
    key: Tensor,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return standard normal noise of a shape (B, F, ...)."""
    out = key.new_empty(shape, dtype=dtype)
    work = work_of(shape, sharing)
    launch(
        _normal,
        programs_of(work, shape[0]),
        key,
        *(key, base_weight, out, key.stride(0), sample_offset, *pair(base_weight), *work),
        SHARING=sharing,
        TILE=TILE,
        UNIT=unit_of(work.elements),
    )
    return out


def add_noise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    target: str | None,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """Return (x_t, the regression target, which has no elements where none is asked for)."""
    x_t, regressed = x0.new_empty(x0.shape), x0.new_empty(0 if target is None else x0.shape)
    work, place = work_of(x0.shape, sharing), place_of(x0)
    launch(
        _add_noise,
        programs_of(work, x0.shape[0]),
        x0,
        *(x0, alpha, sigma, key, base_weight, x_t, None if target is None else regressed),
        *(*place, *alpha.stride(), *sigma.stride(), key.stride(0), sample_offset, *pair(base_weight)),
        *(*work, *x0.shape[3:]),
        TARGET=target,
        SHARING=sharing,
        TILE=TILE,
        UNIT=unit_of(work.elements, place),
    )
    return x_t, regressed


def add_noise_backward(
    dx_t: Tensor | None,
    dtarget: Tensor | None,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    target: str | None,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx0, dalpha, dsigma)."""
    dx0, sums = x0.new_empty(x0.shape), FrameSums(x0, 2)
    work, places = work_of(x0.shape, sharing), [place_of(clip) for clip in (dx_t, dtarget, x0)]
    launch(
        _add_noise_backward,
        programs_of(work, x0.shape[0]),
        x0,
        *(dx_t, dtarget, x0, alpha, sigma, key, base_weight, dx0, *sums.parts),
        *(stride for place in places for stride in place),
        *(*alpha.stride(), *sigma.stride(), key.stride(0), sample_offset, *pair(base_weight), *work, *x0.shape[3:]),
        TARGET=target,
        SHARING=sharing,
        TILE=TILE,
        UNIT=unit_of(work.elements, *places),
    )
    dalpha, dsigma = sums.add_up(1.0)
    return dx0, dalpha, dsigma


def diffusion_mse(
    pred: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    prediction: str,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """Return (mean of (pred - target)^2 over each frame, pred - target)."""
    residual, sums = pred.new_empty(pred.shape), FrameSums(pred, 1)
    work, places = work_of(pred.shape, sharing), [place_of(clip) for clip in (pred, x0)]
    elements = float(work.elements)
    launch(
        _mse,
        programs_of(work, pred.shape[0]),
        pred,
        *(pred, x0, alpha, sigma, key, base_weight, residual, *sums.parts, elements if sums.runs == 1 else 1.0),
        *(stride for place in places for stride in place),
        *(*alpha.stride(), *sigma.stride(), key.stride(0), sample_offset, *pair(base_weight), *work, *x0.shape[3:]),
        PREDICTION=prediction,
        SHARING=sharing,
        TILE=TILE,
        UNIT=unit_of(work.elements, *places),
    )
    return sums.add_up(elements)[0], residual


def diffusion_mse_backward(dmse: Tensor, residual: Tensor) -> Tensor:
    """Return dpred = 2 / (C H W) * dmse * residual."""
    dpred, place = residual.new_empty(residual.shape), place_of(residual)
    work = work_of(residual.shape, "independent")
    launch(
        _mse_backward,
        programs_of(work, residual.shape[0]),
        residual,
        *(dmse, residual, dpred, 2.0 / max(work.elements, 1), *dmse.stride(), *place, *work, *residual.shape[3:]),
        TILE=TILE,
        UNIT=unit_of(work.elements, place, pack=PACK),
    )
    return dpred


def hybrid_loss(
    model_out: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    t: Tensor,
    posterior_mean_coef: Tensor,
    posterior_log_variance: Tensor,
    log_beta: Tensor,
    key: Tensor,
    prediction: str,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (mse, vb, factors, slope)."""
    pred, fraction = model_out.chunk(2, 2)
    tables = posterior_mean_coef, posterior_log_variance, log_beta
    factors, sums = model_out.new_empty(model_out.shape), FrameSums(x0, 2)
    slope = x0.new_empty(x0.shape[:2], dtype=torch.float32)
    work, places = work_of(x0.shape, sharing), [place_of(clip) for clip in (pred, x0)]
    elements = float(work.elements)
    launch(
        _hybrid_loss,
        programs_of(work, x0.shape[0]),
        x0,
        *(pred, fraction, x0, alpha, sigma, t, *tables, key, base_weight, factors, slope, *sums.parts),
        elements if sums.runs == 1 else 1.0,
        *(stride for place in places for stride in place),
        *(*alpha.stride(), *sigma.stride(), *t.stride(), *(table.stride(0) for table in tables), log_beta.numel()),
        *(key.stride(0), sample_offset, *pair(base_weight), *work, *x0.shape[3:]),
        PREDICTION=prediction,
        SHARING=sharing,
        TILE=TILE,
        UNIT=unit_of(work.elements, *places),
    )
    mse, vb = sums.add_up(elements)
    return mse, vb, factors, slope


def hybrid_loss_backward(dmse: Tensor, dvb: Tensor, factors: Tensor, slope: Tensor) -> Tensor:
    """Return dmodel_out = [2 dmse, dvb * slope] / (C H W) * factors, for the two halves of the channels."""
    residual, bound_slope = factors.chunk(2, 2)
    dout, place = factors.new_empty(factors.shape), place_of(residual)
    work = work_of(residual.shape, "independent")
    elements = max(work.elements, 1)
    launch(
        _hybrid_loss_backward,
        programs_of(work, factors.shape[0]),
        factors,
        *(dmse, dvb, residual, bound_slope, slope, dout, 2.0 / elements, float(elements)),
        *(*dmse.stride(), *dvb.stride(), *place, *slope.stride(), *work, *factors.shape[3:]),
        TILE=TILE,
        UNIT=unit_of(work.elements, place, pack=PACK),
    )
    return dout

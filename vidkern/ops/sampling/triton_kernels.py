"""The sampler's steps in Triton, one launch each: guidance, x0, the step, its noise and the hold.

A program takes a run of a sample's elements through some of its frames, as the noise operators' do. The numbers of a
frame come from the schedule's entries at its timesteps, in the kernel and in the definition's order of operations.
"""

import triton
import triton.language as tl
from torch import Tensor

from vidkern.ops.noise.triton_clips import (
    NOISE_PACK,
    PACK,
    TILE,
    launch,
    load_level,
    load_part,
    pair,
    part_of,
    place_of,
    programs_of,
    store_part,
    unit_of,
    work_of,
)
from vidkern.ops.noise.triton_generator import base_noise, fold_key, frame_noise, groups_of

FRAMES_AT_ONCE = tl.constexpr(64)  # whose timesteps are compared

RUN_TIME = ["table_stride", "key_stride", "first_sample", "frames", "elements", "together", "blocks", "height", "width"]
RUN_TIME += [f"{clip}_{axis}" for clip in ("x", "out") for axis in "bfchw"]
RUN_TIME += [f"{level}_{axis}" for level in ("t", "t_prev", "hold", "weight") for axis in "bf"]
PER_FRAME = ["t", "t_prev", "table", "hold", "key", "weight"]


@triton.jit
def _entry(table, stride, t, CLEAN: tl.constexpr):
    return tl.where(t < 0, CLEAN, tl.load(table + tl.maximum(t, 0) * stride))


@triton.jit
def _latest(t, b, frames, stride_b, stride_f):
    """Return the largest of a sample's timesteps."""
    row = t + b * stride_b
    first = tl.load(row)
    latest = first
    for start in range(0, frames, FRAMES_AT_ONCE):
        f = start + tl.arange(0, FRAMES_AT_ONCE)
        steps = tl.load(row + f.to(tl.int64) * stride_f, mask=f < frames, other=first)
        latest = tl.maximum(latest, tl.max(steps))
    return latest


@triton.jit
def _clamped(x0, clip):
    if clip is not None:
        x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    return x0


@triton.jit
def _predicted_x0(x, out, abar, clip, PREDICTION: tl.constexpr):
    alpha, sigma = tl.sqrt_rn(abar), tl.sqrt_rn(1.0 - abar)
    if PREDICTION == "epsilon":
        out = tl.div_rn(1.0, alpha) * (x - sigma * out)
    elif PREDICTION == "v":
        out = alpha * x - sigma * out
    return _clamped(out, clip)


@triton.jit
def _predicted_epsilon(x, out, x0, abar, clip, PREDICTION: tl.constexpr):
    alpha, sigma = tl.sqrt_rn(abar), tl.sqrt_rn(1.0 - abar)
    if clip is None and PREDICTION == "epsilon":
        epsilon = out
    elif clip is None and PREDICTION == "v":
        epsilon = alpha * out + sigma * x
    else:
        epsilon = tl.div_rn(1.0, sigma) * (x - alpha * x0)
    return epsilon


@triton.jit
def _ddim(x, out, abar, abar_prev, eta_squared, noise, clip, PREDICTION: tl.constexpr):
    x0 = _predicted_x0(x, out, abar, clip, PREDICTION)
    epsilon = _predicted_epsilon(x, out, x0, abar, clip, PREDICTION)
    share = eta_squared * tl.div_rn(abar_prev - abar, abar_prev * (1.0 - abar))  # of the variance 1 - abar_prev, new
    direction = tl.sqrt_rn((1.0 - abar_prev) * tl.maximum(1.0 - share, 0.0, propagate_nan=tl.PropagateNan.ALL))
    x_prev = tl.sqrt_rn(abar_prev) * x0 + direction * epsilon
    if noise is not None:
        x_prev = x_prev + tl.sqrt_rn((1.0 - abar_prev) * share) * noise
    return x_prev


@triton.jit
def _ddpm(x, out, learned, abar, abar_prev, noise, clip, PREDICTION: tl.constexpr, VARIANCE: tl.constexpr):
    beta = tl.div_rn(abar_prev - abar, abar_prev)
    shrink = tl.div_rn(1.0 - abar_prev, 1.0 - abar)
    x0_weight = tl.div_rn(beta * tl.sqrt_rn(abar_prev), 1.0 - abar)
    x_weight = tl.sqrt_rn(tl.div_rn(abar, abar_prev)) * shrink
    mean = x0_weight * _predicted_x0(x, out, abar, clip, PREDICTION) + x_weight * x
    posterior = beta * shrink
    if VARIANCE == "learned_range":
        fraction = (learned + 1.0) * 0.5
        log_low, log_high = tl.log(posterior), tl.log(beta)
        std = tl.exp(0.5 * (log_low + fraction * (log_high - log_low)))
    elif VARIANCE == "fixed_small":
        std = tl.sqrt_rn(posterior)
    else:
        std = tl.sqrt_rn(beta)
    return tl.where(posterior > 0, mean + std * noise, mean)  # the last step adds none


@triton.jit
def _flow(x, out, sigma, sigma_prev, clip, PREDICTION: tl.constexpr):
    if PREDICTION == "flow" and clip is None:
        velocity = out
    else:
        x0 = _clamped(x - sigma * out if PREDICTION == "flow" else out, clip)
        velocity = tl.div_rn(1.0, sigma) * (x - x0)
    return x + (sigma_prev - sigma) * velocity


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=PER_FRAME)
def _step(
    x_t,  # (B, F, C, H, W)
    cond,
    uncond,
    learned,  # the variance's channels
    t,  # (B, F)
    t_prev,
    table,  # (T)
    hold,  # (B, F)
    key,
    weight,
    x_prev,  # (B, F, C, H, W), contiguous
    guidance,
    clip,
    eta_squared,
    x_b,
    x_f,
    x_c,
    x_h,
    x_w,
    out_b,
    out_f,
    out_c,
    out_h,
    out_w,
    t_b,
    t_f,
    t_prev_b,
    t_prev_f,
    table_stride,
    hold_b,
    hold_f,
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
    METHOD: tl.constexpr,
    PREDICTION: tl.constexpr,
    VARIANCE: tl.constexpr,
    SHARING: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, first, taken, start, count = part_of(frames, elements, together, blocks, TILE, UNIT)
    x_place = (x_b, x_f, x_c, x_h, x_w, height, width)
    out_place = (out_b, out_f, out_c, out_h, out_w, height, width)
    noise = None
    if key is not None:
        k0, k1 = fold_key(key, key_stride)
        sample, groups = (first_sample + b).to(tl.uint32), groups_of(start, TILE)
        latest = _latest(t, b, frames, t_b, t_f)
        base = base_noise(groups, sample, latest, k0, k1, SHARING)
        noise = tl.zeros((TILE,), tl.float32)
    for i in range(taken):
        f = first + i
        x_in = load_part(x_t, x_place, b, f, start, count, TILE, UNIT)
        out = load_part(cond, out_place, b, f, start, count, TILE, UNIT).to(tl.float32)
        if uncond is not None:
            without = load_part(uncond, out_place, b, f, start, count, TILE, UNIT).to(tl.float32)
            out = without + guidance * (out - without)
        step = load_level(t, b, f, t_b, t_f)
        step_prev = load_level(t_prev, b, f, t_prev_b, t_prev_f)
        keep = step < 0
        if hold is not None:
            keep = keep | load_level(hold, b, f, hold_b, hold_f)
        if key is not None:
            share = load_level(weight, b, f, weight_b, weight_f)
            noise = frame_noise(noise, base, groups, f, sample, step, k0, k1, share, SHARING)
        x = x_in.to(tl.float32)
        if METHOD == "flow":
            sigma = _entry(table, table_stride, step, 0.0)
            moved = _flow(x, out, sigma, _entry(table, table_stride, step_prev, 0.0), clip, PREDICTION)
        else:
            abar = _entry(table, table_stride, step, 1.0)
            abar_prev = _entry(table, table_stride, step_prev, 1.0)
            if METHOD == "ddim":
                moved = _ddim(x, out, abar, abar_prev, eta_squared, noise, clip, PREDICTION)
            else:
                channels = None
                if learned is not None:
                    channels = load_part(learned, out_place, b, f, start, count, TILE, UNIT).to(tl.float32)
                moved = _ddpm(x, out, channels, abar, abar_prev, noise, clip, PREDICTION, VARIANCE)
        moved = tl.where(keep, x_in, moved.to(x_in.dtype))
        store_part(x_prev, b * frames + f, elements, start, count, moved, TILE, UNIT)


def _launch(
    method: str,
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    table: Tensor,
    prediction: str,
    guidance_scale: float | None,
    hold: Tensor | None,
    clip_x0: float | None,
    *,
    eta: float = 0.0,
    variance: str | None = None,
    key: Tensor | None = None,
    sharing: str = "independent",
    base_weight: Tensor | None = None,
    sample_offset: int = 0,
) -> Tensor:
    batch, _, channels, *size = x_t.shape
    out = model_out[:batch, :, :channels]
    uncond = None if guidance_scale is None else model_out[batch:, :, :channels]
    learned = model_out[:batch, :, channels:] if variance == "learned_range" else None
    x_prev = x_t.new_empty(x_t.shape)
    work, places = work_of(x_t.shape, sharing), (place_of(x_t), place_of(out))
    launch(
        _step,
        programs_of(work, batch),
        x_t,
        *(x_t, out, uncond, learned, t, t_prev, table, hold, key, base_weight, x_prev),
        *(guidance_scale, clip_x0, eta**2),
        *(stride for place in places for stride in place),
        *(*t.stride(), *t_prev.stride(), table.stride(0), *pair(hold)),
        *(0 if key is None else key.stride(0), sample_offset, *pair(base_weight), *work, *size),
        METHOD=method,
        PREDICTION=prediction,
        VARIANCE=variance,
        SHARING=sharing,
        TILE=TILE,
        UNIT=unit_of(work.elements, *places, pack=PACK if key is None else NOISE_PACK),
    )
    return x_prev


def ddim_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    alphas_cumprod: Tensor,
    prediction: str,
    eta: float,
    key: Tensor | None,
    guidance_scale: float | None,
    hold: Tensor | None,
    clip_x0: float | None,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> Tensor:
    """Return sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps + s n."""
    step = x_t, model_out, t, t_prev, alphas_cumprod, prediction, guidance_scale, hold, clip_x0
    if eta == 0:
        return _launch("ddim", *step)
    return _launch(
        "ddim", *step, eta=eta, key=key, sharing=sharing, base_weight=base_weight, sample_offset=sample_offset
    )


def ddpm_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    alphas_cumprod: Tensor,
    prediction: str,
    variance: str,
    key: Tensor,
    guidance_scale: float | None,
    hold: Tensor | None,
    clip_x0: float | None,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
) -> Tensor:
    """Return a draw from p(x_prev | x_t)."""
    return _launch(
        "ddpm",
        *(x_t, model_out, t, t_prev, alphas_cumprod, prediction, guidance_scale, hold, clip_x0),
        variance=variance,
        key=key,
        sharing=sharing,
        base_weight=base_weight,
        sample_offset=sample_offset,
    )


def flow_step(
    x_t: Tensor,
    model_out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    sigma: Tensor,
    prediction: str,
    guidance_scale: float | None,
    hold: Tensor | None,
    clip_x0: float | None,
) -> Tensor:
    """Return x_t + (sigma' - sigma) v."""
    return _launch("flow", x_t, model_out, t, t_prev, sigma, prediction, guidance_scale, hold, clip_x0)

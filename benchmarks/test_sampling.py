"""A sampler's step with classifier-free guidance, against the usual arithmetic: gathered tables, then term by term."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vidkern
from benchmarks.environment import default_device
from benchmarks.harness import Problem
from benchmarks.sample_clock import sample_clock
from vidkern import ops
from vidkern.diffusion import make_schedule

pytestmark = pytest.mark.benchmark(group="sampling", timer=sample_clock)

ON_GPU = default_device().type == "cuda"
NUM_STEPS = 1000
SCALE = 4.0


@dataclass(frozen=True)
class Clips:
    """A named clip tensor (B, F, C, H, W)."""

    name: str
    shape: tuple[int, int, int, int, int]


LATTE = Clips("Latte 16x256x256", (4, 16, 4, 32, 32))
# latents of Wan2.1 at 81 x 720 x 1280; a CPU gets 17 frames of video at 480 x 832
WAN = Clips("Wan 81x720p", (1, 21, 16, 90, 160)) if ON_GPU else Clips("Wan 17x480p", (1, 5, 16, 60, 104))

# --- public code's steps, eager (ADM, DiT; flow matching as in diffusers), with a timestep per frame ---


def guided(model_out: Tensor) -> Tensor:
    """Return the guided prediction of a batch (conditional, unconditional) of 2C channels."""
    cond, uncond = model_out.chunk(2, dim=2)[0].chunk(2)
    return uncond + SCALE * (cond - uncond)


def at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """Gather a table of the schedule at t (B, F), to stand beside a clip in its dtype."""
    return table[t][:, :, None, None, None].to(x.dtype)


def usual_ddim(x: Tensor, model_out: Tensor, t: Tensor, t_prev: Tensor, abar: Tensor, key: Tensor) -> Tensor:
    """Public code takes epsilon anew from x_0; at eta = 0 it draws noise and multiplies it by 0, which is left out."""
    inverse_alpha, sigma_over_alpha = at((1 / abar).sqrt(), t, x), at((1 / abar - 1).sqrt(), t, x)
    x0 = inverse_alpha * x - sigma_over_alpha * guided(model_out)
    epsilon = (inverse_alpha * x - x0) / sigma_over_alpha
    return at(abar.sqrt(), t_prev, x) * x0 + at((1 - abar).sqrt(), t_prev, x) * epsilon


def usual_ddpm(x: Tensor, model_out: Tensor, t: Tensor, t_prev: Tensor, abar: Tensor, key: Tensor) -> Tensor:
    now, before = abar[t], abar[t_prev]
    beta, shrink = 1 - now / before, (1 - before) / (1 - now)
    frame = {
        "x_in_x0": (1 / now).sqrt(),
        "epsilon_in_x0": (1 / now - 1).sqrt(),
        "low": (beta * shrink).log(),
        "high": beta.log(),
        "x0_in_mean": beta * before.sqrt() / (1 - now),
        "x_in_mean": (1 - beta).sqrt() * shrink,
    }
    c = SimpleNamespace(**{name: level[:, :, None, None, None].to(x.dtype) for name, level in frame.items()})
    share = (model_out.chunk(2, dim=2)[1].chunk(2)[0] + 1) / 2
    log_variance = share * c.high + (1 - share) * c.low
    x0 = c.x_in_x0 * x - c.epsilon_in_x0 * guided(model_out)
    mean = c.x0_in_mean * x0 + c.x_in_mean * x
    return mean + torch.exp(0.5 * log_variance) * torch.randn_like(x)


def usual_flow(x: Tensor, model_out: Tensor, t: Tensor, t_prev: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    return x + (at(sigma, t_prev, x) - at(sigma, t, x)) * guided(model_out)


# --- ours, of the same arguments ---


def ours_ddim(x: Tensor, model_out: Tensor, t: Tensor, t_prev: Tensor, abar: Tensor, key: Tensor) -> Tensor:
    schedule = SimpleNamespace(alphas_cumprod=abar)
    return ops.ddim_step(x, model_out, t, t_prev, schedule, guidance_scale=SCALE)


def ours_ddpm(x: Tensor, model_out: Tensor, t: Tensor, t_prev: Tensor, abar: Tensor, key: Tensor) -> Tensor:
    schedule = SimpleNamespace(alphas_cumprod=abar)
    return ops.ddpm_step(x, model_out, t, t_prev, schedule, guidance_scale=SCALE, key=key)


def ours_flow(x: Tensor, model_out: Tensor, t: Tensor, t_prev: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    return ops.flow_step(x, model_out, t, t_prev, SimpleNamespace(sigma=sigma), guidance_scale=SCALE)


STEPS = {
    "ddim_step": (ours_ddim, usual_ddim),
    "ddpm_step": (ours_ddpm, usual_ddpm),
    "flow_step": (ours_flow, usual_flow),
}


def step_problem(name: str, clips: Clips, dtype: torch.dtype) -> Problem:
    """Return a step from random timesteps of each frame, x_t and the model's output in one dtype."""
    ours, plain = STEPS[name]
    batch, frames, channels, *size = clips.shape
    flow = name == "flow_step"

    def make_inputs(device: torch.device) -> list[Tensor]:
        schedule = make_schedule("flow" if flow else "linear", num_steps=NUM_STEPS, device=device)
        t = torch.randint(100, NUM_STEPS, (batch, frames), device=device)
        return [
            torch.randn(clips.shape, device=device).to(dtype),
            torch.randn(2 * batch, frames, 2 * channels, *size, device=device).to(dtype),
            t,
            t - 20,
            schedule.sigma if flow else schedule.alphas_cumprod,
            torch.randint(2**62, (2,), device=device),
        ]

    def definition(*inputs: Tensor) -> Tensor:
        with vidkern.backend("reference"):
            return ours(*inputs)

    passes = 5 if name == "ddpm_step" else 4  # x_t, the prediction's halves, x_prev, and the variance
    return Problem(
        family="sampling",
        operator=name,
        shape_name=clips.name,
        shape=clips.shape,
        dtype=dtype,
        backward=False,
        ours=ours,
        plain=plain,
        definition=definition,
        make_inputs=make_inputs,
        traffic_bytes=passes * torch.Size(clips.shape).numel() * dtype.itemsize,
    )


def problems() -> list[Problem]:
    """Return what is timed, the most telling first: a run may be cut short."""
    return [
        step_problem(name, clips, dtype)
        for clips, dtype in ((LATTE, torch.float32), (WAN, torch.bfloat16), (LATTE, torch.bfloat16))
        for name in STEPS
    ]


def small_problems() -> list[Problem]:
    """Return a small, ragged case of every kernel: what compute-sanitizer runs."""
    clips = Clips("ragged", (2, 3, 5, 11, 23))
    return [step_problem(name, clips, dtype) for name in STEPS for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_speed(problem: Problem, measured: Any) -> None:
    measured(problem)

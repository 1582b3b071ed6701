"""Noise: drawing it, diffusing clips with it and the loss on it, against torch.randn and the usual arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vidkern
from benchmarks.baselines.plain_diffusion import PlainDiffusion
from benchmarks.environment import default_device
from benchmarks.harness import Problem
from benchmarks.sample_clock import sample_clock
from vidkern import ops
from vidkern.diffusion import make_schedule
from vidkern.ops.noise import reference

pytestmark = pytest.mark.benchmark(group="noise", timer=sample_clock)

ON_GPU = default_device().type == "cuda"
SHARING = ("independent", "shared", "mixed", "progressive")
WEIGHT = 0.5


@dataclass(frozen=True)
class Clips:
    """A named clip tensor (B, F, C, H, W)."""

    name: str
    shape: tuple[int, int, int, int, int]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


LATTE = Clips("Latte 16x256x256", (4, 16, 4, 32, 32))
# latents of Wan2.1 at 81 x 720 x 1280; a CPU gets 17 frames of video at 480 x 832
WAN = Clips("Wan 81x720p", (1, 21, 16, 90, 160)) if ON_GPU else Clips("Wan 17x480p", (1, 5, 16, 60, 104))


def make_key(device: torch.device) -> Tensor:
    return torch.randint(2**62, (2,), device=device)


def make_levels(clips: Clips, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma (B, F), float32."""
    sigma = torch.rand(clips.shape[:2], device=device)
    return (1 - sigma.square()).sqrt(), sigma


def weight_of(sharing: str, x0: Tensor) -> Tensor | None:
    """Return base_weight (B, F) where the mode has one."""
    if sharing not in ("mixed", "progressive"):
        return None
    return torch.full(x0.shape[:2], WEIGHT, device=x0.device)


def usual_noise(x0: Tensor, sharing: str) -> Tensor:
    """Draw noise of a clip's shape as public code does, with torch's generator."""
    if sharing == "independent":
        return torch.randn_like(x0)
    if sharing == "shared":
        return torch.randn_like(x0[:, :1]).expand(x0.shape)
    own = torch.randn_like(x0)
    if sharing == "mixed":
        return WEIGHT**0.5 * torch.randn_like(x0[:, :1]) + (1 - WEIGHT) ** 0.5 * own
    frames = [own[:, 0]]
    for f in range(1, x0.shape[1]):
        frames.append(WEIGHT**0.5 * frames[-1] + (1 - WEIGHT) ** 0.5 * own[:, f])
    return torch.stack(frames, dim=1)


def beside(level: Tensor, x: Tensor) -> Tensor:
    """Return a level (B, F) beside a clip, in its dtype."""
    return level[:, :, None, None, None].to(x.dtype)


def normal_problem(clips: Clips, dtype: torch.dtype) -> Problem:
    """Return a draw; an empty tensor among the inputs carries the dtype."""
    return Problem(
        family="noise",
        operator="philox_normal",
        shape_name=clips.name,
        shape=clips.shape,
        dtype=dtype,
        backward=False,
        ours=lambda key, like: ops.philox_normal(clips.shape, key, dtype=like.dtype),
        plain=lambda key, like: torch.randn(clips.shape, dtype=like.dtype, device=like.device),
        definition=lambda key, like: reference.philox_normal(
            list(clips.shape), key, "independent", None, 0, like.dtype
        ),
        make_inputs=lambda device: [make_key(device), torch.empty(0, dtype=dtype, device=device)],
        traffic_bytes=clips.elements * dtype.itemsize,
    )


def add_noise_problem(clips: Clips, dtype: torch.dtype, sharing: str, backward: bool = False) -> Problem:
    """Return forward diffusion; public code gathers a level per frame from its schedule, as ours is given it."""

    def ours(x0: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
        base_weight = WEIGHT if sharing in ("mixed", "progressive") else None
        return ops.add_noise(x0, alpha, sigma, key, sharing=sharing, base_weight=base_weight)

    def plain(x0: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
        return beside(alpha, x0) * x0 + beside(sigma, x0) * usual_noise(x0, sharing)

    def definition(x0: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
        return reference.add_noise(x0, alpha, sigma, key, None, sharing, weight_of(sharing, x0), 0)[0]

    return Problem(
        family="noise",
        operator="add_noise",
        shape_name=f"{clips.name} {sharing}",
        shape=clips.shape,
        dtype=dtype,
        backward=backward,
        gradients=1,
        ours=ours,
        plain=plain,
        definition=definition,
        make_inputs=lambda device: [
            torch.randn(clips.shape, device=device).to(dtype),
            *make_levels(clips, device),
            make_key(device),
        ],
        traffic_bytes=(2 + 2 * backward) * clips.elements * dtype.itemsize,
    )


def mse_problem(clips: Clips, dtype: torch.dtype, backward: bool) -> Problem:
    """Return the loss on v; public code reads the noise that it stored, ours draws it again."""

    def ours(pred: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor, key: Tensor) -> Tensor:
        return ops.diffusion_mse(pred, x0, alpha, sigma, key, prediction="v")

    def plain(pred: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor, key: Tensor) -> Tensor:
        target = beside(alpha, x0) * noise - beside(sigma, x0) * x0
        return (pred - target).square().mean((2, 3, 4)).float()

    def definition(pred: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor, key: Tensor) -> Tensor:
        drawn = reference.philox_normal(list(x0.shape), key, "independent", None, 0, torch.float32)
        wide = torch.promote_types(pred.dtype, torch.float32)
        x, n = x0.to(wide), drawn.to(wide)
        target = beside(alpha, x) * n - beside(sigma, x) * x
        return (pred.to(wide) - target).square().mean((2, 3, 4))

    return Problem(
        family="noise",
        operator="diffusion_mse",
        shape_name=clips.name,
        shape=clips.shape,
        dtype=dtype,
        backward=backward,
        ours=ours,
        plain=plain,
        definition=definition,
        gradients=1,
        make_inputs=lambda device: [
            *(torch.randn(clips.shape, device=device).to(dtype) for _ in range(2)),
            *make_levels(clips, device),
            torch.randn(clips.shape, device=device).to(dtype),
            make_key(device),
        ],
        traffic_bytes=(3 + 2 * backward) * clips.elements * dtype.itemsize,
    )


def hybrid_problem(clips: Clips, dtype: torch.dtype) -> Problem:
    """Return mse and vb of a learned variance; public code reads the noise and the x_t that it stored."""
    schedule = make_schedule("linear", device=default_device())
    diffusion = PlainDiffusion(schedule)

    def ours(
        model_out: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        return ops.hybrid_loss(model_out, x0, alpha, sigma, t, schedule, key)

    def plain(
        model_out: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        pred, fraction = model_out.chunk(2, dim=2)
        mse = (pred - noise).square().mean((2, 3, 4)).float()
        epsilon, v, x, x_noisy = (clip.flatten(0, 1)[:, None] for clip in (pred.detach(), fraction, x0, x_t))
        return mse, diffusion.variational_bound(epsilon, v, x, x_noisy, t.flatten()).view(t.shape)

    def definition(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with vidkern.backend("reference"):
            return ours(*inputs)

    def make_inputs(device: torch.device) -> list[Tensor]:
        t = torch.randint(1000, clips.shape[:2], device=device)
        alpha, sigma = schedule.coefficients(t)
        x0, noise = torch.randn(2, *clips.shape, device=device)
        x_t = beside(alpha, x0) * x0 + beside(sigma, x0) * noise
        model_out = torch.cat([noise + 0.3 * torch.randn_like(noise), torch.randn_like(noise)], dim=2)
        return [
            *(tensor.to(dtype) for tensor in (model_out, x0)),
            *(alpha, sigma),
            *(tensor.to(dtype) for tensor in (x_t, noise)),
            *(t, make_key(device)),
        ]

    return Problem(
        family="noise",
        operator="hybrid_loss",
        shape_name=clips.name,
        shape=clips.shape,
        dtype=dtype,
        backward=True,
        gradients=1,
        ours=ours,
        plain=plain,
        definition=definition,
        make_inputs=make_inputs,
        traffic_bytes=8 * clips.elements * dtype.itemsize,
    )


def problems() -> list[Problem]:
    """Return what is timed, the most telling first: a run may be cut short."""
    dtypes = (torch.float32, torch.bfloat16)
    found = [normal_problem(clips, dtype) for clips in (LATTE, WAN) for dtype in dtypes]
    found += [add_noise_problem(LATTE, torch.float32, sharing) for sharing in SHARING]
    found += [add_noise_problem(WAN, torch.bfloat16, sharing) for sharing in SHARING]
    found += [mse_problem(clips, dtype, True) for clips in (LATTE, WAN) for dtype in dtypes]
    found += [hybrid_problem(LATTE, dtype) for dtype in dtypes]
    return [*found, hybrid_problem(WAN, torch.bfloat16)]


def small_problems() -> list[Problem]:
    """Return a small, ragged case of every kernel: what compute-sanitizer runs."""
    clips = Clips("ragged", (2, 3, 5, 11, 23))
    dtypes = (torch.float32, torch.bfloat16)
    cases: list[Callable[[torch.dtype], Problem]] = [
        lambda dtype: normal_problem(clips, dtype),
        *(lambda dtype, mode=mode: add_noise_problem(clips, dtype, mode, True) for mode in SHARING),
        lambda dtype: mse_problem(clips, dtype, True),
        lambda dtype: hybrid_problem(clips, dtype),
    ]
    return [case(dtype) for case in cases for dtype in dtypes]


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_speed(problem: Problem, measured: Any) -> None:
    measured(problem)

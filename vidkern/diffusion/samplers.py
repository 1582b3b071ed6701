"""Samplers: DDPM, DDIM and flow Euler, for any task pattern, with guidance and given frames kept bit for bit."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vidkern import ops
from vidkern.diffusion import graphs
from vidkern.diffusion.schedules import Schedule, respace
from vidkern.diffusion.tasks import Task, long_video, progressive, standard

SAMPLERS = ("ddim", "ddpm", "flow")
KEYS_PER_CHUNK = 1 << 32  # key offsets between the chunks of a long video: more than one run draws
Progress = Callable[[int, int], None]


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    shape: Sequence[int] | Tensor,
    schedule: Schedule,
    key: Tensor,
    *,
    sampler: str = "ddim",
    num_steps: int = 50,
    task: Task = standard,
    known: Tensor | None = None,
    init: Tensor | None = None,
    y: Tensor | None = None,
    y_null: Tensor | int | None = None,
    cfg_scale: float | None = None,
    prediction: str = "epsilon",
    variance: str = "learned_range",
    eta: float = 0.0,
    clip_x0: float | None = None,
    sharing: str = "independent",
    base_weight: Tensor | float | None = None,
    step_sharing: str = "independent",
    sample_offset: int = 0,
    graph: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Draw clips. Inside the loop nothing waits for the device and nothing is copied to it.

    Args:
        model: called as model(x, t) or model(x, t, y) with x (B, F, C, H, W) and t int64 (B, F). Where it has a method
            ``prepare_sampling``, that is called as prepare_sampling(times) or prepare_sampling(times, y) before the
            first step with all of the run's timesteps, int64 (T,), and what it returns, if not None, is given to every
            step instead of y, as model(x, t, prepared=...).
        shape: (B, F, C, H, W), or the starting noise itself, a float32 tensor of that shape.
        schedule: on the device where the clips are drawn.
        key: the noise key, int64 (2,) on that device.
        sampler: "ddim", "ddpm" or "flow" (Euler steps of flow matching).
        num_steps: how many of the schedule's steps are taken.
        task: which frames are given and how noisy each frame is; functools.partial sets a pattern's own options.
        known: float32 (B, F, C, H, W), the clips whose given frames are read; every task but ``standard`` needs it.
        init: float32 (B, F, C, H, W), clips that the other frames start from, noised to their first timestep. None:
            they start from pure noise; under ``progressive``, whose frames start less noisy, from its given frame.
        y: the condition of each sample, (B, ...).
        y_null: the condition that means none: the null class, or a tensor like y. Needed with ``cfg_scale``.
        cfg_scale: classifier-free guidance, null + scale * (cond - null), in one batch of 2B (Ho & Salimans 2022).
        prediction: what the model predicts: "epsilon", "v", "flow" or "x0".
        variance: of DDPM's steps: "learned_range", "fixed_small" or "fixed_large", see ``vidkern.ops.ddpm_step``.
        eta: DDIM's noise, from 0 (none) to 1.
        clip_x0: bound on |predicted x_0|; None: no bound.
        sharing, base_weight: how frames share the starting noise, see ``vidkern.ops.philox_normal``.
        step_sharing: how frames share the noise of the steps, "independent" or "shared".
        sample_offset: the first sample's number in the whole set, so that a clip does not depend on the batch split.
        graph: on a CUDA device, capture the whole step (both guidance halves, the model, the sampler's step) in a CUDA
            graph after two steps and replay it, which costs the host one launch a step and gives the same bits. Where
            that cannot be, steps run as they do without it, and the logger "vidkern" warns once with the reason.
        progress: called after each step as progress(step, num_steps), from 1.

    Returns:
        float32 (B, F, C, H, W). Given frames have exactly the bits of ``known``.

    Raises:
        ValueError: an unknown sampler, a schedule that does not fit it, guidance without y or y_null, a task other than
            ``standard`` without ``known``, ``known`` or ``init`` of another shape or dtype.
    """
    start, shape = (shape, shape.shape) if isinstance(shape, Tensor) else (None, tuple(shape))
    _check(shape, schedule, sampler, task, start, known, init, y, y_null, cfg_scale)
    tau, given = _timesteps(schedule, task, num_steps, shape)
    step = _step(sampler, schedule, key, prediction, variance, eta, clip_x0, cfg_scale, step_sharing, sample_offset)

    if init is None and known is not None and _unwrap(task) is progressive:
        init = known[:, :1].expand(shape)
    noise: dict[str, Any] = {"sharing": sharing, "base_weight": base_weight, "sample_offset": sample_offset}
    if init is not None:
        x = ops.add_noise(init, *schedule.coefficients(tau[0]), key, **noise)
    elif start is not None:
        x = start.clone(memory_format=torch.contiguous_format)
    else:
        x = ops.philox_normal(shape, key, dtype=torch.float32, device=schedule.device, **noise)
    if known is not None:
        x = torch.where(given[0, :, :, None, None, None], known, x).contiguous()

    # a frame whose timestep does not change yet (``progressive``) rests like a given one
    hold = given[:-1] | (tau[:-1] == tau[1:])
    run = _Run(x, tau, hold, _evaluator(model, tau[:-1].unique(), y, y_null, cfg_scale), step)
    steps = graphs.replayed(run.advance, x.device) if graph else graphs.repeated(run.advance)
    for i, _ in zip(range(num_steps), steps, strict=False):
        if progress is not None:
            progress(i + 1, num_steps)
    return run.x


def sample_long_video(
    model: Callable[..., Tensor],
    shape: tuple[int, ...],
    schedule: Schedule,
    key: Tensor,
    *,
    chunks: int = 15,
    given: int = 8,
    num_steps: int = 50,
    first: Tensor | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tensor:
    """Draw videos longer than the model's window: each chunk is given the last frames of the one before (FVDM).

    Args:
        model, schedule, key, num_steps: see ``sample``.
        shape: of one window, (B, F, C, H, W).
        chunks: how many windows; 15 of 16 frames, 8 of them given, are 128 frames. F - 1 given frames make it
            next-frame prediction.
        given: how many frames each chunk after the first is given.
        first: float32 (B, F, C, H, W), a known first window; None: it is drawn too.
        progress: called after each step as progress(step, steps of all chunks), from 1.
        **options: of ``sample``, for every chunk; ``graph`` captures a graph for each.

    Returns:
        float32 (B, F + (chunks - 1) * (F - given), C, H, W).

    Raises:
        ValueError: ``chunks`` < 1, ``given`` outside 1 .. F - 1, or as ``sample``.
    """
    frames = shape[1]
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if not 0 < given < frames:
        raise ValueError(f"given must be from 1 to {frames - 1}, less than the {frames} frames, got {given}")
    skipped = 0 if first is None else 1

    def draw(chunk: int, **window: Any) -> Tensor:
        report = progress and _shifted(progress, (chunk - skipped) * num_steps, (chunks - skipped) * num_steps)
        chunk_key = key.clone()
        chunk_key[1] += chunk * KEYS_PER_CHUNK
        return sample(model, shape, schedule, chunk_key, num_steps=num_steps, progress=report, **window, **options)

    task = functools.partial(long_video, given=given)
    window = draw(0) if first is None else first
    video = [window]
    for chunk in range(1, chunks):
        known = torch.zeros_like(window)
        known[:, :given] = window[:, -given:]
        window = draw(chunk, task=task, known=known)
        video.append(window[:, given:])
    return torch.cat(video, 1)


def _check(
    shape: tuple[int, ...],
    schedule: Schedule,
    sampler: str,
    task: Task,
    start: Tensor | None,
    known: Tensor | None,
    init: Tensor | None,
    y: Tensor | None,
    y_null: Tensor | int | None,
    cfg_scale: float | None,
) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if schedule.variance_preserving == (sampler == "flow"):
        raise ValueError(f"schedule must fit sampler {sampler!r}, got {schedule.name!r}")
    if len(shape) != 5:
        raise ValueError(f"shape must be (B, F, C, H, W), got {tuple(shape)}")
    if known is None and _unwrap(task) is not standard:
        raise ValueError("known must hold the given frames of this task, got None")
    for name, clip in (("known", known), ("init", init), ("shape", start)):
        if clip is not None and (clip.shape != tuple(shape) or clip.dtype != torch.float32):
            got = f"{clip.dtype} of shape {tuple(clip.shape)}"
            raise ValueError(f"{name} must be torch.float32 of shape {tuple(shape)}, got {got}")
    if cfg_scale is not None and (y is None or y_null is None):
        raise ValueError("cfg_scale needs y and y_null")
    if y is not None and y.shape[:1] != (shape[0],):
        raise ValueError(f"y must have {shape[0]} samples first, got shape {tuple(y.shape)}")


def _unwrap(task: Task) -> Callable[..., Any]:
    return task.func if isinstance(task, functools.partial) else task


def _timesteps(schedule: Schedule, task: Task, num_steps: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return tau and hold, (num_steps + 1, B, F), at the start of each step and at the clean end."""
    steps = [*reversed(respace(schedule.num_steps, num_steps).tolist()), -1]
    clips = (torch.full(shape[:1], t, dtype=torch.int64, device=schedule.device) for t in steps)
    tau, hold = map(torch.stack, zip(*(task(t, shape[1]) for t in clips), strict=True))
    return tau, hold


@dataclasses.dataclass
class _Run:
    """A run's state. A step finds its place on the device, and goes on in place: a CUDA graph can hold it."""

    x: Tensor  # (B, F, C, H, W): what the clips have come to
    tau: Tensor  # (num_steps + 1, B, F)
    hold: Tensor  # (num_steps, B, F)
    evaluate: Callable[[Tensor, Tensor], Tensor]
    step: Callable[..., Tensor]

    def __post_init__(self) -> None:
        self.places = torch.arange(2, device=self.x.device)  # in tau: where the next step starts, and where it ends

    def advance(self) -> None:
        """Take the next step."""
        t, t_prev = self.tau.index_select(0, self.places)
        hold = self.hold.index_select(0, self.places[:1])[0]
        self.x.copy_(self.step(self.x, self.evaluate(self.x, t), t, t_prev, hold=hold))
        self.places.add_(1)


def _shifted(progress: Progress, done: int, total: int) -> Progress:
    return lambda step, _: progress(done + step, total)


def _step(
    sampler: str,
    schedule: Schedule,
    key: Tensor,
    prediction: str,
    variance: str,
    eta: float,
    clip_x0: float | None,
    cfg_scale: float | None,
    sharing: str,
    sample_offset: int,
) -> Callable[..., Tensor]:
    """Return the step operator of a sampler, called as step(x, model_out, t, t_prev, hold=)."""
    common: dict[str, Any] = {
        "schedule": schedule,
        "prediction": prediction,
        "guidance_scale": cfg_scale,
        "clip_x0": clip_x0,
    }
    if sampler == "flow":
        return functools.partial(ops.flow_step, **common)
    noise: dict[str, Any] = {"key": key, "sharing": sharing, "sample_offset": sample_offset}
    if sampler == "ddpm":
        return functools.partial(ops.ddpm_step, variance=variance, **common, **noise)
    return functools.partial(ops.ddim_step, eta=eta, **common, **noise)


def _evaluator(
    model: Callable[..., Tensor],
    times: Tensor,
    y: Tensor | None,
    y_null: Tensor | int | None,
    cfg_scale: float | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the model as a function of (x, t); under guidance its batch is doubled, the conditional half first."""
    if cfg_scale is not None:
        assert y is not None  # _check has seen to it
        assert y_null is not None
        null = y_null if isinstance(y_null, Tensor) else torch.full_like(y, y_null)
        y = torch.cat([y, null.expand_as(y)])
    condition = () if y is None else (y,)
    prepare = getattr(model, "prepare_sampling", None)
    prepared = None if prepare is None else prepare(times, *condition)
    if prepared is not None:
        condition, model = (), functools.partial(model, prepared=prepared)
    if cfg_scale is None:
        return lambda x, t: model(x, t, *condition)
    return lambda x, t: model(x.repeat(2, 1, 1, 1, 1), t.repeat(2, 1), *condition)

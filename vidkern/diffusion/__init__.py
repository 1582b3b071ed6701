"""The diffusion process: schedules, timesteps, task patterns, training losses and samplers."""

from vidkern.diffusion.losses import diffusion_loss
from vidkern.diffusion.samplers import sample, sample_long_video
from vidkern.diffusion.schedules import Schedule, make_schedule, respace, sde_beta, sde_diffusion, sde_drift
from vidkern.diffusion.tasks import (
    TASKS,
    Task,
    given_frames,
    image_to_video,
    interpolation,
    long_video,
    next_frame,
    progressive,
    standard,
    transition,
)
from vidkern.diffusion.timesteps import sample_timesteps

__all__ = [
    "TASKS",
    "Schedule",
    "Task",
    "diffusion_loss",
    "given_frames",
    "image_to_video",
    "interpolation",
    "long_video",
    "make_schedule",
    "next_frame",
    "progressive",
    "respace",
    "sample",
    "sample_long_video",
    "sample_timesteps",
    "sde_beta",
    "sde_diffusion",
    "sde_drift",
    "standard",
    "transition",
]

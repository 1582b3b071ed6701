"""Task patterns of FVDM: which timestep each frame has, and which frames are given, when the clip is at time t.

Each function takes t, int64 of shape (B,), with -1 for the clean end, and the number of frames F. It returns
(tau, hold): tau, int64 (B, F), the timestep of each frame; hold, bool (B, F), true where the frame is given. A given
frame has timestep 0, the cleanest one that the network was trained on. The patterns are those of FVDM, section 2.4.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Task = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def standard(t: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Every frame is generated: [t, ..., t]."""
    return given_frames(t, frames, ())


def image_to_video(t: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """The first frame is given: [0, t, ..., t]."""
    return given_frames(t, frames, (0,))


def interpolation(t: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """The first and the last frame are given: [0, t, ..., t, 0]."""
    return given_frames(t, frames, (0, frames - 1))


def long_video(t: Tensor, frames: int, given: int = 8) -> tuple[Tensor, Tensor]:
    """The first ``given`` frames, the end of the window before, are given: [0, ..., 0, t, ..., t]."""
    if not 0 < given < frames:
        raise ValueError(f"given must be from 1 to {frames - 1}, less than the {frames} frames, got {given}")
    return given_frames(t, frames, range(given))


def next_frame(t: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """All frames but the last are given: [0, ..., 0, t]."""
    return given_frames(t, frames, range(frames - 1))


def transition(t: Tensor, frames: int, first: int = 4, last: int = 4) -> tuple[Tensor, Tensor]:
    """The end of one clip and the start of another are given: ``first`` zeros, t, ..., t, ``last`` zeros."""
    if first < 1 or last < 1 or first + last >= frames:
        raise ValueError(f"first and last must be at least 1 and less than {frames} together, got {first} and {last}")
    return given_frames(t, frames, [*range(first), *range(frames - last, frames)])


def given_frames(t: Tensor, frames: int, index: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Any frames are given.

    Args:
        t: (B,) int64.
        frames: F.
        index: the given frames' numbers, negative ones counting from the end, or a bool mask of shape (F,) or (B, F).

    Raises:
        ValueError: a frame number or a mask that does not fit F.
    """
    if not isinstance(index, Tensor):
        index = _frame_mask(frames, index, t.device)
    if index.dtype != torch.bool or index.shape[-1:] != (frames,):
        got = f"{index.dtype} of shape {tuple(index.shape)}"
        raise ValueError(f"index must be a bool mask of shape ({frames},) or (B, {frames}), got {got}")
    hold = index.expand(t.shape[0], frames)
    return t[:, None].masked_fill(hold, 0), hold


def progressive(t: Tensor, frames: int, ramp: int = 10) -> tuple[Tensor, Tensor]:
    """Frame 0 is given and noise grows along the clip: tau_i = min(i * t / ramp, t), rounded down.

    At the clean end, t = -1, every generated frame is at -1.
    """
    if ramp < 1:
        raise ValueError(f"ramp must be at least 1, got {ramp}")
    i = torch.arange(frames, device=t.device)
    growing = torch.div(i * t[:, None], ramp, rounding_mode="floor")
    tau = torch.minimum(growing, t[:, None]).clamp(min=-1)
    hold = (i == 0).expand_as(tau)
    return tau.masked_fill(hold, 0), hold


TASKS: dict[str, Task] = {
    "standard": standard,
    "image-to-video": image_to_video,
    "interpolation": interpolation,
    "long-video": long_video,
    "transition": transition,
    "next-frame": next_frame,
    "progressive": progressive,
}


def _frame_mask(frames: int, index: Sequence[int], device: torch.device) -> Tensor:
    mask = torch.zeros(frames, dtype=torch.bool, device=device)
    for i in index:
        if not -frames <= i < frames:
            raise ValueError(f"index must hold frames from {-frames} to {frames - 1}, got {i}")
        mask[i].fill_(True)  # on the device: a tensor built from a list would be copied there
    return mask

"""Random timesteps for training: one for a clip, one for each frame, or the mixture of both (PTSS)."""

import torch
from torch import Tensor

MODES = ("clip", "frame", "ptss")


def sample_timesteps(
    batch: int,
    frames: int,
    num_steps: int,
    *,
    mode: str = "clip",
    p: float = 0.2,
    per_batch: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw uniform timesteps from 0 .. num_steps - 1, on the device and without a synchronisation.

    Args:
        batch, frames: B and F.
        num_steps: T of the schedule.
        mode: "clip", one timestep for a clip; "frame", one for each frame; "ptss", the probabilistic timestep
            sampling strategy of FVDM: with probability p one for each frame, else one for the clip.
        p: the probability of "ptss", in [0, 1].
        per_batch: draw the choice of "ptss" once for the batch, as FVDM's released code does, not once for each sample.
        generator: of the same device.
        device: where the timesteps go; the generator's device, or the CPU, if None.

    Returns:
        int64, (B,) in mode "clip", else (B, F).

    Raises:
        ValueError: an unknown mode or p outside [0, 1].
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability in [0, 1], got {p}")
    if device is None:
        device = generator.device if generator is not None else torch.device("cpu")

    def draw(*shape: int) -> Tensor:
        return torch.randint(num_steps, shape, generator=generator, device=device)

    if mode == "clip":
        return draw(batch)
    if mode == "frame":
        return draw(batch, frames)
    choice = torch.rand(1 if per_batch else batch, 1, generator=generator, device=device) < p
    return torch.where(choice, draw(batch, frames), draw(batch, 1))

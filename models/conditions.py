"""Which samples lose a condition: drawn in training, or told by the caller, as classifier-free guidance does."""

from collections.abc import Mapping

import torch
from torch import Tensor


def draw_dropped(
    dropouts: Mapping[str, float],
    batch: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Draw, for each condition on its own, the samples that lose it: bool (batch,) on the device, without a wait.

    Args:
        dropouts: how often each condition is dropped; one with 0 is not drawn.
        batch: B.
        generator: of the same device.
        device: where the draws are made; the generator's device, or the CPU, if None.
    """
    if device is None:
        device = generator.device if generator is not None else torch.device("cpu")
    return {
        name: torch.empty(batch, device=device).uniform_(generator=generator) < probability
        for name, probability in dropouts.items()
        if probability > 0
    }


def resolve_dropped(
    dropped: Mapping[str, Tensor] | None,
    dropouts: Mapping[str, float],
    batch: int,
    device: torch.device,
    *,
    training: bool,
) -> Mapping[str, Tensor]:
    """Return what a network's forward drops: what the caller says, else what is drawn in training, else nothing.

    Raises:
        ValueError: ``dropped`` names a condition that ``dropouts`` does not, or is not bool of shape (batch,).
    """
    if dropped is None:
        return draw_dropped(dropouts, batch, device=device) if training else {}
    for name, samples in dropped.items():
        if name not in dropouts:
            raise ValueError(f"dropped must name conditions among ({', '.join(dropouts)}), got {name!r}")
        if samples.dtype != torch.bool or samples.shape != (batch,):
            got = f"{samples.dtype} of shape {tuple(samples.shape)}"
            raise ValueError(f"dropped[{name!r}] must be torch.bool of shape ({batch},), got {got}")
    return dropped

"""A network's conditions: their shapes, and which samples lose one, drawn in training or told by the caller."""

from collections.abc import Mapping, Sequence

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


def check_condition(name: str, value: Tensor | None, wanted: Sequence[int | str | None] | None) -> None:
    """Compare a condition with the shape that a network wants, or with None where it wants none.

    Args:
        name: the argument's name.
        value: the condition.
        wanted: sizes; one that is a str stands for any size.

    Raises:
        ValueError: it is missing, not wanted, or of another shape.
    """
    got = None if value is None else tuple(value.shape)
    if wanted is None or got is None:
        fits = wanted is None and got is None
    else:
        fits = len(got) == len(wanted) and all(isinstance(w, str) or g == w for g, w in zip(got, wanted, strict=True))
    if not fits:
        shape = "None" if wanted is None else f"of shape {str(tuple(wanted)).replace(chr(39), '')}"
        raise ValueError(f"{name} must be {shape}, got {got}")

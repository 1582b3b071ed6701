"""Noise keys: the (seed, offset) pairs that operators draw their noise from, made on the device."""

from typing import Any

import torch
from torch import Tensor


def next_key(generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
    """Draw a noise key from a torch generator, on the generator's device: nothing crosses to another one.

    Args:
        generator: where to draw; None is the default generator of ``device``.
        device: None (the generator's; the CPU without one) or the generator's.

    Returns:
        int64 (2,) = (seed, offset), both uniform in [0, 2^63).

    Raises:
        ValueError: the generator is on another device.
    """
    where = torch.device(device) if device is not None else generator.device if generator is not None else None
    if generator is not None and where is not None and where.type != generator.device.type:
        raise ValueError(f"device must be the generator's ({generator.device}), got {device}")
    return torch.empty(2, dtype=torch.int64, device=where).random_(generator=generator)


class KeyStream:
    """An endless sequence of noise keys (seed, 0), (seed, 1), ...: its state is on the device and advances there.

    Drawing a key neither waits for the device nor copies to it, and a CUDA graph that holds a draw goes on to the
    next key at each replay. Keys of two streams differ where their seeds do; for data-parallel training give every
    process the same stream and its own ``sample_offset``.
    """

    def __init__(self, seed: int, device: torch.device | str | None = None) -> None:
        """Start at (seed, 0).

        Args:
            seed: any signed 64-bit integer.
            device: of the keys; None is the CPU.
        """
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed must fit in a signed 64-bit integer, got {seed}")
        self._key = torch.tensor([seed, 0], dtype=torch.int64, device=device)

    def next(self) -> Tensor:
        """Return the next key, int64 (2,) on the stream's device."""
        key = self._key.clone()
        self._key[1].add_(1)
        return key

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for a checkpoint."""
        return {"key": self._key.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream was whose state this is; the state's tensor may be on any device."""
        key = state["key"]
        if key.shape != (2,) or key.dtype != torch.int64:
            raise ValueError(f"state['key'] must be int64 of shape (2,), got {key.dtype} of shape {tuple(key.shape)}")
        self._key.copy_(key)

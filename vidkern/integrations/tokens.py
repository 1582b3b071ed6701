"""The layers of other people's blocks on tokens (B, F, N, D): norms, gates and attention over frames."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidkern import ops
from vidkern.ops.modulation.op import GRANULE, MAX_CHANNELS


class Modulation(NamedTuple):
    """How a block modulates its tokens: with vidkern's operators, or as the block was written.

    Tokens are (B, F, N, D), vectors (B, F, D) or (B, 1, D) for one of the whole clip; ``norm`` is a LayerNorm with or
    without weights.

    Attributes:
        modulate: (x, norm, shift, scale) -> norm(x) * (1 + scale) + shift.
        gate_residual: (x, y, gate) -> x + gate * y.
        gate_residual_modulate: (x, y, gate, norm, shift, scale) -> both of the above, the second of the first.
    """

    modulate: Callable[[Tensor, nn.LayerNorm, Tensor, Tensor], Tensor]
    gate_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate_residual_modulate: Callable[..., tuple[Tensor, Tensor]]


def modulate(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    """Return norm(x) * (1 + scale) + shift in one pass; see :class:`Modulation`."""
    shift, scale = with_weights(norm, shift, scale)
    return ops.layer_norm_modulate(x, _each_frame(shift, x), _each_frame(scale, x), norm.eps)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * y in one pass, in x's dtype; see :class:`Modulation`."""
    return ops.gate_residual(x, y.to(x.dtype), _each_frame(gate, x))


def gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return z = x + gate * y and norm(z) * (1 + scale) + shift in one pass; see :class:`Modulation`."""
    shift, scale = with_weights(norm, shift, scale)
    gate, shift, scale = (_each_frame(vector, x) for vector in (gate.to(scale.dtype), shift, scale))
    return ops.gate_residual_modulate(x, y.to(x.dtype), gate, shift, scale, norm.eps)


def gate_residual_norm(x: Tensor, y: Tensor, gate: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return z = x + gate * y and norm(z) in one pass; norm is a LayerNorm with weights, or the identity."""
    if not isinstance(norm, nn.LayerNorm):
        z = gate_residual(x, y, gate)
        return z, z
    wide = torch.promote_types(x.dtype, torch.float32)
    vectors = (gate.to(wide), norm.bias.to(wide), norm.weight.to(wide) - 1)
    gate, shift, scale = (_each_frame(vector, x) for vector in vectors)
    return ops.gate_residual_modulate(x, y.to(x.dtype), gate, shift, scale, norm.eps)


def with_weights(norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return what does to LN(x) what the norm's weights, then shift and scale, do; float32 where there are weights."""
    if norm.weight is None:
        return shift, scale
    wide = torch.promote_types(scale.dtype, torch.float32)
    scale, shift = 1 + scale.to(wide), shift.to(wide)
    if norm.bias is not None:
        shift = torch.addcmul(shift, norm.bias.to(wide), scale)
    return shift, norm.weight.to(wide) * scale - 1


def _each_frame(vector: Tensor, x: Tensor) -> Tensor:
    return vector.expand(*x.shape[:2], -1)


def _plain_modulate(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    return norm(x) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def _plain_gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(2) * y


def _plain_gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    z = _plain_gate_residual(x, y, gate)
    return z, _plain_modulate(z, norm, shift, scale)


FUSED = Modulation(modulate, gate_residual, gate_residual_modulate)
PLAIN = Modulation(_plain_modulate, _plain_gate_residual, _plain_gate_residual_modulate)


def attend_rearranged(attention: nn.Module, x: Tensor) -> Tensor:
    """Give an attention layer of (batch, length, D) the frames of each place as its length: (B, F, N, D) both ways."""
    places = x.transpose(1, 2)
    return attention(places.flatten(0, 1)).unflatten(0, places.shape[:2]).transpose(1, 2)


def check_width(channels: int) -> None:
    """Require a number of channels that the modulation operators take.

    Raises:
        ValueError: they do not.
    """
    if channels % GRANULE or channels > MAX_CHANNELS:
        raise ValueError(
            f"the model must have a multiple of {GRANULE} channels, at most {MAX_CHANNELS}, got {channels}"
        )

"""The transformer block of divided space-time attention with adaLN-Zero, and the layers around it."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from vidkern import ops
from vidkern.nn.attention import (
    Rope,
    SpaceThenTimeAttention,
    SpatialAttention,
    SplitHeadAttention,
    TemporalAttention,
)
from vidkern.nn.linear import xavier_linear, zero_linear
from vidkern.nn.modulation import Branch, PerFrameModulation, residual_modulate

ATTENTIONS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "spatial": SpatialAttention,
        "temporal": TemporalAttention,
        "space_then_time": SpaceThenTimeAttention,
        "split_heads": SplitHeadAttention,
    }
)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear: :func:`vidkern.ops.gelu_mlp`."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = xavier_linear(hidden_size, mlp_size)
        self.fc2 = xavier_linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return ops.gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class DividedSpaceTimeBlock(nn.Module):
    """One adaLN-Zero block whose attention runs along space, time, or a mixture: a stack alternates them.

    With (shift, scale, gate) of the attention and of the MLP from the condition (Peebles & Xie 2023; Ma et al. 2024):

        x = x + gate_a * Attention(LN(x) * (1 + scale_a) + shift_a)
        x = x + gate_m * Mlp(LN(x) * (1 + scale_m) + shift_m)

    The last addition is left to whoever comes next, which fuses it with its own norm and modulation: the block returns
    the residual stream and the branch that is still to be added. ``vidkern.ops.gate_residual(x, *branch)`` adds it.

    Args:
        hidden_size: D.
        num_heads: H, a divisor of D.
        attention: "spatial", "temporal", "space_then_time" or "split_heads".
        mlp_ratio: the MLP's inner width over D.
    """

    def __init__(self, hidden_size: int, num_heads: int, attention: str, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        self.attn = ATTENTIONS[attention](hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = PerFrameModulation(hidden_size)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        branch: Branch | None = None,
        rope: Rope | None = None,
        *,
        activated: bool = False,
    ) -> tuple[Tensor, Branch]:
        """Return (x, branch): the tokens, and the MLP's output with its gate, still to be added to them.

        Args:
            x: (B, F, N, D) residual stream.
            c: (B, F, D) condition of each frame, or (B, 1, D) of the clip; or the vectors that
                ``adaLN_modulation.vectors`` makes of it, (B, F or 1, 6D).
            branch: what the block before returned; None at the start of a stack.
            rope: (cos, sin), each (F, d) float32, for attention over frames.
            activated: c has been through adaLN's SiLU, once for all blocks.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c, x.shape[1], activated=activated)
        x, h = residual_modulate(x, branch, shift_a, scale_a)
        x, h = residual_modulate(x, (self.attn(h, rope), gate_a), shift_m, scale_m)
        return x, (self.mlp(h), gate_m)


class FinalLayer(nn.Module):
    """The end of the stack: norm, modulation by (shift, scale), and a Linear to the values of a patch."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.linear = zero_linear(hidden_size, patch_values)
        self.adaLN_modulation = PerFrameModulation(hidden_size, chunks=2)

    def forward(self, x: Tensor, c: Tensor, branch: Branch | None = None, *, activated: bool = False) -> Tensor:
        """(B, F, N, D) -> (B, F, N, patch_values); arguments as in :class:`DividedSpaceTimeBlock`."""
        shift, scale = self.adaLN_modulation(c, x.shape[1], activated=activated)
        _, h = residual_modulate(x, branch, shift, scale)
        return self.linear(h)

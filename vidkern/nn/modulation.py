"""adaLN-Zero's modulation, one vector per frame: where it comes from, and where it is applied."""

from torch import Tensor, nn

from vidkern import ops
from vidkern.nn.linear import zero_linear

#: A branch that is not yet added to the residual stream: (y (B, F, N, D), gate (B, F, D)).
Branch = tuple[Tensor, Tensor]


class PerFrameModulation(nn.Sequential):
    """SiLU and a Linear from the condition to a block's vectors, once per (batch, frame).

    The Linear is parameter ``1``, as in DiT, Latte and FVDM, and zero to begin with. A block's chunks are shift, scale,
    gate of its attention, then shift, scale, gate of its MLP. All blocks of a network apply the SiLU to the same
    condition: a network may do so once, and say that it is ``activated``.
    """

    def __init__(self, hidden_size: int, chunks: int = 6) -> None:
        super().__init__(nn.SiLU(), zero_linear(hidden_size, chunks * hidden_size))
        self.size, self.chunks = chunks * hidden_size, chunks

    def forward(  # type: ignore[override]
        self, c: Tensor, frames: int, *, activated: bool = False
    ) -> tuple[Tensor, ...]:
        """Return ``chunks`` views (B, frames, D) of one tensor.

        Args:
            c: (B, frames, D), or (B, 1, D) for a clip with one condition, which is computed once and expanded; or the
                vectors of such a condition, made before by :meth:`vectors`, of ``size`` instead of D channels.
            frames: F of the tokens to be modulated.
            activated: c has been through the SiLU.
        """
        vectors = c if c.shape[-1] == self.size else self.vectors(c, activated=activated)
        return vectors.expand(-1, frames, -1).chunk(self.chunks, dim=-1)

    def vectors(self, c: Tensor, *, activated: bool = False) -> Tensor:
        """Return all chunks side by side: (..., D) -> (..., size)."""
        activation, linear = self
        return linear(c if activated else activation(c))


def residual_modulate(x: Tensor, branch: Branch | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Add the pending branch, if any, to the residual stream, and normalise and modulate the sum in the same pass.

    Returns:
        (x, h): the residual stream and the next branch's input, each (B, F, N, D).
    """
    # eps as a literal: with dynamic=True torch.compile makes an input of a default or a global, and fails on it inside
    # activation checkpointing
    if branch is None:
        return x, ops.layer_norm_modulate(x, shift, scale, eps=1e-6)
    y, gate = branch
    return ops.gate_residual_modulate(x, y, gate, shift, scale, eps=1e-6)

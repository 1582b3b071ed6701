"""The optimiser's step: AdamW, the scale of clipped gradients and the weights' moving average in one pass."""

from vidkern.ops.optimizer.op import adamw_ema_

__all__ = ["adamw_ema_"]

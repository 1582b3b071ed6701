"""The exponential moving average of a network's weights: its decay at a step."""

from models.config import OptimConfig


def decay_at(config: OptimConfig, step: int) -> float:
    """The decay of step `step`, counted from 1: `ema_decay`, or less in the first steps of a run that warms up.

    min(decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage and diffusers' EMAModel have it:
    the average then spans the last tenth of a short run or so, where 0.9999 would still hold a third of the random
    weights after 10000 steps. From step 90000 on 0.9999 is what it was.
    """
    return min(config.ema_decay, (1 + step) / (10 + step)) if config.ema_warmup else config.ema_decay

"""How sure a number is that was computed from a set of clips: the bootstrap over clips (Efron 1979)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of the confidence intervals


@dataclass(frozen=True)
class Estimate:
    """A number, the interval that holds it with 95 % confidence, and its standard error where it has one of its own.

    The interval's ends are NaN where nothing is known of it.
    """

    value: float
    low: float
    high: float
    error: float | None = None


def bootstrap_mean(values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """The mean of one number a clip (N,), with the percentile interval of the means of clips drawn anew.

    There is none without resamples, of a single clip, or where a number is infinite.
    """
    value = float(np.mean(values))
    if resamples == 0 or len(values) == 1 or not np.isfinite(values).all():
        return Estimate(value, math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), _tails())
    return Estimate(value, float(low), float(high))


def bootstrap_distance(
    distance: Callable[[np.ndarray, np.ndarray], float],
    real: np.ndarray,
    fake: np.ndarray,
    *,
    paired: bool = False,
    resamples: int = 200,
    seed: int = 0,
) -> Estimate:
    """The distance of two sets of features (N, D), (M, D), with an interval from clips of both drawn anew.

    A set with repeated clips lies farther from any other than the set it was drawn from: the resampled distances are
    biased upwards, as the distance itself is with few clips. So they give the interval its width, and it is laid
    around the value: value + quantile - mean, not below 0. It says how far the number would move with other clips of
    the same count, not how far it is from that of infinitely many.

    `paired`: clip i of both sets belongs together and is drawn in both (N = M).
    """
    value = distance(real, fake)
    if resamples == 0:
        return Estimate(value, math.nan, math.nan)
    rng, values = np.random.default_rng(seed), []
    for _ in range(resamples):
        first = rng.integers(len(real), size=len(real))
        second = first if paired else rng.integers(len(fake), size=len(fake))
        values.append(distance(real[first], fake[second]))
    low, high = np.quantile(values, _tails()) - np.mean(values)
    return Estimate(value, max(value + float(low), 0.0), value + float(high))


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2

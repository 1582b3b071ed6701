"""Two sets of features compared: FVD with its bootstrap interval, KVD with its standard error."""

from collections.abc import Sequence

import numpy as np

from models.evaluation.bootstrap import Estimate, bootstrap_distance
from models.evaluation.distances import frechet_distance, kernel_distance

METRICS = ("fvd", "kvd")

_DEVIATIONS = 1.96  # of a normal distribution, on either side of 95 %


def compare(
    real: np.ndarray,
    fake: np.ndarray,
    metrics: Sequence[str] = METRICS,
    *,
    paired: bool = False,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The metrics named, of features (N, D) and (M, D); see frechet_distance, kernel_distance, bootstrap_distance.

    `paired`: clip i of both sets belongs together. One set compared with itself is paired in any case.
    """
    results = {}
    if "fvd" in metrics:
        paired = paired or np.array_equal(real, fake)
        results["fvd"] = bootstrap_distance(frechet_distance, real, fake, paired=paired, resamples=resamples, seed=seed)
    if "kvd" in metrics:
        value, error = kernel_distance(real, fake, seed=seed)
        results["kvd"] = Estimate(value, value - _DEVIATIONS * error, value + _DEVIATIONS * error, error)
    return results

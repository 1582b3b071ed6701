"""Two sets of features compared: FVD with its bootstrap interval, KVD with its standard error."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from models.evaluation.bootstrap import LEVEL, Estimate, bootstrap_distance
from models.evaluation.distances import default_blocks, frechet_distance, kernel_distance

METRICS = ("fvd", "kvd")


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

    `paired`: clip i of both sets belongs together. One set compared with itself is paired in any case. The interval of
    KVD is Student's, of a mean over so few blocks.
    """
    results = {}
    if "fvd" in metrics:
        paired = paired or np.array_equal(real, fake)
        results["fvd"] = bootstrap_distance(frechet_distance, real, fake, paired=paired, resamples=resamples, seed=seed)
    if "kvd" in metrics:
        value, error = kernel_distance(real, fake, seed=seed)
        blocks = default_blocks(min(len(real), len(fake)))
        reach = float(student.ppf((1 + LEVEL) / 2, blocks - 1)) * error
        results["kvd"] = Estimate(value, value - reach, value + reach, error)
    return results

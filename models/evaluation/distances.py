"""Distances between two sets of features: the Frechet distance of FVD and the kernel distance of KVD."""

import numpy as np
import scipy.linalg

_LEAST = 2  # samples of a covariance
_BLOCKS = 10  # of the kernel distance
_BLOCK_SIZE = 5  # samples, at least, before there are fewer blocks


def frechet_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with the means and covariances of two sets (N, D), (M, D).

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    FVD where the features are I3D's logits (Unterthiner et al. 2019). C is the unbiased covariance X^T X of the
    centred features X / sqrt(N - 1), so tr (C1 C2)^(1/2) is the sum of the singular values of X1 X2^T. That holds for
    covariances of any rank, also with fewer samples than features, where no matrix square root is well conditioned.
    Computed in float64; equal sets give 0 up to rounding.

    Raises ValueError for sets of other shapes, fewer than 2 samples, or features that are not finite.
    """
    real, fake = _check(real, fake)
    roots, traces = [], 0.0
    for features in (real, fake):
        root = (features - features.mean(0)) / np.sqrt(len(features) - 1)
        traces += float((root**2).sum())
        roots.append(scipy.linalg.qr(root, mode="r")[0][: root.shape[1]])  # the same covariance from at most D rows
    overlap = scipy.linalg.svdvals(roots[0] @ roots[1].T).sum()
    shift = ((real.mean(0) - fake.mean(0)) ** 2).sum()
    return max(float(shift + traces - 2 * overlap), 0.0)


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, *, blocks: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of two sets (N, D), (M, D) under the kernel (x·y / D + 1)^3, and its error.

    KVD where the features are I3D's logits; the kernel is KID's (Binkowski et al. 2018). Both sets are shuffled in the
    same way by `seed`, cut to the smaller one's length, and split into `blocks` of equal size, by default 10, fewer
    where a block would have under 5 samples. The estimate is the mean over blocks, the error the standard deviation
    over blocks / sqrt(blocks). In a block of m it is Gretton et al.'s (2012) U-statistic

        sum_{i != j} [k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)] / (m (m - 1)),

    unbiased at any m and also where x_i and y_i belong together (a clip and its blurred copy). It may be negative;
    equal sets give 0. Computed in float64.

    Raises ValueError as frechet_distance does, and where a block would have fewer than 2 samples.
    """
    real, fake = _check(real, fake)
    count = min(len(real), len(fake))
    blocks = default_blocks(count) if blocks is None else blocks
    if not 2 <= blocks <= count // 2:
        raise ValueError(f"a kernel distance wants at least 2 blocks of at least 2 samples, got {blocks} of {count}")
    order = np.random.default_rng(seed).permutation(max(len(real), len(fake)))
    real, fake = (features[order[order < len(features)][:count]] for features in (real, fake))
    size = count // blocks
    estimates = [_mmd2(real[i : i + size], fake[i : i + size]) for i in range(0, blocks * size, size)]
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / np.sqrt(blocks))


def default_blocks(count: int) -> int:
    """Blocks of a kernel distance of `count` samples."""
    return min(_BLOCKS, max(count // _BLOCK_SIZE, 2))


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic of two sets (m, D) of equal size."""
    m, width = x.shape
    terms = (x @ x.T / width + 1) ** 3 + (y @ y.T / width + 1) ** 3
    cross = (x @ y.T / width + 1) ** 3
    terms -= cross + cross.T
    return float((terms.sum() - np.trace(terms)) / (m * (m - 1)))


def _check(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets as float64."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"want features (N, D) and (M, D), got {real.shape} and {fake.shape}")
    for name, features in (("real", real), ("fake", fake)):
        if len(features) < _LEAST:
            raise ValueError(f"{name} has {len(features)} clips, a distance of distributions wants at least {_LEAST}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} has features that are not finite")
    return real.astype(np.float64), fake.astype(np.float64)

"""FVD, KVD, their confidence, SSIM and PSNR against closed forms and direct computations."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.ndimage import gaussian_filter

from models.evaluation.bootstrap import bootstrap_distance, bootstrap_mean
from models.evaluation.compare import compare
from models.evaluation.distances import frechet_distance, kernel_distance
from models.evaluation.quality import frame_quality
from models.evaluation.report import with_confidence


def samples(count: int, mean: np.ndarray, root: np.ndarray, seed: int) -> np.ndarray:
    """(count, D) whose sample mean is `mean` and whose sample covariance is root^T root, both exactly."""
    raw = np.random.default_rng(seed).standard_normal((count, len(mean)))
    raw -= raw.mean(0)
    whitened = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    return whitened @ root + mean


def test_frechet_distance_of_diagonal_gaussians() -> None:
    mean1, mean2 = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    width1, width2 = np.array([1.0, 2.0, 0.1]), np.array([3.0, 2.0, 0.4])
    real, fake = samples(9, mean1, np.diag(width1), 0), samples(14, mean2, np.diag(width2), 1)
    wanted = ((mean1 - mean2) ** 2).sum() + ((width1 - width2) ** 2).sum()
    assert frechet_distance(real, fake) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "width"), [(60, 40, 8), (30, 30, 30), (6, 5, 12)])
def test_frechet_distance_is_that_of_the_matrix_square_root(n: int, m: int, width: int) -> None:
    rng = np.random.default_rng(n)
    real = rng.standard_normal((n, width)) @ rng.standard_normal((width, width))
    fake = rng.standard_normal((m, width)) @ rng.standard_normal((width, width)) + 1
    c1, c2 = np.cov(real.T), np.cov(fake.T)
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # C1^(1/2), for tr (C1^(1/2) C2 C1^(1/2))^(1/2)
    overlap = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    wanted = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(c1 + c2) - 2 * overlap
    assert frechet_distance(real, fake) == pytest.approx(wanted, rel=1e-6)
    if n > width < m:
        product = scipy.linalg.sqrtm(c1 @ c2)
        assert overlap == pytest.approx(np.trace(product).real, rel=1e-8)


@pytest.mark.parametrize("count", [5, 50])
def test_a_set_has_no_distance_from_itself(count: int) -> None:
    features = np.random.default_rng(0).standard_normal((count, 20)).astype(np.float32) * 7 + 3
    assert frechet_distance(features, features) < 1e-9 * (features**2).sum()
    assert frechet_distance(features, features[::-1]) < 1e-9 * (features**2).sum()
    assert kernel_distance(features, features, blocks=2) == (0.0, 0.0)


def test_kernel_distance_is_the_sum_over_pairs() -> None:
    rng = np.random.default_rng(3)
    real, fake = rng.standard_normal((9, 4)), rng.standard_normal((9, 4)) + 0.5
    order = np.random.default_rng(7).permutation(9)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    blocks = []
    for part in (order[:4], order[4:8]):
        total = 0.0
        for i, j in itertools.permutations(part, 2):
            total += kernel(real[i], real[j]) + kernel(fake[i], fake[j])
            total -= kernel(real[i], fake[j]) + kernel(real[j], fake[i])
        blocks.append(total / (4 * 3))
    value, error = kernel_distance(real, fake, blocks=2, seed=7)
    assert value == pytest.approx(np.mean(blocks), rel=1e-12)
    assert error == pytest.approx(abs(blocks[0] - blocks[1]) / 2, rel=1e-12)  # standard deviation / sqrt(2)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_kernel_distance_is_unbiased_and_its_error_is_right(shift: float) -> None:
    rng = np.random.default_rng(0)
    drawn = [(rng.standard_normal((60, 5)), rng.standard_normal((60, 5)) + shift) for _ in range(300)]
    values, errors = np.array([kernel_distance(*sets, seed=seed) for seed, sets in enumerate(drawn)]).T
    norm = shift**2 * 5
    own = 1 + 3 * 5 / 25  # E (1 + s / 5)^3 for s = x.x', of mean 0 and variance 5
    other = (1 + norm / 5) ** 3 + 3 * (1 + norm / 5) * (5 + 2 * norm) / 25 + 6 * norm / 125  # y.y', y = m + e
    cross = 1 + 3 * (5 + norm) / 25  # x.y, of mean 0 and variance 5 + |m|^2
    wanted = own + other - 2 * cross
    assert abs(values.mean() - wanted) < 3 * values.std() / np.sqrt(len(values))
    assert np.sqrt((errors**2).mean()) / values.std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("count", "width"), [(20, 10), (60, 8)])
def test_the_interval_of_a_kernel_distance_holds_the_truth_as_often_as_it_says(count: int, width: int) -> None:
    """Between two samples of one distribution, which 4 and 10 blocks tell apart with very different certainty."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(200):
        real, fake = rng.standard_normal((2, count, width))
        found = compare(real, fake, ["kvd"], seed=seed)["kvd"]
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 200 <= 0.99


def test_sets_of_different_sizes_are_cut_to_the_smaller() -> None:
    rng = np.random.default_rng(1)
    real, fake = rng.standard_normal((40, 3)), rng.standard_normal((23, 3)) + 2
    longer, shorter = (np.random.default_rng(5).permutation(count) for count in (40, 23))
    place = np.argsort(shorter)  # undoes the shuffling of two sets of 23
    cut = real[longer][:23][place], fake[longer[longer < 23]][place]
    assert kernel_distance(real, fake, seed=5) == pytest.approx(kernel_distance(*cut, seed=5), rel=1e-12)


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (np.ones((4, 3)), np.ones((4, 2)), r"want features \(N, D\) and \(M, D\), got \(4, 3\) and \(4, 2\)"),
        (np.ones((1, 3)), np.ones((4, 3)), "real has 1 clips, a distance of distributions wants at least 2"),
        (np.ones((4, 3)), np.full((4, 3), np.nan), "fake has features that are not finite"),
    ],
)
def test_features_that_have_no_distance_are_refused(real: np.ndarray, fake: np.ndarray, message: str) -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=message):
            distance(real, fake)


def test_a_kernel_distance_needs_two_blocks() -> None:
    with pytest.raises(ValueError, match="at least 2 blocks of at least 2 samples, got 2 of 3"):
        kernel_distance(np.eye(3), np.eye(3))


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap_mean(values, resamples=4000, seed=1)
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert found == bootstrap_mean(values, resamples=4000, seed=1) != bootstrap_mean(values, resamples=4000, seed=2)
    assert bootstrap_mean(np.array([30.0, np.inf])).value == np.inf


def test_of_one_clip_or_without_resamples_no_interval_is_known() -> None:
    values = np.array([3.0, 4.0])
    unknown = [
        bootstrap_mean(values[:1]),
        bootstrap_mean(values, resamples=0),
        bootstrap_mean(np.array([3.0, np.inf])),
        bootstrap_distance(frechet_distance, values[:, None], values[::-1, None], resamples=0),
    ]
    assert [estimate.value for estimate in unknown] == [3.0, 3.5, np.inf, 0.0]
    assert all(np.isnan(estimate.low) and np.isnan(estimate.high) for estimate in unknown)
    assert [with_confidence(estimate) for estimate in unknown] == ["3.000", "3.500", "inf", "0"]


def test_the_interval_of_a_distance_is_as_wide_as_the_distance_varies() -> None:
    rng = np.random.default_rng(2)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_normal((80, 2)), rng.standard_normal((80, 2)) + 3

    spread = np.std([frechet_distance(*draw()) for _ in range(300)])
    widths = []
    for seed in range(5):
        found = bootstrap_distance(frechet_distance, *draw(), seed=seed)
        assert found.low < found.value < found.high
        widths.append((found.high - found.low) / (2 * 1.96))
    assert np.mean(widths) == pytest.approx(spread, rel=0.3)


def test_a_set_is_sure_to_have_no_distance_from_itself() -> None:
    features = np.random.default_rng(0).standard_normal((20, 5))
    found = bootstrap_distance(frechet_distance, features, features, paired=True)
    assert 0 <= found.low <= found.high < 1e-12
    assert bootstrap_distance(frechet_distance, features, features + 1, resamples=0).value == pytest.approx(5)


def test_psnr_and_ssim_of_flat_frames() -> None:
    a, b = 90, 100  # of 255
    real, fake = (torch.full((3, 3, 16, 20), level / 127.5 - 1) for level in (a, b))
    fake[1] = real[1]
    found = frame_quality(real, fake, given=(1,))
    c1 = (0.01 * 255) ** 2
    assert found.psnr[[0, 2]] == pytest.approx([20 * np.log10(255 / 10)] * 2)
    assert found.psnr[1] == np.inf
    assert found.ssim == pytest.approx(
        [(2 * a * b + c1) / (a * a + b * b + c1), 1, (2 * a * b + c1) / (a * a + b * b + c1)]
    )
    assert found.made.tolist() == [True, False, True]
    fake[2, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="fake must be finite, got NaN or infinity"):
        frame_quality(real, fake)


def test_ssim_is_wangs() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (2, 1, 1, 24, 30)).astype(np.float64)
    real, fake = (torch.from_numpy(part / 127.5 - 1).float() for part in levels)
    x, y = levels[:, 0, 0]

    def smooth(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5)

    mx, my = smooth(x), smooth(y)
    vx, vy, vxy = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    image = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert frame_quality(real, fake).ssim == pytest.approx([image[5:-5, 5:-5].mean()], abs=1e-10)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((2, 3, 16, 16), (2,), "given must name frames from 0 to 1, got 2"),
        ((2, 3, 16, 16), (0, 1), "all 2 frames are given, there is none to compare"),
        ((2, 3, 8, 16), (), "SSIM wants frames of at least 11 x 11 pixels, got 8 x 16"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(
    shape: tuple[int, ...], given: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        frame_quality(torch.ones(shape), torch.ones(shape), given)
    with pytest.raises(ValueError, match=r"a real clip is .*, its pair \(3, 3, 16, 16\): want one shape"):
        frame_quality(torch.ones(shape), torch.ones(3, 3, 16, 16))

"""Statistics of the noise over 10^8 numbers: moments, tails, distribution and correlations, with how likely each is."""

from collections import defaultdict
from typing import NamedTuple

import scipy.stats
import torch
from torch import Tensor

from vidkern import ops

ROUNDS = 96  # of 2^20 numbers each: 10^8
SHAPE = SAMPLES, FRAMES, ELEMENTS = 2, 2, 2**18
KEY = 20261121, 7
OTHER_KEYS = {"seeds one apart": (20261122, 7), "offsets one apart": (20261121, 8)}
BINS, EDGE = 4096, 6.0
CELLS = 32  # of equal probability along each side of the square that pairs of numbers fall into
TAILS = (3, 4, 5, 6)
#: Expected moments of a standard normal, and the variance of that power.
MOMENTS = {"mean": (0, 1), "second moment": (1, 2), "third moment": (0, 15), "fourth moment": (3, 96)}


class Statistic(NamedTuple):
    """A statistic of the noise, what a standard normal gives on average, and how likely one so far from it is."""

    name: str
    numbers: int
    value: float
    expected: float
    z: float | None  # standard deviations from what is expected, where it is nearly normal
    p: float  # two-sided

    @staticmethod
    def normal(name: str, numbers: int, value: float, expected: float, deviation: float) -> "Statistic":
        z = (value - expected) / deviation
        return Statistic(name, numbers, value, expected, z, float(2 * scipy.stats.norm.sf(abs(z))))


class Counts:
    """What adds up from round to round."""

    def __init__(self) -> None:
        self.numbers = 0
        self.moments = torch.zeros(4, dtype=torch.float64, device="cpu")
        self.histogram = torch.zeros(BINS, dtype=torch.float64, device="cpu")
        self.pairs = torch.zeros(CELLS**2, dtype=torch.float64, device="cpu")
        self.tails: dict[int, int] = defaultdict(int)
        self.products: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))

    def add(self, x: Tensor) -> None:
        """Count a round's numbers (samples, frames, elements)."""
        wide = x.flatten().double()
        square = wide * wide
        self.numbers += x.numel()
        powers = [wide.sum(), square.sum(), torch.dot(square, wide), torch.dot(square, square)]
        self.moments += torch.stack(powers).cpu()
        self.histogram += torch.histc(x, BINS, -EDGE, EDGE).cpu()
        for tail in TAILS:
            self.tails[tail] += int((square > tail**2).sum())
        cell = (torch.special.ndtr(x[..., 0::4].double()) * CELLS).long().clamp(max=CELLS - 1)
        beside = (torch.special.ndtr(x[..., 1::4].double()) * CELLS).long().clamp(max=CELLS - 1)
        self.pairs += torch.bincount((CELLS * cell + beside).flatten(), minlength=CELLS**2).cpu()
        for lane in (1, 2, 3):
            self.multiply(f"lanes 0 and {lane} of a Philox call", x[..., 0::4], x[..., lane::4])
        squares = x[..., 0::4] ** 2 - 1, x[..., 1::4] ** 2 - 1
        self.multiply("squares of lanes 0 and 1", *(v / 2**0.5 for v in squares))  # of variance 1
        self.multiply("Philox calls one apart", x[..., :-4], x[..., 4:])
        self.multiply("frames one apart", x[:, :-1], x[:, 1:])
        self.multiply("samples one apart", x[:-1], x[1:])

    def multiply(self, name: str, a: Tensor, b: Tensor) -> None:
        """Add to a correlation."""
        total, count = self.products[name]
        self.products[name] = total + float(torch.dot(a.flatten().double(), b.flatten().double())), count + a.numel()


def count(device: str, rounds: int = ROUNDS) -> Counts:
    """Draw on a device, each round other samples of the same key, and count."""
    counts, key = Counts(), torch.tensor(KEY, device=device)
    others = {name: torch.tensor(other, device=device) for name, other in OTHER_KEYS.items()}
    for i in range(rounds):
        offset = SAMPLES * i
        x = ops.philox_normal(SHAPE, key, sample_offset=offset)
        counts.add(x)
        for name, other in others.items():
            counts.multiply(name, x, ops.philox_normal(SHAPE, other, sample_offset=offset))
        base = ops.philox_normal((SAMPLES, 1, ELEMENTS), key, sharing="shared", sample_offset=offset)
        counts.multiply("own and shared noise", x[:, :1], base)
    return counts


def statistics(counts: Counts) -> list[Statistic]:
    """Return every statistic of the counts."""
    return [*_moments(counts), *_tails(counts), *_distribution(counts), *_correlations(counts)]


def _moments(counts: Counts) -> list[Statistic]:
    n = counts.numbers
    return [
        Statistic.normal(name, n, float(total) / n, expected, (variance / n) ** 0.5)
        for (name, (expected, variance)), total in zip(MOMENTS.items(), counts.moments, strict=True)
    ]


def _tails(counts: Counts) -> list[Statistic]:
    found = []
    for tail, value in counts.tails.items():
        expected = 2 * float(scipy.stats.norm.sf(tail)) * counts.numbers
        p = 2 * min(scipy.stats.poisson.sf(value - 1, expected), scipy.stats.poisson.cdf(value, expected))
        found.append(Statistic(f"numbers beyond {tail}", counts.numbers, value, expected, None, min(float(p), 1.0)))
    return found


def _distribution(counts: Counts) -> list[Statistic]:
    n, below = counts.numbers, torch.special.ndtr(torch.linspace(-EDGE, EDGE, BINS + 1, dtype=torch.float64))
    distance = float((counts.histogram.cumsum(0) / n - below[1:]).abs().max())  # at the bins' edges
    typical = float(scipy.stats.kstwobign.mean()) / n**0.5
    p = float(scipy.stats.kstwobign.sf(distance * n**0.5))
    smirnov = Statistic("Kolmogorov-Smirnov distance", n, distance, typical, None, min(2 * p, 2 - 2 * p))
    pairs = torch.full_like(counts.pairs, float(counts.pairs.sum()) / CELLS**2)
    return [
        smirnov,
        _chi_square("values", n, counts.histogram, below.diff() * n),
        _chi_square("pairs of neighbours", int(counts.pairs.sum()), counts.pairs, pairs, fitted=1),
    ]


def _chi_square(name: str, n: int, found: Tensor, expected: Tensor, fitted: int = 0) -> Statistic:
    filled = expected > 20
    value = float(((found - expected) ** 2 / expected)[filled].sum())
    freedom = int(filled.sum()) - fitted
    p = float(scipy.stats.chi2.sf(value, freedom))
    return Statistic(f"chi-square of {name}, {freedom} degrees", n, value, freedom, None, min(2 * p, 2 - 2 * p))


def _correlations(counts: Counts) -> list[Statistic]:
    return [
        Statistic.normal(f"correlation: {name}", n, total / n, 0.0, n**-0.5)
        for name, (total, n) in counts.products.items()
    ]

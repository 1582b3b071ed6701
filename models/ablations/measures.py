"""What a cell's clips are measured by: their distance from real ones, and numbers that are read off each clip.

Clips are float32 (N, F, C, H, W) in [-1, 1].
"""

import dataclasses
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.ablations.digit_network import DigitNetwork
from models.ablations.numbers import ink_variation, jerk, path_error, psnr, warp_error
from models.evaluation.bootstrap import Estimate, bootstrap_distance, bootstrap_mean
from models.evaluation.distances import frechet_distance
from models.evaluation.features import FeatureExtractor


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure's heading, and whether more of it is better."""

    heading: str
    more_is_better: bool = False


MEASURES = {
    "fvd": Measure("FVD (I3D)"),
    "digits_distance": Measure("Fréchet distance (digit network)"),
    "accuracy": Measure("class named, %", more_is_better=True),
    "psnr": Measure("PSNR of frames not given, dB", more_is_better=True),
    "warp_error": Measure("warping error, of 255"),
    "path_error": Measure("path's error, pixels"),
    "jerk": Measure("jerk of the path, pixels"),
    "ink": Measure("ink's variation, %"),
}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Clips of a cell as pixels, and what they are to be compared with."""

    clips: Tensor
    real: Tensor
    """What the clips should be like, (M, F, C, H, W)."""
    labels: Tensor
    """The classes asked for, int64 (N,)."""
    real_labels: Tensor
    """The classes of `real`, int64 (M,)."""
    given: Tensor
    """The frames that were given, bool (F,)."""
    truth: Tensor | None = None
    """The very clips that should have come out, (N, F, C, H, W)."""
    motion: Tensor | None = None
    """The motion of `truth`, (N, F, 3, h, w)."""


class Judge(Protocol):
    """Measures the clips of one kind of data."""

    distance: str
    """The name among MEASURES of the Frechet distance of its features."""

    def features(self, clips: Tensor) -> np.ndarray:
        """Features (N, D) of clips."""
        ...

    def numbers(self, drawn: Drawn) -> dict[str, Tensor]:
        """Numbers of each clip by the measure's name, beside those that suit any clip."""
        ...


class VideoJudge:
    """I3D's features."""

    distance = "fvd"

    def __init__(self, device: torch.device) -> None:
        self.extractor = FeatureExtractor(device=device)

    def features(self, clips: Tensor) -> np.ndarray:
        """I3D's logits (N, 400)."""
        return self.extractor(clips, progress="I3D", total=len(clips))

    def numbers(self, drawn: Drawn) -> dict[str, Tensor]:
        """None of its own."""
        return {}


class DigitJudge:
    """The features of a network that names digits, and what is known of the way in which digits move."""

    distance = "digits_distance"

    def __init__(self, network: DigitNetwork) -> None:
        self.network = network

    def features(self, clips: Tensor) -> np.ndarray:
        """The network's features (N, 64)."""
        return self.network.features(clips).numpy()

    def numbers(self, drawn: Drawn) -> dict[str, Tensor]:
        """Whether the class is the one asked for, and how the digit moves and stays whole."""
        named = self.network(drawn.clips)[0].argmax(1)
        numbers = {
            "accuracy": 100 * (named == drawn.labels).double(),
            "jerk": jerk(drawn.clips),
            "ink": 100 * ink_variation(drawn.clips),
        }
        if drawn.truth is not None:
            numbers["path_error"] = path_error(drawn.clips, drawn.truth)
        return numbers


def measure(drawn: Drawn, judge: Judge) -> dict[str, Estimate]:
    """Every measure that the clips have, with its 95 % interval by the bootstrap over clips.

    Clips of which frames were given have no distance between sets: those frames are the real clips' own.
    """
    found = _means(drawn, judge)
    if not drawn.given.any():
        real, fake = judge.features(drawn.real), judge.features(drawn.clips)
        paired = drawn.truth is not None
        found = {judge.distance: bootstrap_distance(frechet_distance, real, fake, paired=paired), **found}
    return found


def measure_real(drawn: Drawn, judge: Judge) -> dict[str, Estimate]:
    """What can be read off real clips in the same way: the best that an arm could come to."""
    whole = dataclasses.replace(drawn, clips=drawn.real, labels=drawn.real_labels)
    return {name: value for name, value in _means(whole, judge).items() if name not in ("psnr", "path_error")}


def _means(drawn: Drawn, judge: Judge) -> dict[str, Estimate]:
    numbers = judge.numbers(drawn)
    if drawn.truth is not None:
        numbers["psnr"] = psnr(drawn.clips, drawn.truth, drawn.given)
    if drawn.motion is not None:
        numbers["warp_error"] = 127.5 * warp_error(drawn.clips, drawn.motion)
    return {name: bootstrap_mean(numbers[name].numpy()) for name in MEASURES if name in numbers}

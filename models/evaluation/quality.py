"""SSIM and PSNR of clips that were to be rebuilt: frames held, interpolated or predicted, against the real ones."""

from dataclasses import dataclass

import numpy as np
from skimage.metrics import mean_squared_error, structural_similarity
from torch import Tensor

from models.data.frames import to_uint8

_PEAK = 255
SMALLEST = 11  # pixels: the side of SSIM's window


@dataclass(frozen=True)
class Quality:
    """Numbers of each frame of one clip, (F,): SSIM, PSNR in dB (infinite for an equal frame), and which are given."""

    ssim: np.ndarray
    psnr: np.ndarray
    given: np.ndarray

    @property
    def made(self) -> np.ndarray:
        """Which frames the network made, bool (F,)."""
        return ~self.given


def frame_quality(real: Tensor, fake: Tensor, given: tuple[int, ...] = ()) -> Quality:
    """Compare two clips (F, C, H, W), floats in [-1, 1], frame by frame, as 8-bit images.

    PSNR is 10 log10(255^2 / mean squared error) over all channels. SSIM is Wang et al.'s (2004): a Gaussian window of
    sigma 1.5 and 11 pixels, K1 = 0.01, K2 = 0.03, population covariances, averaged over the image and its channels.

    `given` are the numbers of the frames that the network was given. Raises ValueError for clips of different shapes
    or that are not finite, frames under 11 pixels, a given frame that is not there, or no frame left to compare.
    """
    if real.shape != fake.shape:
        raise ValueError(f"a real clip is {tuple(real.shape)}, its pair {tuple(fake.shape)}: want one shape")
    for name, clip in (("real", real), ("fake", fake)):
        if not clip.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    frames, _, *side = real.shape
    if min(side) < SMALLEST:
        raise ValueError(f"SSIM wants frames of at least {SMALLEST} x {SMALLEST} pixels, got {side[0]} x {side[1]}")
    marks = np.zeros(frames, bool)
    for number in given:
        if not 0 <= number < frames:
            raise ValueError(f"given must name frames from 0 to {frames - 1}, got {number}")
        marks[number] = True
    if marks.all():
        raise ValueError(f"all {frames} frames are given, there is none to compare")
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(to_uint8(real), to_uint8(fake), strict=True)]
    return Quality(np.array([_ssim(a, b) for a, b in pairs]), np.array([_psnr(a, b) for a, b in pairs]), marks)


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of two images uint8 (C, H, W)."""
    return float(
        structural_similarity(
            a, b, channel_axis=0, data_range=_PEAK, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two images uint8 (C, H, W), in dB."""
    error = mean_squared_error(a, b)
    return float(10 * np.log10(_PEAK**2 / error)) if error else float("inf")

"""Moving digits: endless class-conditional clips of scikit-learn's 8x8 digits, drawn on the fly."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.seeded import Sample, SeededDataset
from models.motion.forms import to_network

_NAMES = ("a zero", "a one", "a two", "a three", "a four", "a five", "a six", "a seven", "an eight", "a nine")
_WAYS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")  # clockwise
_REACH = 7 / 16  # of a centre, where the frame is [-1, 1]: bilinear sampling widens the eight pixels to nine


class MovingDigits(SeededDataset):
    """A digit that moves and bounces off the edges: {"video": float32 (F, C, size, size), "label", "caption": int64}.

    The background is -1, the ink up to 1; with 3 channels each clip's ink has a colour. The digit is half as wide as
    the frame, its velocity constant between bounces, its position continuous (sampled bilinearly). The label is the
    digit, 0 to 9; the caption says it and the way to its place in frame 1, of eight: "a seven moving up and left".
    Deterministic by (seed, epoch, index); `length` only says how many samples an epoch has.

    With `motion` a sample has "motion" float32 (F, 3, size, size) too, exact, in the network's form (see
    models.motion.forms). A pixel of frame i that has ink moves with the digit: its flow leads to the digit's place in
    frame 0, which always shows all of the digit. A pixel without ink is background, which rests: its flow is 0, and
    frame 0 hides it where it has ink itself.
    """

    classes = tuple(str(digit) for digit in range(10))
    captions = tuple(f"{name} moving {way}" for name in _NAMES for way in _WAYS)

    def __init__(
        self,
        *,
        num_frames: int = 16,
        size: int = 32,
        channels: int = 1,
        length: int = 10_000,
        motion: bool = False,
        seed: int = 0,
    ) -> None:
        """Raises ValueError for num_frames or length below 1, size below 16, channels other than 1 and 3."""
        super().__init__(seed)
        for name, value, least in (("num_frames", num_frames, 1), ("size", size, 16), ("length", length, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        self.num_frames, self.size, self.channels, self.length = num_frames, size, channels, length
        self.motion = motion

    def __len__(self) -> int:
        """The number of samples in an epoch."""
        return self.length

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """A random digit image on a random path."""
        images, labels = _digits()
        which = int(rng.integers(len(images)))
        centres, way = self._path(rng)
        ink = _render(images[which], centres, self.size)
        colour = torch.from_numpy(rng.uniform(0.3, 1, self.channels) if self.channels == 3 else np.ones(1))
        video = 2 * ink[:, None] * (colour / colour.max()).float().view(-1, 1, 1) - 1
        sample = {"video": video, "label": labels[which], "caption": len(_WAYS) * labels[which] + way}
        if self.motion:
            sample["motion"] = _motion(ink, centres)
        return sample

    def _path(self, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Centres (F, 2) of the digit as (x, y), where the frame is [-1, 1], and the number of its first way."""
        start, angle = rng.uniform(-_REACH, _REACH, 2), rng.uniform(0, 2 * np.pi)
        speed = rng.uniform(0.04, 0.12)  # of half the frame's width, a frame
        step = speed * np.array([np.cos(angle), np.sin(angle)])
        straight = start + step * np.arange(max(self.num_frames, 2))[:, None]
        folded = np.abs((straight - _REACH) % (4 * _REACH) - 2 * _REACH) - _REACH  # reflected at both edges
        dx, dy = folded[1] - folded[0]
        way = round(np.arctan2(dy, dx) / (2 * np.pi) * len(_WAYS)) % len(_WAYS)
        return torch.from_numpy(folded[: self.num_frames]).float(), way


def _render(image: Tensor, centres: Tensor, size: int) -> Tensor:
    """The 8x8 `image` at half the frame's width around each of `centres` (F, 2): (F, size, size) in [0, 1]."""
    scale = torch.full((len(centres), 2, 1), 2.0)
    theta = torch.cat([torch.eye(2) * scale, -scale * centres[:, :, None]], dim=2)
    grid = F.affine_grid(theta, [len(centres), 1, size, size], align_corners=False)
    return F.grid_sample(image.expand(len(centres), 1, 8, 8), grid, align_corners=False)[:, 0]


def _motion(ink: Tensor, centres: Tensor) -> Tensor:
    """Motion (F, 3, size, size) of the digit with this ink (F, size, size) at `centres` (F, 2)."""
    digit = (ink > 0)[:, None]
    to_first = (centres[0] - centres) * ink.shape[-1] / 2  # pixels
    flow = to_first[:, :, None, None] * digit
    return to_network(flow, (digit | ~digit[:1]).float())


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """Images float32 (1797, 8, 8) in [0, 1] and labels int64 (1797,)."""
    from sklearn.datasets import load_digits  # slow to import

    data = load_digits()
    return torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target).long()

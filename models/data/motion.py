"""Clips stored with their motion: the shards that models.flow writes, and the samples that training draws from them.

A folder holds index.json and safetensors shards. Entry i of the index is one clip; in its shard are "{i}.video" uint8
(F, 3, H, W), "{i}.flow" float16 (F, 2, H, W) in pixels, "{i}.occlusion" uint8 (F, 1, H, W), 255 where frame 0 shows
the point (see models.motion.forms) and, where a VAE was given, "{i}.mean" and "{i}.std" float32 (F, C, h, w), its
posterior of every frame, unscaled, and, where poses were given, "{i}.pose" uint8 (F, 3, H, W), their pictures.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.data.frames import to_float
from models.data.listing import numbered_captions
from models.data.seeded import Sample, SeededDataset, torch_generator
from models.data.shards import INDEX, open_shard
from models.motion.forms import to_network


@dataclass(frozen=True)
class Check:
    """Mean absolute differences of a clip's frames 1, 2, ..., of 255, to frame 0 as it is and as the flow warps it.

    `visible` is the share of the frames' points that frame 0 shows, and `still_visible` and `warped_visible` are the
    differences there.
    """

    still: float
    warped: float
    still_visible: float
    warped_visible: float
    visible: float


@dataclass(frozen=True)
class MotionEntry:
    """One clip: its video's name in the source, its first frame there, its class and caption, its shard's file."""

    name: str
    start: int
    label: int
    text: str
    shard: str
    check: Check


@dataclass
class MotionIndex:
    """What a folder of motion holds and how it was made. A model takes (latent - shift_factor) * scaling_factor."""

    extractor: str
    num_frames: int
    frame_interval: int
    stride: int
    size: tuple[int, int]
    vae: str | None
    vae_sha256: str | None
    scaling_factor: float
    shift_factor: float
    classes: list[str]
    poses: bool = False
    entries: list[MotionEntry] = field(default_factory=list)

    def to_json(self) -> str:
        """The text of index.json."""
        return json.dumps(asdict(self), indent=1)


def read_motion_index(folder: str | Path) -> MotionIndex:
    """The index of a folder of motion. Raises FileNotFoundError where there is none and ValueError where damaged."""
    path = Path(folder) / INDEX
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["entries"] = [MotionEntry(**{**entry, "check": Check(**entry["check"])}) for entry in fields["entries"]]
        fields["size"] = tuple(fields["size"])
        return MotionIndex(**fields)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no motion at {folder}: python -m models.flow makes it") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not an index of motion: {error}") from error


def read_tensors(folder: Path, index: MotionIndex, number: int, frames: int | None = None) -> dict[str, Tensor]:
    """The tensors of entry `number` by name, of its first `frames` frames (None: all)."""
    with open_shard(folder / index.entries[number].shard) as shard:
        names = ["video", "flow", "occlusion", *(("mean", "std") if index.vae else ())]
        names += ["pose"] if index.poses else []
        return {name: shard.get_slice(f"{number}.{name}")[:frames] for name in names}


class MotionDataset(SeededDataset):
    """Stored clips with their motion: {"video": float32 (F, 3, H, W) in [-1, 1], "motion": (F, 3, H, W), "label"}.

    Motion is in the network's form (see models.motion.forms). With `latents` a sample has "latent" float32
    (F, C, h, w), drawn from the VAE's posterior and scaled for the model, in place of "video"; with `poses` it has
    "pose", float32 (F, 3, H, W) in [-1, 1], too. Where the videos have texts, `captions` are the distinct ones and
    "caption" int64 is the clip's number there. Clips begin at their stored first frame, from which all motion is
    measured. A sample is a function of (seed, epoch, index).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_frames: int | None = None,
        latents: bool = False,
        poses: bool = False,
        flip: bool = False,
        least_visible: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`num_frames`: the first so many (None: all); `flip`: mirror half of the clips, and dx with them.

        `least_visible`: only clips of whose later frames the first shows so large a share, from 0 to 1; across a change
        of scene it shows little.

        Raises FileNotFoundError or ValueError for a folder without motion, for more frames than are stored, for latents
        or poses where none are stored, or of mirrored clips.
        """
        super().__init__(seed)
        self.folder, self.index = Path(folder), read_motion_index(folder)
        self.num_frames = self.index.num_frames if num_frames is None else num_frames
        if not 1 <= self.num_frames <= self.index.num_frames:
            raise ValueError(f"num_frames must be from 1 to the {self.index.num_frames} in {folder}, got {num_frames}")
        if latents and self.index.vae is None:
            raise ValueError(f"no latents in {folder}: python -m models.flow --vae adds them to a new folder")
        if latents and flip:
            raise ValueError("flip must be False for latents: only pixels can be mirrored")
        if poses and not self.index.poses:
            raise ValueError(f"no poses in {folder}: python -m models.flow --poses adds them to a new folder")
        if poses and flip:
            raise ValueError(
                "flip must be False for poses: a mirrored picture shows left limbs in the right ones' colours"
            )
        if not self.index.entries:
            raise ValueError(f"no clips in {folder}")
        self._kept = [i for i, entry in enumerate(self.index.entries) if entry.check.visible >= least_visible]
        if not self._kept:
            most = max(entry.check.visible for entry in self.index.entries)
            raise ValueError(f"no clip in {folder} shows {least_visible:g} in its first frame; most is {most:.2f}")
        self.latents, self.poses, self.flip = latents, poses, flip
        self.classes = self.index.classes
        self._captions = numbered_captions(self.index.entries[i].text for i in self._kept)
        self.captions = tuple(self._captions)

    def __len__(self) -> int:
        """The number of clips that are kept."""
        return len(self._kept)

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The stored clip, mirrored or its latent drawn by `rng`."""
        number = self._kept[index]
        entry = self.index.entries[number]
        stored = read_tensors(self.folder, self.index, number, self.num_frames)
        motion = to_network(stored["flow"].float(), stored["occlusion"].float() / 255)
        if self.latents:
            clip = {"latent": self._latent(stored, rng)}
        else:
            clip = {"video": to_float(stored["video"])}
        if self.flip and rng.integers(2):
            clip["video"] = clip["video"].flip(-1)
            motion = motion.flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
        sample = {**clip, "motion": motion, "label": torch.tensor(entry.label)}
        if self.poses:
            sample["pose"] = to_float(stored["pose"])
        if self.captions:
            sample["caption"] = torch.tensor(self._captions[entry.text])
        return sample

    def _latent(self, stored: dict[str, Tensor], rng: np.random.Generator) -> Tensor:
        noise = torch.randn(stored["mean"].shape, generator=torch_generator(rng))
        return (stored["mean"] + stored["std"] * noise - self.index.shift_factor) * self.index.scaling_factor

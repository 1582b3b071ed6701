"""What the studies learn and are measured with: moving digits, or clips of videos with their motion.

Of a video, training takes clips from the first three quarters. Clips whose frames or motion are given to the network
are from the last quarter, which training does not see.
"""

from pathlib import Path

import torch
from torch import Tensor

from models import flow
from models.command_line import UsageError, read_yaml
from models.config import TrainConfig, parse_train_config
from models.data import real_clip
from models.data.decode import frame_table
from models.data.listing import list_videos
from models.training.checkpointing import atomic_file
from models.training.data import Batches, make_dataset
from models.training.distributed import World

REAL_CLIPS = ("bikes", "bigbuckbunny", "carphone")
TRAINED = 0.75  # of a video's frames
STRIDE = 2  # frames from the start of a clip to the start of the next
REAL_SEED, HELD_SEED = 2**31 + 1, 2**31 + 2  # of digits: no training's


class Material:
    """The data of a kind of training: options that name them, clips to be compared with, clips to be given."""

    def __init__(self, config: Path, folder: Path, *, videos: str | None, vae: str | None) -> None:
        """Make what is not there yet.

        Args:
            config: YAML file of the training; its data are digits, or motion to be made of videos.
            folder: where clips with their motion are kept, in a folder for each size.
            videos: folder, manifest or file of videos; None: three real clips.
            vae: the autoencoder in whose latents the network works; None: in pixels.
        """
        self._file = ("--config", str(config))
        self._parts: dict[str, tuple[str, ...]]
        if read_yaml(TrainConfig, config).data.kind == "digits":
            self._parts = {"trained": (), "real": (f"--seed={REAL_SEED}",), "held": (f"--seed={HELD_SEED}",)}
        else:
            self._parts = {
                part: ("--data.path", str(path))
                for part, path in _extract(read_yaml(TrainConfig, config), folder, videos, vae).items()
            }
            self._parts["real"] = self._parts["trained"]

    def options(self, part: str = "trained") -> list[str]:
        """Options of models.train for a part of the data: "trained", "real" (like it) or "held"."""
        return [*self._file, *self._parts[part]]

    def real(self, count: int) -> tuple[Tensor, Tensor]:
        """At most `count` clips such as are learnt, evenly spread: (N, F, C, H, W) as the network sees them, labels."""
        data = make_dataset(parse_train_config(self.options("real")))
        count = min(count, len(data))
        samples = [data[0, i * len(data) // count] for i in range(count)]
        clips = [sample["latent"] if "latent" in sample else sample["video"] for sample in samples]
        return torch.stack(clips), torch.stack([sample["label"] for sample in samples])

    def held(self, count: int, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """At most `count` clips that are not learnt: (N, F, C, H, W), labels, and the network's conditions of each."""
        batches = Batches(parse_train_config(self.options("held")), World(0, 1, device))
        count = min(count, len(batches.dataset))
        clips, conditions = batches.first(count)
        return clips.cpu(), torch.stack([batches.dataset[0, i]["label"] for i in range(count)]), conditions


def _extract(config: TrainConfig, folder: Path, videos: str | None, vae: str | None) -> dict[str, Path]:
    """Folders of clips with their motion: one to learn from, and one held."""
    network = config.network_config
    size = network.frame_size[0] if vae is None else 8 * network.frame_size[0]
    interval = config.data.frame_interval
    folder, folders = folder / f"motion_{network.num_frames}x{interval}_{size}", {}
    for part, lines in _manifests(videos, (network.num_frames - 1) * interval + 1).items():
        manifest, folders[part] = folder / f"{part}.csv", folder / part
        with atomic_file(manifest) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines))
        options = ["--videos", manifest, "--out", folders[part], "--size", size, "--num_frames", network.num_frames]
        options += ["--frame_interval", interval, "--workers", config.data.workers]
        flow.main([str(option) for option in options + ([] if vae is None else ["--vae", vae])])
    return folders


def _manifests(videos: str | None, span: int) -> dict[str, list[str]]:
    """Lines of two manifests, each a clip of `span` frames, by its video and its first frame."""
    paths = [real_clip(name) for name in REAL_CLIPS] if videos is None else [v.path for v in list_videos(videos).videos]
    lines: dict[str, list[str]] = {"trained": [], "held": []}
    for path in paths:
        count = frame_table(path).count
        cut = round(TRAINED * count)
        for part, begin, end in (("trained", 0, cut), ("held", cut, count)):
            lines[part] += [f"{path.resolve()},0,{start}" for start in range(begin, end - span + 1, STRIDE)]
    for part, found in lines.items():
        if not found:
            raise UsageError(f"--videos {videos}: no video has {span} frames in the part that is {part}")
    return lines

"""Videos to latents: `python -m models.encode --videos FOLDER --out FOLDER --vae PATH_OR_NAME`.

Every frame of every video goes through the autoencoder once, and the folder `out` is what models.data.LatentDataset
reads. A run that was killed goes on with the videos that are not yet in the index when the same command is given again.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from models.autoencoder import downsampling, load_autoencoder, posterior, scaling
from models.command_line import UsageError, check_range, one_line_errors, parse
from models.data.decode import VideoError, decode, frame_table
from models.data.frames import to_clip
from models.data.latents import Entry, Index, read_index
from models.data.listing import Video, list_videos
from models.data.shards import ShardWriter, relabelled, resume
from models.digest import sha256_of
from models.training.distributed import pick_device

PROG = "python -m models.encode"
_SAME = ("vae_sha256", "dtype", "size", "flip", "classes")  # of a folder's latents
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeConfig:
    """What to encode, with what, and where to."""

    videos: Path
    """Folder of videos (its sub-folders are the classes), manifest (.csv, .txt, .jsonl), or one video."""
    out: Path
    """Folder of the latents."""
    vae: str
    """Local folder of a diffusers AutoencoderKL or of a pipeline, or owner/name[/subfolder] on the hub."""
    size: int = 256
    """Height and width of the frames in pixels: resized until they cover the square, then cropped at the centre."""
    flip: bool = False
    """Encode each video mirrored as well, for training with horizontal flips."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the autoencoder runs and the latents are stored."""
    batch_size: int = 16
    """Frames in one call of the autoencoder."""
    workers: int = 2
    """Processes that decode videos; 0 decodes in the main process."""
    shard_mib: float = 256
    """Size in MiB from which a shard is written; a killed run loses at most one shard's work."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the autoencoder runs."""


def encode(config: EncodeConfig) -> Index:
    """Encode what is not encoded yet, print a summary, and return the index of all there is.

    Raises UsageError where the options do not fit each other or what `out` holds, ValueError or OSError where videos or
    autoencoder cannot be had or a shard cannot be written; what was written stays valid.
    """
    for name, least in {"size": 1, "batch_size": 1, "workers": 0, "shard_mib": 0}.items():
        check_range(name, getattr(config, name), least)
    device = pick_device(config.device)
    listing = list_videos(config.videos)
    vae = load_autoencoder(config.vae, dtype=getattr(torch, config.dtype), device=device)
    if config.size % downsampling(vae):
        raise UsageError(f"--size wants a multiple of the autoencoder's {downsampling(vae)}, got {config.size}")
    index = resume(config.out, _new_index(config, vae, listing.classes), read_index, _SAME, "latents")
    listed = {video.name: video for video in listing.videos}
    index = relabelled(config.out, index, lambda entry: listed.get(entry.name))
    writer = ShardWriter(config.out, "latents", index, config.shard_mib * 2**20)
    done = {entry.name for entry in writer.index.entries}
    todo = [video for name, video in listed.items() if name not in done]
    loader = DataLoader(_Frames(todo, config.size, config.batch_size), batch_size=None, num_workers=config.workers)

    skipped, parts = 0, dict[int, list[tuple[Tensor, ...]]]()
    with logging_redirect_tqdm(), tqdm(total=len(done) + len(todo), initial=len(done), unit="video") as progress:
        for number, frames, error in loader:
            if frames is not None:
                both = (frames, frames.flip(-1)) if config.flip else (frames,)
                latents = tuple(part.cpu() for pixels in both for part in posterior(vae, pixels))
                parts.setdefault(number, []).append(latents)
                continue
            encoded = parts.pop(number, [])
            if error:
                skipped += 1
                _log.warning("%s: skipped: %s", todo[number].name, error)
            else:
                writer.add(_entries(todo[number], [torch.cat(part) for part in zip(*encoded, strict=True)]))
            progress.update()
    writer.flush()
    entries = writer.index.entries
    print(
        f"{len(entries)} encoded videos, {sum(e.frames for e in entries)} frames in {config.out}; "
        f"skipped: {skipped} unreadable, {len(listing.others)} not videos"
    )
    if not entries:
        raise ValueError(f"none of the {len(listing.videos)} videos in {config.videos} could be read")
    return writer.index


class _Frames(IterableDataset[tuple[int, Tensor | None, str]]):
    """(number of the video, frames float32 (up to batch, 3, size, size), ""); (number, None, error or "") at its end.

    Worker w of W reads videos w, w + W, ...
    """

    def __init__(self, videos: Sequence[Video], size: int, batch: int) -> None:
        self.videos, self.size, self.batch = videos, size, batch

    def __iter__(self) -> Iterator[tuple[int, Tensor | None, str]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.videos), step):
            error = ""
            try:
                frame_table(self.videos[number].path)  # meets a file that is cut off before any frame is encoded
                video = decode(self.videos[number].path)
                while frames := list(islice(video, self.batch)):
                    yield number, to_clip(frames, (self.size, self.size)), ""
            except VideoError as reason:
                error = str(reason)
            yield number, None, error


def _entries(video: Video, latents: Sequence[Tensor]) -> list[tuple[Entry, dict[str, Tensor]]]:
    """Entry and tensors of a video's latents (T, C, h, w): mean, std and, if mirrored too, those of the mirror."""
    return [
        (Entry(video.name, video.label, len(mean), bool(mirrored), "", video.text), {"mean": mean, "std": std})
        for mirrored, (mean, std) in enumerate(zip(latents[::2], latents[1::2], strict=True))
    ]


def _new_index(config: EncodeConfig, vae: AutoencoderKL, classes: list[str]) -> Index:
    scale, shift = scaling(vae)
    size = (config.size, config.size)
    return Index(config.vae, sha256_of(vae.state_dict()), scale, shift, config.dtype, size, config.flip, classes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    logging.basicConfig(format="%(message)s")
    with one_line_errors(PROG):
        encode(parse(EncodeConfig, sys.argv[1:] if argv is None else argv, PROG))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The data of a run: the dataset that a configuration names, and its batches on the device from any step on."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from models.command_line import UsageError
from models.config import NetworkConfig, TrainConfig
from models.data import LatentDataset, MotionDataset, MovingDigits, ResumableSampler, VideoError, VideoFolder
from models.data.seeded import Sample, SeededDataset
from models.networks import check_network
from models.text.dataset import TextDataset
from models.training.distributed import World
from models.vdm import VDMConfig


def make_dataset(config: TrainConfig) -> SeededDataset:
    """The dataset of `config.data`, with clips of the network's size, frames and channels, and embedded captions."""
    clips = make_clips(config)
    if config.data.text is None:
        return clips
    try:
        return TextDataset(clips, config.data.text)
    except ValueError as error:
        raise UsageError(f"--data.text {config.data.text}: {error}") from error


def make_clips(config: TrainConfig) -> SeededDataset:
    """The dataset of `config.data` without its captions' embeddings."""
    data, network = config.data, config.network_config
    if data.kind == "digits":
        return MovingDigits(
            num_frames=network.num_frames,
            size=data.size or network.frame_size[0],
            channels=_pixel_channels(network),
            length=data.length,
            motion=isinstance(network, VDMConfig) or "motion" in network.conditions,
            seed=config.seed,
        )
    assert data.path is not None  # parse_train_config has seen to it
    if data.kind == "motion":
        dataset = MotionDataset(
            data.path,
            num_frames=network.num_frames,
            latents=data.latents,
            poses="pose" in network.conditions,
            flip=data.flip,
            least_visible=data.least_visible,
            seed=config.seed,
        )
        if data.frame_interval != dataset.index.frame_interval:  # motion-transfer takes it from the configuration
            raise UsageError(
                f"--data.frame_interval wants {dataset.index.frame_interval}, that of the clips in {data.path}, "
                f"got {data.frame_interval}"
            )
        return dataset
    if data.kind == "latents":
        return LatentDataset(
            data.path, num_frames=network.num_frames, frame_interval=data.frame_interval, seed=config.seed
        )
    return VideoFolder(
        data.path,
        num_frames=network.num_frames,
        frame_interval=data.frame_interval,
        size=network.frame_size,
        crop=data.crop,
        flip=data.flip,
        use_image_num=data.images,
        seed=config.seed,
    )


class Batches:
    """The run's batches on the device: this process's share of each, as (x0, conditions).

    x0 is float32 (n, F, C, H, W), with the joined images at the end of F: pixels, latents, or motion for a VDM.
    Conditions are what the network takes besides, by the names of its `forward`, where they come from the data: "y"
    (n,) and "image_labels" (n, images), int64; "text" (n, L, W); "motion" and "pose" (n, F, 3, h, w); "reference", the
    clip's first frame, (n, C, h, w); "image", that frame's CLIP tokens, (n, L, W).
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        """Raises ValueError where the processes cannot share a batch evenly, or where data and network do not fit."""
        if config.batch_size % world.size:
            raise UsageError(f"--batch_size {config.batch_size} is no multiple of the {world.size} processes")
        self.config, self.world = config, world
        self.dataset = make_dataset(config)
        self.image_encoder = None
        if config.data.image_encoder is not None:
            from models.text.clip import load_clip_image  # transformers is slow to import

            self.image_encoder = load_clip_image(config.data.image_encoder, world.device)
        try:
            self._check_fit()
        except VideoError as error:
            raise UsageError(f"{config.data.path}: {error}") from error

    @property
    def skipped(self) -> str:
        """One line on the files that gave no clip, or nothing."""
        clips = self.dataset.dataset if isinstance(self.dataset, TextDataset) else self.dataset
        report = clips.report() if isinstance(clips, VideoFolder) else None
        return str(report) if report is not None and (report.unreadable or report.not_videos) else ""

    def after(self, step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The batches of step `step` + 1, and of all that follow."""
        world, device = self.world, self.world.device
        sampler = ResumableSampler(
            len(self.dataset),
            self.config.batch_size // world.size,
            rank=world.rank,
            world_size=world.size,
            seed=self.config.seed,
            start=step,
        )
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=self.config.data.workers,
            pin_memory=device.type == "cuda",
        )
        for batch in on_device(loader, device):
            yield self._inputs(batch)

    def first(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """x0 and conditions of the first `count` clips of the data, for looking at."""
        samples = [self.dataset[0, i % len(self.dataset)] for i in range(count)]
        return self._inputs({name: value.to(self.world.device) for name, value in default_collate(samples).items()})

    def _inputs(self, batch: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's inputs out of samples of the dataset, stacked and on the device."""
        network = self.config.network_config
        wanted = [name for name in network.conditions if name not in FROM_THE_STEP]
        conditions = {name: self._condition(name, batch) for name in wanted}
        if "y" in conditions and "image_label" in batch:
            conditions["image_labels"] = batch["image_label"]
        if not isinstance(network, VDMConfig):
            return _clip(batch), conditions
        motion = batch["motion"]
        return F.interpolate(motion.flatten(0, 1), network.frame_size, mode="area").view(
            *motion.shape[:3], *network.frame_size
        ), conditions

    def _condition(self, name: str, batch: Sample) -> Tensor:
        if name == "reference":
            return _clip(batch)[:, 0]
        if name == "image" and self.image_encoder is not None and "video" in batch:
            return self.image_encoder.encode(batch["video"][:, 0]).clone()  # out of inference mode
        source = _SOURCES.get(name, name)
        if source not in batch:
            raise UsageError(f"the network wants {name}: the data has {', '.join(batch)}")
        return batch[source]

    def _check_fit(self) -> None:
        """Put the first clip through the network, without values."""
        network = self.config.network_config
        x0, conditions = self.first(1)
        wanted = (network.num_frames + self.config.data.images, network.in_channels, *network.frame_size)
        if x0.shape[1:] != wanted:
            got = tuple(x0.shape[1:])
            raise UsageError(f"the data's clips are {got} (frames, channels, height, width), the model wants {wanted}")
        classes = getattr(self.dataset, "classes", ())
        if network.num_classes is not None and len(classes) > network.num_classes:
            raise UsageError(f"--model.num_classes {network.num_classes}, but the data has {len(classes)} classes")
        check_network(self.config, x0, conditions)


def on_device(batches: Iterable[Sample], device: torch.device) -> Iterator[Sample]:
    """The batches on the device. On a GPU the next one is copied there, by a stream of its own, while a step runs."""
    if device.type != "cuda":
        yield from batches  # the loader's are there
        return
    stream, copied = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            following = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        if copied is not None:
            yield copied
        torch.cuda.current_stream(device).wait_stream(stream)
        for value in following.values():
            value.record_stream(torch.cuda.current_stream(device))
        copied = following
    if copied is not None:
        yield copied


#: Conditions that a training step makes of the clips themselves.
FROM_THE_STEP = ("known", "given")

#: The entry of a sample that a condition is, where it has another name.
_SOURCES = {"y": "label"}


def _clip(batch: Sample) -> Tensor:
    return batch["latent"] if "latent" in batch else batch["video"]


def _pixel_channels(network: NetworkConfig) -> int:
    """Channels of the pixels that a network sees; a VDM sees those of the reference frame alone."""
    return (network.reference_channels or 1) if isinstance(network, VDMConfig) else network.in_channels

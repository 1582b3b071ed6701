"""The data of a run: the dataset that a configuration names, and its batches on the device from any step on."""

from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import DataLoader

from models.command_line import UsageError
from models.config import TrainConfig
from models.data import LatentDataset, MovingDigits, ResumableSampler, VideoError, VideoFolder
from models.data.seeded import SeededDataset
from models.networks import check_network
from models.training.distributed import World


def make_dataset(config: TrainConfig) -> SeededDataset:
    """The dataset of `config.data` with clips of the model's size, frames and channels."""
    data, network = config.data, config.network_config
    if data.kind == "digits":
        return MovingDigits(
            num_frames=network.num_frames,
            size=network.frame_size[0],
            channels=network.in_channels,
            length=data.length,
            seed=config.seed,
        )
    assert data.path is not None  # parse_train_config has seen to it
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

    x0 is float32 (n, F, C, H, W), with the joined images at the end of F; conditions are what the network takes
    besides, by the names of its `forward`: "y" (n,) and "image_labels" (n, images), int64, where it has classes.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        """Raises ValueError where the processes cannot share a batch evenly, or where data and network do not fit."""
        if config.batch_size % world.size:
            raise UsageError(f"--batch_size {config.batch_size} is no multiple of the {world.size} processes")
        self.config, self.world = config, world
        self.dataset = make_dataset(config)
        try:
            self._check_fit()
        except VideoError as error:
            raise UsageError(f"{config.data.path}: {error}") from error

    @property
    def skipped(self) -> str:
        """One line on the files that gave no clip, or nothing."""
        report = self.dataset.report() if isinstance(self.dataset, VideoFolder) else None
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
        for batch in loader:
            yield self._inputs({name: value.to(device, non_blocking=True) for name, value in batch.items()})

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's inputs out of samples of the dataset, stacked and on the device."""
        conditions = {name: self._condition(name, batch) for name in self.config.network_config.conditions}
        if "y" in conditions and "image_label" in batch:
            conditions["image_labels"] = batch["image_label"]
        return _clip(batch), conditions

    def _condition(self, name: str, batch: dict[str, Tensor]) -> Tensor:
        if _SOURCES[name] not in batch:
            raise UsageError(f"the network wants {name}, the data has {', '.join(batch)}")
        return batch[_SOURCES[name]]

    def _check_fit(self) -> None:
        """Put the first clip through the network, without values."""
        network = self.config.network_config
        x0, conditions = self._inputs({name: value[None] for name, value in self.dataset[0, 0].items()})
        wanted = (network.num_frames + self.config.data.images, network.in_channels, *network.frame_size)
        if x0.shape[1:] != wanted:
            got = tuple(x0.shape[1:])
            raise UsageError(f"the data's clips are {got} (frames, channels, height, width), the model wants {wanted}")
        classes = getattr(self.dataset, "classes", ())
        if network.num_classes is not None and len(classes) > network.num_classes:
            raise UsageError(f"--model.num_classes {network.num_classes}, but the data has {len(classes)} classes")
        check_network(self.config, x0, conditions)


#: Where the network's conditions are found in a sample of the data.
_SOURCES = {"y": "label", "text": "text", "motion": "motion", "pose": "pose"}


def _clip(batch: dict[str, Tensor]) -> Tensor:
    return batch["latent"] if "latent" in batch else batch["video"]

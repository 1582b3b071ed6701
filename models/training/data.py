"""The data of a run: the dataset that a configuration names, and its batches on the device from any step on."""

from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import DataLoader

from models.command_line import UsageError
from models.config import TrainConfig
from models.data import LatentDataset, MovingDigits, ResumableSampler, VideoError, VideoFolder
from models.data.seeded import SeededDataset
from models.training.distributed import World


def make_dataset(config: TrainConfig) -> SeededDataset:
    """The dataset of `config.data` with clips of the model's size, frames and channels."""
    data, model = config.data, config.model
    if data.kind == "digits":
        return MovingDigits(
            num_frames=model.num_frames,
            size=model.frame_size[0],
            channels=model.in_channels,
            length=data.length,
            seed=config.seed,
        )
    assert data.path is not None  # parse_train_config has seen to it
    if data.kind == "latents":
        return LatentDataset(
            data.path, num_frames=model.num_frames, frame_interval=data.frame_interval, seed=config.seed
        )
    return VideoFolder(
        data.path,
        num_frames=model.num_frames,
        frame_interval=data.frame_interval,
        size=model.frame_size,
        crop=data.crop,
        flip=data.flip,
        use_image_num=data.images,
        seed=config.seed,
    )


class Batches:
    """Endless (x0, conditions) on the device from the batch of step `start` on: this process's share of each.

    x0 is float32 (n, F, C, H, W), with the joined images at the end of F; conditions are what the network takes
    besides: "y" (n,) and "image_labels" (n, images), int64, where it is class-conditional.
    """

    def __init__(self, config: TrainConfig, world: World, start: int) -> None:
        """Raises UsageError where the processes cannot share a batch evenly, or where clips do not fit the model."""
        if config.batch_size % world.size:
            raise UsageError(f"--batch_size {config.batch_size} is no multiple of the {world.size} processes")
        self.dataset, self.device = make_dataset(config), world.device
        self.conditional = config.model.num_classes is not None
        try:
            _check_fit(self.dataset, config)
        except VideoError as error:
            raise UsageError(f"{config.data.path}: {error}") from error
        sampler = ResumableSampler(
            len(self.dataset),
            config.batch_size // world.size,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
            start=start,
        )
        self.loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=config.data.workers,
            pin_memory=self.device.type == "cuda",
        )

    @property
    def skipped(self) -> str:
        """One line on the files that gave no clip, or nothing."""
        report = self.dataset.report() if isinstance(self.dataset, VideoFolder) else None
        return str(report) if report is not None and (report.unreadable or report.not_videos) else ""

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The batches in order."""
        for batch in self.loader:
            sample = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            names = {"label": "y", "image_label": "image_labels"} if self.conditional else {}
            yield _clip(sample), {name: sample[key] for key, name in names.items() if key in sample}


def _clip(sample: dict[str, Tensor]) -> Tensor:
    return sample["latent"] if "latent" in sample else sample["video"]


def _check_fit(dataset: SeededDataset, config: TrainConfig) -> None:
    model, clip = config.model, _clip(dataset[0, 0])
    wanted = (model.num_frames + config.data.images, model.in_channels, *model.frame_size)
    if tuple(clip.shape) != wanted:
        raise UsageError(
            f"the data's clips are {tuple(clip.shape)} (frames, channels, height, width), the model wants {wanted}"
        )
    classes = getattr(dataset, "classes", ())
    if model.num_classes is not None and len(classes) > model.num_classes:
        raise UsageError(f"--model.num_classes {model.num_classes}, but the data has {len(classes)} classes")

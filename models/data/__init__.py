"""Datasets of clips, the sampler that orders them, real clips to try, and writers of clips."""

from models.data.clips import real_clip
from models.data.decode import VideoError
from models.data.digits import MovingDigits
from models.data.latents import LatentDataset
from models.data.motion import MotionDataset
from models.data.packaged import DownloadError
from models.data.seeded import ResumableSampler, SeededDataset
from models.data.video import VideoFolder
from models.data.write import contact_sheet, write_gif, write_mp4

__all__ = [
    "DownloadError",
    "LatentDataset",
    "MotionDataset",
    "MovingDigits",
    "ResumableSampler",
    "SeededDataset",
    "VideoError",
    "VideoFolder",
    "contact_sheet",
    "real_clip",
    "write_gif",
    "write_mp4",
]

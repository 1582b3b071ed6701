"""I3D's logits of clips, as FVD takes them, kept on disk so that no clip is run twice."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import convert_conv3d_weight_memory_format
from tqdm import tqdm

from models.array_files import read_array, write_array
from models.data.frames import to_float, to_uint8
from models.data.packaged import cache_folder
from models.evaluation.i3d import CLASSES, LEAST_FRAMES, SIDE
from models.evaluation.weights import load_i3d, weights_path

LAYER = "logits (400, averaged over time, before the softmax)"


class FeatureExtractor:
    """Turns clips into I3D's logits.

    A clip is rounded to 8 bits, as a file would hold it. Its features are kept under the digest of its pixels, in
    features/WEIGHTS/ of `cache`, so an interrupted evaluation goes on where it stopped, whatever the clips' order.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 8,
        cache: str | Path | None = None,
    ) -> None:
        """`weights`: see weights_path; `cache`: by default cache_folder(). Raises what load_i3d raises."""
        network, self.sha256 = load_i3d(weights_path(weights))
        self.device, self.batch_size = torch.device(device), batch_size
        # faster on the CPU than the contiguous form
        self.network = convert_conv3d_weight_memory_format(network.to(self.device), torch.channels_last_3d)
        self.folder = Path(cache or cache_folder()) / "features" / self.sha256[:16]

    def __call__(self, clips: Iterable[Tensor], *, progress: str = "", total: int | None = None) -> np.ndarray:
        """Features float32 (N, 400) of clips (F, C, H, W), floats in [-1, 1], C = 1 or 3, F >= 9.

        `progress` names a bar, of `total` clips. Raises ValueError for a clip of another shape.
        """
        rows: list[np.ndarray | None] = []
        waiting: list[tuple[int, Tensor, Path]] = []
        for clip in tqdm(clips, desc=progress, total=total, unit="clip", disable=not progress, dynamic_ncols=True):
            check_clip(clip)
            pixels = to_uint8(clip.cpu())
            path = self._path(pixels)
            rows.append(read_array(path, (CLASSES,)))
            if rows[-1] is None:
                waiting.append((len(rows) - 1, pixels, path))
            if len(waiting) == self.batch_size:
                self._run(waiting, rows)
        self._run(waiting, rows)
        return np.stack([row for row in rows if row is not None]) if rows else np.empty((0, CLASSES), np.float32)

    def _run(self, waiting: list[tuple[int, Tensor, Path]], rows: list[np.ndarray | None]) -> None:
        """Fill the rows of the clips that wait, one shape at a time, keep each on disk, and empty the list."""
        for shape in dict.fromkeys(pixels.shape for _, pixels, _ in waiting):
            part = [entry for entry in waiting if entry[1].shape == shape]
            videos = torch.stack([pixels for _, pixels, _ in part]).to(self.device)
            for (row, _, path), features in zip(part, self._features(videos), strict=True):
                rows[row] = features
                write_array(path, features)
        waiting.clear()

    @torch.inference_mode()
    def _features(self, videos: Tensor) -> np.ndarray:
        """uint8 (B, F, C, H, W) -> float32 (B, 400)."""
        inputs = to_i3d_input(to_float(videos)).contiguous(memory_format=torch.channels_last_3d)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.network(inputs).float().cpu().numpy()

    def _path(self, pixels: Tensor) -> Path:
        digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
        digest.update(pixels.contiguous().numpy().data)
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.npy"


def check_clip(clip: Tensor) -> None:
    """Raise ValueError unless the clip is finite and (F, C, H, W) with C of 1 or 3 and frames enough for I3D."""
    if clip.ndim != 4 or clip.shape[1] not in (1, 3) or len(clip) < LEAST_FRAMES:
        raise ValueError(
            f"a clip must be (F, C, H, W) with F of at least {LEAST_FRAMES} and C of 1 or 3, got {tuple(clip.shape)}"
        )
    if not clip.isfinite().all():
        raise ValueError("a clip must be finite, got NaN or infinity")


def to_i3d_input(videos: Tensor) -> Tensor:
    """float (B, F, C, H, W) in [-1, 1] -> (B, 3, F, 224, 224), each frame resized bilinearly (no antialiasing).

    Frames that are not square are stretched, as in FVD's own code. Pixel centres are aligned as StyleGAN-V's code
    aligns them (align_corners=False); TensorFlow 1's resize of the first code aligns the top left corners.
    """
    batch, frames = videos.shape[:2]
    resized = F.interpolate(videos.flatten(0, 1), (SIDE, SIDE), mode="bilinear", align_corners=False)
    return resized.expand(-1, 3, -1, -1).unflatten(0, (batch, frames)).transpose(1, 2)

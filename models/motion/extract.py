"""Motion out of real frames: flow from the first frame to each, by an extractor, and the occlusion maps."""

import math
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.command_line import UsageError
from models.motion.dis import DenseInverseSearch
from models.motion.occlusion import visible
from models.motion.raft import Raft

LEAST_SIDE = 256  # smaller frames are enlarged for the extractor: DIS works on patches of 8 pixels at half the size
_MULTIPLE = 8  # of the sides, for RAFT


class Extractor(Protocol):
    """A method of optical flow. `identity` names it and its weights: equal identities give equal flow."""

    identity: str

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        """Flow float32 (N, 2, H, W) in pixels, on the CPU: source at (x, y) shows target at (x + dx, y + dy).

        source, target: uint8 (N, 3, H, W) on the CPU, sides of at least LEAST_SIDE and multiples of 8.
        """


def load_extractor(
    name: Literal["dis", "raft"], weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """The extractor of this name; `weights` and `device` are RAFT's. Raises ValueError or OSError in one line."""
    if (name == "raft") != (weights is not None):
        wanted = "wants --raft, the path of torchvision's RAFT weights" if name == "raft" else "does not go with --raft"
        raise UsageError(f"--extractor {name} {wanted}")
    return DenseInverseSearch() if weights is None else Raft(weights, device)


def clip_motion(clip: Tensor, extractor: Extractor) -> tuple[Tensor, Tensor]:
    """(flow (F, 2, H, W), occlusion map (F, 1, H, W)), float32 on the CPU, of a clip uint8 (F, 3, H, W).

    The forms are those of models.motion.forms; the map is hard, by the forward-backward check. Frame 0: flow 0, map 1.
    """
    frames, height, width = clip.shape[0], clip.shape[-2], clip.shape[-1]
    large = _enlarged(clip)
    first, others = large[:1].expand(frames - 1, -1, -1, -1), large[1:]
    flow, occlusion = torch.zeros(frames, 2, height, width), torch.ones(frames, 1, height, width)
    if frames > 1:
        flow[1:] = _fitted(extractor(others, first), (height, width))
        occlusion[1:] = visible(flow[1:], _fitted(extractor(first, others), (height, width)))
    return flow, occlusion


def _enlarged(clip: Tensor) -> Tensor:
    scale = max(LEAST_SIDE / min(clip.shape[-2:]), 1)
    size = [math.ceil(side * scale / _MULTIPLE) * _MULTIPLE for side in clip.shape[-2:]]
    return clip if size == list(clip.shape[-2:]) else F.interpolate(clip, size, mode="bicubic", antialias=True)


def _fitted(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Flow resized to `size` (height, width), in pixels of it."""
    ratio = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]]).view(2, 1, 1)
    return F.interpolate(flow, size, mode="bilinear", antialias=True) * ratio

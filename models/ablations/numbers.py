"""Numbers that are read off clips: how a bright object moves and stays whole, and how near frames are to the truth.

Clips are float32 (N, F, C, H, W) in [-1, 1]; a number of each clip is float64 (N,).
"""

import torch
from torch import Tensor

from models.motion import from_network, warp


def centroids(clips: Tensor) -> Tensor:
    """The centre of a bright object's ink in each frame, (N, F, 2) as (x, y) in pixels, float64.

    Ink is brightness above -1; a frame without any has its centre in the middle.
    """
    ink = (clips.double().mean(2) + 1).clamp(min=0)
    height, width = ink.shape[-2:]
    total = ink.sum((-2, -1)).clamp(min=torch.finfo(torch.float64).tiny)
    x = (ink.sum(-2) * torch.arange(width).double()).sum(-1) / total
    y = (ink.sum(-1) * torch.arange(height).double()).sum(-1) / total
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    empty = ink.flatten(-2).amax(-1) == 0
    return torch.where(empty[..., None], centre, torch.stack([x, y], -1))


def jerk(clips: Tensor) -> Tensor:
    """Mean length of the second difference of the centroids' path, in pixels: 0 for uniform motion."""
    return centroids(clips).diff(n=2, dim=1).norm(dim=-1).mean(1)


def path_error(clips: Tensor, truth: Tensor) -> Tensor:
    """Mean distance of the centroids from those of the true clips, in pixels."""
    return (centroids(clips) - centroids(truth)).norm(dim=-1).mean(1)


def ink_variation(clips: Tensor) -> Tensor:
    """Standard deviation over frames of a frame's whole ink, over its mean: 0 where nothing comes or goes."""
    ink = (clips.double() + 1).clamp(min=0).sum((2, 3, 4))
    return ink.std(1) / ink.mean(1).clamp(min=torch.finfo(torch.float64).tiny)


def warp_error(clips: Tensor, motion: Tensor) -> Tensor:
    """Mean |frame i - frame 1 seen through the flow| where frame 1 shows the point, over frames 2 and on.

    motion (N, F, 3, H, W) is in the network's form, see models.motion.
    """
    flow, visible = from_network(motion.double())
    seen = warp(clips.double()[:, :1], flow)
    error = (seen - clips).abs().mean(2, keepdim=True)[:, 1:]
    weight = visible[:, 1:]
    return (error * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4)).clamp(min=1)


def psnr(clips: Tensor, truth: Tensor, given: Tensor) -> Tensor:
    """Peak signal to noise in dB of the frames that were not given (given: bool (F,)), for the range [-1, 1]."""
    error = (clips.clamp(-1, 1).double() - truth)[:, ~given].square().mean((1, 2, 3, 4))
    return 10 * torch.log10(4 / error)

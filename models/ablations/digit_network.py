"""A small network that names a moving digit and follows its path: class accuracy, and features for a Frechet distance.

I3D was trained on large videos of people; on digits of 16 x 16 its features say little, and cost a second a clip.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ablations.numbers import centroids
from models.data import MovingDigits
from models.training.checkpointing import atomic_file

SIDE = 16  # pixels; larger clips are reduced to it
FEATURES = 64
STEPS, BATCH, RATE = 400, 64, 2e-3
SEED = 2**31  # of weights and clips: no study's
CLASSES = len(MovingDigits.classes)


class DigitNetwork(nn.Module):
    """3-D convolutions over clips, their mean as features, and linear heads for the class and the path."""

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        widths = (1, 24, 48, FEATURES)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv3d(before, after, 3, stride=(1 if i == 0 else 2, 2, 2), padding=1)]
            layers += [nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.Linear(FEATURES, CLASSES + 2 * num_frames)

    def features(self, clips: Tensor) -> Tensor:
        """(N, 64) of clips (N, F, C, H, W) in [-1, 1]."""
        grey = clips.mean(2)
        if grey.shape[-2:] != (SIDE, SIDE):
            grey = F.interpolate(grey, (SIDE, SIDE), mode="area")
        return self.body(grey[:, None]).mean((2, 3, 4))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class (N, 10), and the path (N, F, 2) as offsets from the middle over half a side."""
        logits, path = self.heads(self.features(clips)).split([CLASSES, 2 * self.num_frames], dim=1)
        return logits, path.unflatten(1, (self.num_frames, 2))


def digit_network(num_frames: int, cache: Path) -> DigitNetwork:
    """The network for clips of so many frames, in evaluation mode: read from `cache`, or trained and kept there."""
    path = cache / f"digits_{num_frames}.pt"
    network = DigitNetwork(num_frames)
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        network = _train(num_frames)
        with atomic_file(path) as temporary:
            torch.save(network.state_dict(), temporary)
    return network.eval().requires_grad_(False)


def _train(num_frames: int) -> DigitNetwork:
    data = MovingDigits(num_frames=num_frames, size=SIDE, length=STEPS * BATCH, seed=SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = DigitNetwork(num_frames)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=STEPS)
    for step in range(STEPS):
        samples = [data[i] for i in range(step * BATCH, (step + 1) * BATCH)]
        clips = torch.stack([sample["video"] for sample in samples])
        labels = torch.stack([sample["label"] for sample in samples])
        logits, path = network(clips)
        wanted = (2 * centroids(clips) / (SIDE - 1) - 1).float()
        loss = F.cross_entropy(logits, labels) + 10 * F.mse_loss(path, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network

"""I3D, the network whose outputs FVD compares (Carreira and Zisserman 2017, "Quo Vadis, Action Recognition?").

The RGB network of Kinetics-400: Inception-v1 with its filters inflated to three dimensions, for inference only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 400
SIDE = 224  # pixels
LEAST_FRAMES = 9  # time is divided by 8, rounded up, and two steps are pooled

_POOL = (2, 7, 7)  # of the last averaging: frames, height, width
_MIXED = {  # channels: 1x1; 1x1 before 3x3, 3x3; 1x1 before 3x3, 3x3; 1x1 after pooling
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_POOLS = {  # before these blocks: window and stride
    "Mixed_4b": ("MaxPool3d_4a_3x3", (3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ("MaxPool3d_5a_2x2", (2, 2, 2), (2, 2, 2)),
}


class I3D(nn.Module):
    """Videos float (B, 3, F, 224, 224) in [-1, 1], F >= 9, to logits (B, 400).

    The logits are averaged over time, before the softmax: the layer that FVD uses. Padding is TensorFlow's SAME,
    which puts the odd line at the end, so any F serves. The blocks have the names of the published network.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "Conv3d_1a_7x7": Unit3D(3, 64, 7, 2),
            "MaxPool3d_2a_3x3": MaxPool((1, 3, 3), (1, 2, 2)),
            "Conv3d_2b_1x1": Unit3D(64, 64),
            "Conv3d_2c_3x3": Unit3D(64, 192, 3),
            "MaxPool3d_3a_3x3": MaxPool((1, 3, 3), (1, 2, 2)),
        }
        width = 192
        for name, channels in _MIXED.items():
            if name in _POOLS:
                pool, window, stride = _POOLS[name]
                layers[pool] = MaxPool(window, stride)
            layers[name] = Mixed(width, channels)
            width = channels[0] + channels[2] + channels[4] + channels[5]
        self.features = nn.Sequential()
        for name, layer in layers.items():
            self.features.add_module(name, layer)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, video: Tensor) -> Tensor:
        """Raises ValueError for another shape."""
        if video.shape[1:2] + video.shape[3:] != (3, SIDE, SIDE) or video.shape[2] < LEAST_FRAMES:
            raise ValueError(
                f"video must be (B, 3, F, {SIDE}, {SIDE}) with F of at least {LEAST_FRAMES}, got {tuple(video.shape)}"
            )
        pooled = F.avg_pool3d(self.features(video), _POOL, stride=1)  # (B, C, f, 1, 1)
        return self.classifier(pooled.mean((2, 3, 4)))  # linear, so the mean over time may come first


class Unit3D(nn.Module):
    """Convolution and ReLU; the published batch normalisation, of inference, is folded into weight and bias."""

    def __init__(self, inputs: int, outputs: int, side: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.window, self.stride = (side,) * 3, (stride,) * 3
        self.conv = nn.Conv3d(inputs, outputs, side, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W), each of F, H, W divided by the stride and rounded up."""
        return F.relu_(self.conv(pad_same(x, self.window, self.stride)))


class MaxPool(nn.Module):
    """The greatest value of a window. Padding with 0 changes none, as every input comes from a ReLU."""

    def __init__(self, window: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.window, self.stride = window, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W), each of F, H, W divided by its stride and rounded up."""
        return F.max_pool3d(pad_same(x, self.window, self.stride), self.window, self.stride)


class Mixed(nn.Module):
    """An Inception block: four branches side by side, joined along the channels."""

    def __init__(self, inputs: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                nn.Sequential(Unit3D(inputs, channels[0])),
                nn.Sequential(Unit3D(inputs, channels[1]), Unit3D(channels[1], channels[2], 3)),
                nn.Sequential(Unit3D(inputs, channels[3]), Unit3D(channels[3], channels[4], 3)),
                nn.Sequential(MaxPool((3, 3, 3)), Unit3D(inputs, channels[5])),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) with the sum of the branches' channels."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def pad_same(x: Tensor, window: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around (B, C, F, H, W) so that ceil(size / stride) windows fit; of an odd number, the greater half last."""
    sides: list[int] = []
    for size, length, step in zip(reversed(x.shape[2:]), reversed(window), reversed(stride), strict=True):
        total = max((-(-size // step) - 1) * step + length - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides) if any(sides) else x

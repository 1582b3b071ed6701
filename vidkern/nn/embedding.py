"""Embeddings of the three inputs of a diffusion transformer: latent patches, timesteps and class labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkern import ops
from vidkern.nn.linear import xavier_linear

#: Standard deviation of the first weights of timestep and label embeddings (DiT).
EMBEDDING_STD = 0.02


class PatchEmbed(nn.Module):
    """Cut clips into patches and project each to one token: (B, F, C, H, W) -> (B, F / frames, N, D).

    A patch is ``frames`` x ``patch_size`` x ``patch_size``: frames = 1 is the uniform embedding of Latte (one frame at
    a time), more is a tubelet (Arnab et al. 2021), which compresses time. N = (H / patch_size) * (W / patch_size), row
    by row. The projection is a convolution whose stride is its kernel, computed as the matrix product that it is, so
    tokens come out in their final layout.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int, frames: int = 1) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.frames = frames
        if frames == 1:
            self.proj: nn.Conv2d | nn.Conv3d = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        else:
            kernel = (frames, patch_size, patch_size)
            self.proj = nn.Conv3d(in_channels, hidden_size, kernel, kernel)
        nn.init.xavier_uniform_(self.proj.weight.detach().flatten(1))
        self.proj.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Embed x (B, F, C, H, W); F, H and W must be multiples of the patch's sizes."""
        frames, height, width = x.shape[1], x.shape[3], x.shape[4]
        if frames % self.frames or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"x must have (F, H, W) multiples of the patch {(self.frames, self.patch_size, self.patch_size)}, "
                f"got {(frames, height, width)}"
            )
        x = x.unflatten(1, (-1, self.frames))
        x = x.unflatten(-1, (-1, self.patch_size)).unflatten(-3, (-1, self.patch_size))
        patches = x.permute(0, 1, 4, 6, 3, 2, 5, 7)  # (B, F', h, w, C, pf, ph, pw)
        return F.linear(patches.flatten(4).flatten(2, 3), self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int, frames: int = 1) -> Tensor:
    """Undo the cutting of :class:`PatchEmbed`: (B, F', N, frames * p * p * C) -> (B, F' * frames, C, H, W).

    Args:
        tokens: one row (frame, row, column, channel) of a patch's values for each token.
        grid: patches in a frame as (rows, columns), with N = rows * columns.
        patch_size: p.
        frames: frames in a patch.
    """
    x = tokens.unflatten(2, grid).unflatten(-1, (frames, patch_size, patch_size, -1))
    x = x.permute(0, 1, 4, 7, 2, 5, 3, 6)  # (B, F', pf, C, h, ph, w, pw)
    return x.flatten(6, 7).flatten(4, 5).flatten(1, 2)


class TimestepEmbedder(nn.Module):
    """Embed diffusion timesteps: sinusoid, Linear, SiLU, Linear (DiT, Peebles & Xie 2023)."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        first, last = xavier_linear(frequency_size, hidden_size), xavier_linear(hidden_size, hidden_size)
        nn.init.normal_(first.weight, std=EMBEDDING_STD)
        nn.init.normal_(last.weight, std=EMBEDDING_STD)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, t: Tensor) -> Tensor:
        """Embed t of any shape, integer or float: (...) -> (..., D), in the weights' (or autocast's) dtype."""
        frequencies = ops.timestep_embedding(t, self.frequency_size)
        return self.mlp(frequencies.to(self.mlp.get_parameter("0.weight").dtype))


class LabelEmbedder(nn.Module):
    """Embed class labels, with a learned null class for classifier-free guidance (Ho & Salimans 2022).

    The table has ``num_classes + 1`` rows; the last is the null class.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=EMBEDDING_STD)

    def forward(self, labels: Tensor) -> Tensor:
        """Embed labels (B, ...) int64 in [0, num_classes]: (B, ..., D).

        In training a sample's labels become the null class together, with probability ``dropout``, drawn on the device.
        """
        if self.training and self.dropout > 0:
            draws = torch.rand(labels.shape[:1] + (1,) * (labels.dim() - 1), device=labels.device)
            labels = labels.masked_fill(draws < self.dropout, self.num_classes)
        return self.embedding_table(labels)

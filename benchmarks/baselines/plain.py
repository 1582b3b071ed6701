"""Latte and FVDM as their public code computes them, in plain PyTorch: rearranges, unfused norm and modulation.

Nothing here is the library's but the configuration. The networks share parameter names with
:class:`models.latte.Latte`, so that one state_dict serves both; their weights are meant to be loaded.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.latte import LatteConfig

AttentionKind = Literal["softmax", "sdpa"]

FREQUENCIES = 256


class PlainAttention(nn.Module):
    """Multi-head attention over the middle dimension of (batch, tokens, D)."""

    def __init__(self, hidden_size: int, num_heads: int, kind: AttentionKind) -> None:
        super().__init__()
        self.num_heads, self.kind = num_heads, kind
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, D) -> (batch, tokens, D)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        if self.kind == "sdpa":
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            o = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return self.proj(rearrange(o, "b h n d -> b n (h d)"))


class PlainMlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.act(self.fc1(x)))


class PlainBlock(nn.Module):
    """adaLN-Zero block on (batch, tokens, D); the condition is (batch, D), or one for every token."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, kind: AttentionKind) -> None:
        super().__init__()
        self.attn = PlainAttention(hidden_size, num_heads, kind)
        self.mlp = PlainMlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (batch, tokens, D), c (batch, 1 or tokens, D) -> (batch, tokens, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_a * self.attn(_norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(_norm(x) * (1 + scale_m) + shift_m)


class PlainPatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, of frames (batch, C, H, W) -> (batch, N, D)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches, row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class PlainTimestepEmbedder(nn.Module):
    """Sinusoid, Linear, SiLU, Linear of timesteps of any shape."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        angles = t[..., None].float() * frequencies
        embedded = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return self.mlp(embedded.to(self.mlp.get_parameter("0.weight").dtype))


class PlainLabelEmbedder(nn.Module):
    """A table of labels whose last row is the null class, which training puts in place of some."""

    def __init__(self, num_classes: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(len(labels), device=labels.device) < self.dropout
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class PlainFinalLayer(nn.Module):
    """Norm, modulation and a Linear to a patch's values."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (batch, tokens, D), c (batch, 1, D) -> (batch, tokens, patch_values)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(_norm(x) * (1 + scale) + shift)


class PlainLatte(nn.Module):
    """Latte's first variant; with t of shape (B, F), FVDM, whose temporal blocks modulate every token on its own."""

    def __init__(self, config: LatteConfig, kind: AttentionKind = "softmax") -> None:
        super().__init__()
        if config.variant != 1 or config.patch_frames != 1 or config.temporal_position != "absolute":
            raise ValueError("config must be the public code's: variant 1, uniform patches, absolute positions")
        self.config = config
        size = config.hidden_size
        self.x_embedder = PlainPatchEmbed(config.patch_size, config.in_channels, size)
        self.t_embedder = PlainTimestepEmbedder(size)
        if config.num_classes is not None:
            self.y_embedder = PlainLabelEmbedder(config.num_classes, size, config.class_dropout)
        self.blocks = nn.ModuleList(
            PlainBlock(size, config.num_heads, config.mlp_ratio, kind) for _ in range(config.depth)
        )
        self.final_layer = PlainFinalLayer(size, config.patch_size**2 * config.out_channels)
        height, width = config.frame_size
        places = (height // config.patch_size) * (width // config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, places, size), requires_grad=False)
        self.temp_embed = nn.Parameter(torch.zeros(1, config.num_frames, size), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict as :meth:`models.latte.Latte.forward` does: (B, F, C, H, W) -> (B, F, C_out, H, W)."""
        batch, frames = x.shape[:2]
        tokens = self.x_embedder(rearrange(x, "b f c h w -> (b f) c h w")) + self.pos_embed
        per_frame = t.dim() == 2
        c = self.t_embedder(t) if per_frame else repeat(self.t_embedder(t), "b d -> b f d", f=frames)
        if y is not None:
            c = c + self.y_embedder(y)[:, None]
        c_space = rearrange(c, "b f d -> (b f) 1 d")
        places = tokens.shape[1]
        if per_frame:
            c_time = repeat(c, "b f d -> (b n) f d", n=places)
        else:
            c_time = repeat(c[:, 0], "b d -> (b n) 1 d", n=places)
        for i in range(0, len(self.blocks), 2):
            tokens = self.blocks[i](tokens, c_space)
            tokens = rearrange(tokens, "(b f) n d -> (b n) f d", f=frames)
            if i == 0:
                tokens = tokens + self.temp_embed[:, :frames]
            tokens = self.blocks[i + 1](tokens, c_time)
            tokens = rearrange(tokens, "(b n) f d -> (b f) n d", n=places)
        patches = self.final_layer(tokens, c_space)
        p, rows = self.config.patch_size, x.shape[3] // self.config.patch_size
        return rearrange(patches, "(b f) (h w) (p q c) -> b f c (h p) (w q)", b=batch, h=rows, p=p, q=p)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)

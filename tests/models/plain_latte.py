"""Latte written plainly from a state dict, with rearranged tokens and explicit softmax, to hold the model against."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.latte import LatteConfig

Weights = dict[str, Tensor]


def plain_latte(w: Weights, config: LatteConfig, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """Compute the network in float64 for x (B, F, C, H, W), t (B, F), y (B,)."""
    p, pf, size = config.patch_size, config.patch_frames, config.hidden_size
    kernel = w["x_embedder.proj.weight"].reshape(size, config.in_channels, pf, p, p)
    h = F.conv3d(x.transpose(1, 2), kernel, w["x_embedder.proj.bias"], stride=(pf, p, p))
    rows, columns = h.shape[-2:]
    h = rearrange(h, "b d f h w -> b f (h w) d") + grid_positions(rows, columns, size)
    c = time_embedding(w, t)
    c = rearrange(c, "b (f k) d -> b f k d", k=pf).mean(2)
    if y is not None:
        c = c + w["y_embedder.embedding_table.weight"][y][:, None]
    in_time = [i for i, attention in enumerate(config.attentions) if attention != "spatial"]
    for i, attention in enumerate(config.attentions):
        if i == in_time[0] and config.temporal_position == "absolute":
            h = h + positions(torch.arange(h.shape[1]), size)[:, None]
        h = block(w, f"blocks.{i}.", attention, config, h, c)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", F.silu(c))[:, :, None].chunk(2, -1)
    h = linear(w, "final_layer.linear", F.layer_norm(h, (size,), eps=1e-6) * (1 + scale) + shift)
    return rearrange(
        h, "b f (h w) (k p q c) -> b (f k) c (h p) (w q)", h=rows, w=columns, k=pf, p=p, q=p, c=config.out_channels
    )


def block(w: Weights, prefix: str, attention: str, config: LatteConfig, x: Tensor, c: Tensor) -> Tensor:
    mod = linear(w, prefix + "adaLN_modulation.1", F.silu(c))[:, :, None]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = mod.chunk(6, -1)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_a) + shift_a
    x = x + gate_a * attend(w, prefix + "attn.", attention, config, h)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_m) + shift_m
    h = F.gelu(linear(w, prefix + "mlp.fc1", h), approximate="tanh")
    return x + gate_m * linear(w, prefix + "mlp.fc2", h)


def attend(w: Weights, prefix: str, attention: str, config: LatteConfig, h: Tensor) -> Tensor:
    if attention == "space_then_time":
        h = attend(w, prefix + "spatial.", "spatial", config, h)
        return attend(w, prefix + "temporal.", "temporal", config, h)
    q, k, v = rearrange(linear(w, prefix + "qkv", h), "b f n (k h d) -> k b h f n d", k=3, h=config.num_heads)
    half = config.num_heads // 2
    if attention == "spatial":
        o = softmax_attention(q, k, v)
    elif attention == "temporal":
        o = over_frames(config, q, k, v)
    else:
        space = softmax_attention(q[:, :half], k[:, :half], v[:, :half])
        o = torch.cat([space, over_frames(config, q[:, half:], k[:, half:], v[:, half:])], dim=1)
    return linear(w, prefix + "proj", rearrange(o, "b h f n d -> b f n (h d)"))


def over_frames(config: LatteConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (rearrange(part, "b h f n d -> b h n f d") for part in (q, k, v))
    if config.temporal_position == "rope":
        q, k = rotate(q), rotate(k)
    return rearrange(softmax_attention(q, k, v), "b h n f d -> b h f n d")


def rotate(x: Tensor) -> Tensor:
    """Multiply channels (2k, 2k + 1), as a complex number, by exp(i f 10000^(-2k / d))."""
    d = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[-2]).double(), 10000.0 ** (-torch.arange(0, d, 2).double() / d))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def time_embedding(w: Weights, t: Tensor) -> Tensor:
    angles = t[..., None].double() * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    h = F.silu(linear(w, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1)))
    return linear(w, "t_embedder.mlp.2", h)


def grid_positions(rows: int, columns: int, size: int) -> Tensor:
    table = [
        torch.cat([positions(torch.tensor([column]), size // 2)[0], positions(torch.tensor([row]), size // 2)[0]])
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(table)


def positions(at: Tensor, size: int) -> Tensor:
    angles = torch.outer(at.double(), 10000.0 ** (-2 * torch.arange(size // 2).double() / size))
    return torch.cat([angles.sin(), angles.cos()], -1)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])

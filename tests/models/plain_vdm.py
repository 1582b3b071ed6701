"""VDM written plainly from a state dict, channels first with rearranged tokens, to hold the model against."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from models.vdm import VDMConfig
from tests.models.plain_latte import Weights, linear, rotate, softmax_attention, time_embedding


def plain_vdm(
    w: Weights,
    config: VDMConfig,
    x: Tensor,
    t: Tensor,
    text: Tensor | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """Compute the network in float64 for x (B, F, C, H, W), t (B, F), text (B, L, W), reference (B, C, h, w)."""
    x = rearrange(x, "b f c h w -> b c f h w")
    if reference is not None:
        resized = F.adaptive_avg_pool2d(reference, x.shape[-2:])
        x = torch.cat([x, repeat(resized, "b c h w -> b c f h w", f=x.shape[2])], 1)
    c = time_embedding(w, t)
    if text is not None:
        pooled = pool(w, text)
        c = torch.cat([c, repeat(pooled, "b d -> b f d", f=c.shape[1])], -1)
    x = first = in_time(w, "in_time.", config, conv(w, "in_conv", x))
    skips = []
    levels = len(config.channel_multipliers)
    for i in range(levels):
        x = level(w, f"downs.{i}.", config, x, c, i >= config.spatial_from)
        skips.append(x)
        if i < levels - 1:
            x = conv(w, f"downsamplers.{i}", x, stride=2)
    x = residual(w, "middle.block1.", x, c)
    x = in_time(w, "middle.time.", config, in_space(w, "middle.space.", config, x))
    x = residual(w, "middle.block2.", x, c)
    for i in reversed(range(levels)):
        x = level(w, f"ups.{i}.", config, torch.cat([x, skips[i]], 1), c, i >= config.spatial_from)
        if i > 0:
            x = repeat(x, "b c f h w -> b c f (h p) (w q)", p=2, q=2)
            kernel = w[f"upsamplers.{i - 1}.weight"][:, :, None]
            x = F.conv3d(x, kernel, w[f"upsamplers.{i - 1}.bias"], padding=(0, 1, 1))
    x = residual(w, "out_block.", torch.cat([x, first], 1), c)
    return rearrange(linear(w, "out_linear", x.movedim(1, -1)), "b f h w c -> b f c h w")


def pool(w: Weights, text: Tensor, heads: int = 4) -> Tensor:
    h = F.layer_norm(text, text.shape[-1:], w["text_pool.norm.weight"], w["text_pool.norm.bias"])
    q = w["text_pool.query"].expand(len(text), -1, -1)
    projections = (w[f"text_pool.attention.{part}_proj_weight"] for part in "qkv")
    biases = w["text_pool.attention.in_proj_bias"].chunk(3)
    parts = (F.linear(v, m, b) for v, m, b in zip((q, h, h), projections, biases, strict=True))
    q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=heads) for part in parts)
    o = rearrange(softmax_attention(q, k, v), "b h 1 d -> b (h d)")
    return linear(w, "text_pool.attention.out_proj", o)


def level(w: Weights, prefix: str, config: VDMConfig, x: Tensor, c: Tensor, spatial: bool) -> Tensor:
    x = residual(w, prefix + "block2.", residual(w, prefix + "block1.", x, c), c)
    if spatial:
        x = in_space(w, prefix + "space.", config, x)
    return in_time(w, prefix + "time.", config, x)


def conv(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    return F.conv3d(x, w[f"{name}.weight"], w[f"{name}.bias"], (1, stride, stride), (0, 1, 1))


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


def residual(w: Weights, prefix: str, x: Tensor, c: Tensor) -> Tensor:
    modulation = linear(w, prefix + "modulation.1", F.silu(c))
    scale, shift = rearrange(modulation, "b f (k c) -> k b c f 1 1", k=2)
    h = F.silu(rms(conv(w, prefix + "conv1", x)) * (1 + scale) + shift)
    h = F.silu(rms(conv(w, prefix + "conv2", h)) * w[prefix + "weight"].view(-1, 1, 1, 1))
    if prefix + "skip.weight" in w:
        x = linear(w, prefix + "skip", x.movedim(1, -1)).movedim(-1, 1)
    return x + h


def project(w: Weights, prefix: str, config: VDMConfig, x: Tensor) -> Tensor:
    """(B, C, F, H, W) -> q, k, v (3, B, F, H, W, heads, d)."""
    scale, shift = 1 + w[prefix + "norm_scale"], w[prefix + "norm_shift"]
    h = F.layer_norm(x.movedim(1, -1), x.shape[1:2], scale, shift, eps=1e-6)
    qkv = F.linear(h, w[prefix + "qkv.weight"])
    return rearrange(qkv, "b f h w (k n d) -> k b f h w n d", k=3, n=config.num_heads)


def in_space(w: Weights, prefix: str, config: VDMConfig, x: Tensor) -> Tensor:
    q, k, v = rearrange(project(w, prefix, config, x), "k b f h w n d -> k b f n (h w) d")
    o = rearrange(softmax_attention(q, k, v), "b f n (h w) d -> b f h w (n d)", h=x.shape[3])
    return x + linear(w, prefix + "proj", o).movedim(-1, 1)


def in_time(w: Weights, prefix: str, config: VDMConfig, x: Tensor) -> Tensor:
    q, k, v = rearrange(project(w, prefix, config, x), "k b f h w n d -> k b h w n f d")
    scores = rotate(q) @ rotate(k).mT / math.sqrt(q.shape[-1]) + bias(w, x.shape[2])
    o = rearrange(scores.softmax(-1) @ v, "b h w n f d -> b f h w (n d)")
    return x + linear(w, prefix + "proj", o).movedim(-1, 1)


def bias(w: Weights, frames: int) -> Tensor:
    """(heads, F, F) of fewer than 9 frames, where T5's 32 buckets hold one distance each, earlier keys first."""
    assert frames < 9
    table = w["relative_bias.relative_attention_bias.weight"]
    rows = [[table[q - k if k <= q else 16 + k - q] for k in range(frames)] for q in range(frames)]
    return torch.stack([torch.stack(row) for row in rows]).movedim(-1, 0)

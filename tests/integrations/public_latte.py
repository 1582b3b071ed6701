"""Small networks with the structure of the public Latte and FVDM code, written anew from what is known about it."""

import math

import torch
from einops import rearrange, repeat
from torch import nn


class Mlp(nn.Module):
    """As timm's, of which the public code takes it."""

    def __init__(self, size):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(size, 4 * size), nn.GELU(approximate="tanh"), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(4 * size, size), nn.Dropout(0.0)

    def forward(self, x):
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class Attention(nn.Module):
    def __init__(self, size, heads, attention_mode):
        super().__init__()
        self.num_heads, self.scale, self.attention_mode = heads, (size // heads) ** -0.5, attention_mode
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        p = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj(rearrange(p @ v, "b h n d -> b n (h d)")))


class Block(nn.Module):
    """Takes a condition for each of the batch's entries (B, D), or for each token (B, N, D), as FVDM's does in time."""

    def __init__(self, size, heads, attention_mode):
        super().__init__()
        self.norm1 = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(size, heads, attention_mode)
        self.norm2 = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, x, c):
        c = c if c.dim() == 3 else c[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    def __init__(self, size, patch_values):
        super().__init__()
        self.norm_final = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class PatchEmbed(nn.Module):
    def __init__(self, size, patch, channels):
        super().__init__()
        self.patch_size, self.proj = (patch, patch), nn.Conv2d(channels, size, patch, patch)

    def forward(self, x):
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class TimestepEmbedder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t, use_fp16=False):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[..., None].float() * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype)
        return self.mlp(waves.half() if use_fp16 else waves)


class LabelEmbedder(nn.Module):
    def __init__(self, classes, size):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, size)

    def forward(self, labels, train):
        return self.embedding_table(labels)


def build(model, input_size, size, heads, frames, classes, extras):
    """Give a network everything but its blocks."""
    model.extras, patch, channels = extras, 2, 4
    model.x_embedder, model.t_embedder = PatchEmbed(size, patch, channels), TimestepEmbedder(size)
    if extras == 2:
        model.y_embedder = LabelEmbedder(classes, size)
    if extras == 78:
        model.text_embedding_projection = nn.Sequential(nn.SiLU(), nn.Linear(77 * 768, size))
    model.pos_embed = nn.Parameter(torch.randn(1, (input_size // patch) ** 2, size), requires_grad=False)
    model.temp_embed = nn.Parameter(torch.randn(1, frames, size), requires_grad=False)
    model.final_layer = FinalLayer(size, patch * patch * 2 * channels)


def denoise(model, pairs, x, t, y, text_embedding, use_fp16):
    """Run a network with its tokens rearranged around each temporal block, and a copy of the condition for each."""
    batch, frames = x.shape[:2]
    z = model.x_embedder((x.half() if use_fp16 else x).flatten(0, 1)) + model.pos_embed
    places = z.shape[1]
    time = model.t_embedder(t, use_fp16=use_fp16)
    each_frame = time if time.dim() == 3 else repeat(time, "b d -> b f d", f=frames)
    last = each_frame
    if model.extras == 2:
        each_frame = last = each_frame + model.y_embedder(y, model.training)[:, None]
    if model.extras == 78:
        each_frame = each_frame + model.text_embedding_projection(text_embedding.flatten(1))[:, None]
    for i, (space, temporal) in enumerate(pairs):
        z = space(z, each_frame.flatten(0, 1))
        z = rearrange(z, "(b f) n d -> (b n) f d", b=batch)
        if i == 0:
            z = z + model.temp_embed
        condition = each_frame if time.dim() == 3 else each_frame[:, 0]
        z = temporal(z, condition.repeat_interleave(places, dim=0))
        z = rearrange(z, "(b n) f d -> (b f) n d", b=batch)
    return rearrange(model.unpatchify(model.final_layer(z, last.flatten(0, 1))), "(b f) c h w -> b f c h w", b=batch)


def unpatchify(x):
    side = math.isqrt(x.shape[1])
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=2, q=2)


class Latte(nn.Module):
    def __init__(self, input_size=8, size=64, depth=4, heads=2, frames=4, classes=5, extras=1, attention_mode="math"):
        super().__init__()
        build(self, input_size, size, heads, frames, classes, extras)
        self.blocks = nn.ModuleList(Block(size, heads, attention_mode) for _ in range(depth))

    def unpatchify(self, x):
        return unpatchify(x)

    def forward(self, x, t, y=None, text_embedding=None, use_fp16=False):
        pairs = zip(self.blocks[::2], self.blocks[1::2], strict=True)
        return denoise(self, pairs, x, t, y, text_embedding, use_fp16)

    def forward_with_cfg(self, x, t, y=None, cfg_scale=7.0, use_fp16=False, text_embedding=None):
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y=y, use_fp16=use_fp16, text_embedding=text_embedding)
        cond, uncond = out[:, :, :4].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, :, 4:]], dim=2)


class LatteVIDEO(nn.Module):
    def __init__(self, input_size=8, size=64, depth=4, heads=2, frames=4, classes=5, extras=1, attention_mode="math"):
        super().__init__()
        build(self, input_size, size, heads, frames, classes, extras)
        self.blocks_spatial = nn.ModuleList(Block(size, heads, attention_mode) for _ in range(depth // 2))
        self.blocks_temp = nn.ModuleList(Block(size, heads, attention_mode) for _ in range(depth // 2))

    def unpatchify(self, x):
        return unpatchify(x)

    def forward(self, x, t, y=None, text_embedding=None, use_fp16=False):
        pairs = zip(self.blocks_spatial, self.blocks_temp, strict=True)
        return denoise(self, pairs, x, t, y, text_embedding, use_fp16)


class LatteIMG(nn.Module):
    """The joint image and video network: other arguments."""

    def __init__(self):
        super().__init__()
        build(self, 8, 64, 2, 4, 5, 1)
        self.blocks = nn.ModuleList(Block(64, 2, "math") for _ in range(2))

    def forward(self, x, t, y=None, use_fp16=False, y_image=None, use_image_num=0):
        raise NotImplementedError

"""AutoencoderKLWan of diffusers (Wan 2.1 and 2.2), decode and encode, whole and tiled.

Everything between the first and the last convolution is channels_last_3d. A cache holds the kT - 1 = 2 frames before
a chunk, zeros before the first, in the lists that diffusers keeps (its own hold one frame after a chunk of one).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkern import ops
from vidkern.integrations import patching
from vidkern.integrations.streams import (
    autocast_dtype,
    blend_tiles,
    channels_last,
    check_upsampling,
    clip_of,
    convolve,
    frames_of,
    gather,
    norm_convolve,
    parameters,
    upsample_convolve,
)

_MODULE = "diffusers.models.autoencoders.autoencoder_kl_wan"

#: The code of diffusers 0.42 that is replaced, or that what replaces it stands for.
_KNOWN = {
    "AutoencoderKLWan": {
        "_encode": "22ad02b914e3",
        "_decode": "7c6f228efce7",
        "tiled_decode": "085f7c884583",
        "clear_cache": "8b72c490b40e",
    },
    "WanEncoder3d": {"forward": "9bea31452fb7"},
    "WanDecoder3d": {"forward": "927efe06256e"},
    "WanResidualBlock": {"forward": "82e9104df2ac"},
    "WanResidualDownBlock": {"forward": "181739bf0a12"},
    "WanResidualUpBlock": {"forward": "3cb1aa9e7628"},
    "WanAttentionBlock": {"forward": "d8f6ed1f6694"},
    "WanResample": {"forward": "3c0b8933703e"},
    "WanUpsample": {"forward": "8623452f43a3"},
    "WanCausalConv3d": {"__init__": "807b913d1e46", "forward": "afffb99acd51"},
    "WanRMS_norm": {"__init__": "8d19a15b6267", "forward": "fc44101b6513"},
    "AvgDown3D": {"__init__": "151de8184164", "forward": "e689d6dbbfff"},
    "DupUp3D": {"__init__": "5b72a10a2751", "forward": "a700e116fb63"},
}

#: diffusers' cache of an upsampling that has seen one chunk, and begins its convolution in time with the next.
_ONE_CHUNK_SEEN = "Rep"

Caches = list[Any] | None


def recognises(module: nn.Module) -> bool:
    """Return whether a module is an AutoencoderKLWan or of a subclass."""
    return patching.is_a(module, f"{_MODULE}.AutoencoderKLWan")


def apply_vidkern_to_wan_vae(
    model: nn.Module,
    *,
    conv: bool = True,
    norm: bool = True,
    resample: bool = True,
    shortcut: bool = True,
    attention: bool = True,
    assembly: bool = True,
) -> patching.Report:
    """Speed up an AutoencoderKLWan of diffusers 0.42 in place; results stay the same.

    Args:
        model: the autoencoder.
        conv: causal convolutions pad by an index rule, and copy nothing for kT = 1.
        norm: RMS norm, SiLU, padding and cache are written in one pass, in channels_last_3d throughout.
        resample: frames are doubled and upsampled without rearranging them, and an upsampled frame is never made: the
            convolution after it is four smaller ones of the frame before it.
        shortcut: Wan 2.2's shortcuts around a block's resampling are added in place, without copies of their input.
        attention: the middle block's attention reads its tokens where they lie.
        assembly: decoded chunks and tiles are written into one clip as they come.

    Returns:
        What was changed.

    Raises:
        ValueError: it is a subclass, another version, or already changed by somebody else; it is left as it was.
    """
    patching.check_class(model, f"{_MODULE}.AutoencoderKLWan")
    patching.check_sources(model, _KNOWN)
    plan = patching.Plan(model)
    for path, module in model.named_modules():
        name = type(module).__name__
        if name == "WanCausalConv3d" and conv and _is_causal(module):
            plan.replace(module, "forward", _convolution, "WanCausalConv3d: padding by an index rule")
        elif name == "WanResidualBlock" and norm:
            _check_absorbed(path, module, "norm1", "conv1", "norm2", "conv2", "nonlinearity")
            plan.replace(module, "forward", _residual_block, "WanResidualBlock: norm, SiLU, padding in one pass")
        elif name in ("WanEncoder3d", "WanDecoder3d") and norm:
            _check_absorbed(path, module, "norm_out", "conv_out", "conv_in", "nonlinearity")
            plan.replace(module, "forward", _ENDS[name], f"{name}: channels_last_3d, and the same for its head")
        elif name == "WanResample" and resample and module.mode != "none":
            _check_absorbed(path, module, *(["time_conv"] if hasattr(module, "time_conv") else []))
            if module.mode.startswith("upsample"):
                check_upsampling(module.resample[1], f"{path}.resample.1")
            plan.replace(module, "forward", _resample, "WanResample: no rearranging")
        elif name in _SHORTCUTS and shortcut:
            if module.avg_shortcut is not None:
                _check_absorbed(path, module, "avg_shortcut")
                _kept(module.avg_shortcut)
            plan.replace(module, "forward", _SHORTCUTS[name], f"{name}: shortcut added in place")
        elif name == "WanAttentionBlock" and attention:
            _check_absorbed(path, module, "norm", "to_qkv", "proj")
            plan.replace(module, "forward", _attention, "WanAttentionBlock: no rearranging")
    if assembly:
        for method, function in (("_encode", _encode), ("_decode", _decode), ("tiled_decode", _tiled_decode)):
            plan.replace(model, method, function, "method that assembles the clip: chunks written in place")
    return plan.apply()


def _check_absorbed(path: str, module: Any, *children: str) -> None:
    """Require that children whose parameters are read without calling them are what they were made as."""
    classes = {
        "norm": "WanRMS_norm",
        "conv": "WanCausalConv3d",
        "time": "WanCausalConv3d",
    }
    for name in children:
        child, where = getattr(module, name), f"{path}.{name}"
        wanted = classes.get(name[:4])
        if wanted is not None:
            patching.check_class(child, f"{_MODULE}.{wanted}", where)
        if name == "nonlinearity":
            patching.check_class(child, "torch.nn.modules.activation.SiLU", where)
        patching.check_unhooked(child, where)


def _is_causal(conv: Any) -> bool:
    time, height, width = conv.kernel_size
    return conv._padding == (width // 2, width // 2, height // 2, height // 2, time - 1, 0)


def _cached(caches: Caches, index: list[int], run: Callable[[Tensor | None], tuple[Tensor, Tensor]]) -> Tensor:
    """Run a convolution with its place in diffusers' list of caches, and move on to the next place."""
    if caches is None:
        return run(None)[0]
    y, caches[index[0]] = run(caches[index[0]])
    index[0] += 1
    return y


def _norm_options(norm: Any) -> dict[str, Any]:
    bias = norm.bias.view(-1) if isinstance(norm.bias, Tensor) else None
    # F.normalize divides by max(|x|, 1e-12)
    return {"norm": "rms", "weight": norm.gamma.view(-1), "bias": bias, "eps": 1e-24 / norm.gamma.numel()}


def _convolution(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    before = self.kernel_size[0] - 1
    cache = None
    if cache_x is not None and before > 0:
        cache = F.pad(cache_x.to(x.device), (0, 0, 0, 0, before - cache_x.shape[2], 0))
    x, weight, bias = parameters(x, self)
    return ops.causal_conv3d(x, weight, bias, stride=self.stride, cache=cache)


def _residual_block(self: Any, x: Tensor, feat_cache: Caches = None, feat_idx: list[int] = [0]) -> Tensor:  # noqa: B006
    shortcut = self.conv_shortcut(x)
    x = _cached(feat_cache, feat_idx, lambda c: norm_convolve(x, _norm_options(self.norm1), self.conv1, c))
    return _cached(
        feat_cache,
        feat_idx,
        lambda c: norm_convolve(x, _norm_options(self.norm2), self.conv2, c, shortcut, dropout=self.dropout),
    )


def _encoder(self: Any, x: Tensor, feat_cache: Caches = None, feat_idx: list[int] = [0]) -> Tensor:  # noqa: B006
    x = _first(self, x, feat_cache, feat_idx)
    for layer in self.down_blocks:
        x = layer(x) if feat_cache is None else layer(x, feat_cache=feat_cache, feat_idx=feat_idx)
    x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    return _head(self, x, feat_cache, feat_idx)


def _decoder(
    self: Any,
    x: Tensor,
    feat_cache: Caches = None,
    feat_idx: list[int] = [0],  # noqa: B006
    first_chunk: bool = False,
) -> Tensor:
    x = _first(self, x, feat_cache, feat_idx)
    x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    for block in self.up_blocks:
        x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
    return _head(self, x, feat_cache, feat_idx)


_ENDS = {"WanEncoder3d": _encoder, "WanDecoder3d": _decoder}


def _first(self: Any, x: Tensor, feat_cache: Caches, feat_idx: list[int]) -> Tensor:
    x = channels_last(x)
    return _cached(feat_cache, feat_idx, lambda cache: convolve(x, self.conv_in, cache))


def _head(self: Any, x: Tensor, feat_cache: Caches, feat_idx: list[int]) -> Tensor:
    return _cached(feat_cache, feat_idx, lambda c: norm_convolve(x, _norm_options(self.norm_out), self.conv_out, c))


def _resample(self: Any, x: Tensor, feat_cache: Caches = None, feat_idx: list[int] = [0]) -> Tensor:  # noqa: B006
    if self.mode == "upsample3d" and feat_cache is not None:
        x = _double_frames(self, x, feat_cache, feat_idx)
    if self.mode in ("upsample2d", "upsample3d"):
        x = upsample_convolve(x, self.resample[1])
    else:
        x = clip_of(self.resample(frames_of(x)), x.shape[0])
    if self.mode == "downsample3d" and feat_cache is not None:
        x = _halve_frames(self, x, feat_cache, feat_idx)
    return x


def _double_frames(self: Any, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    """Return two frames for each, in a stream's second chunk and after; the first chunk's stay as they are."""
    place = feat_idx[0]
    feat_idx[0] += 1
    if feat_cache[place] is None:
        feat_cache[place] = _ONE_CHUNK_SEEN
        return x
    cache = None if isinstance(feat_cache[place], str) else feat_cache[place]
    y, feat_cache[place] = convolve(x, self.time_conv, cache)
    pairs = y.permute(0, 2, 3, 4, 1).unflatten(4, (2, -1))  # (B, F, H, W, 2, C)
    return pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).permute(0, 4, 1, 2, 3)


def _halve_frames(self: Any, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    """Return one frame for two, in a stream's second chunk and after; the first chunk's stay as they are."""
    place = feat_idx[0]
    feat_idx[0] += 1
    cache, feat_cache[place] = feat_cache[place], x[:, :, -1:].clone()
    if cache is None:
        return x
    x, weight, bias = parameters(x, self.time_conv)
    return ops.causal_conv3d(x, weight, bias, stride=self.time_conv.stride, cache=cache)


def _down_block(self: Any, x: Tensor, feat_cache: Caches = None, feat_idx: list[int] = [0]) -> Tensor:  # noqa: B006
    y = x
    for resnet in self.resnets:
        y = resnet(y, feat_cache=feat_cache, feat_idx=feat_idx)
    if self.downsampler is not None:
        y = self.downsampler(y, feat_cache=feat_cache, feat_idx=feat_idx)
    return y + _averaged(x, self.avg_shortcut)


def _up_block(
    self: Any,
    x: Tensor,
    feat_cache: Caches = None,
    feat_idx: list[int] = [0],  # noqa: B006
    first_chunk: bool = False,
) -> Tensor:
    y = x
    for resnet in self.resnets:
        y = resnet(y, feat_cache=feat_cache, feat_idx=feat_idx)
    if self.upsampler is not None:
        y = self.upsampler(y, feat_cache=feat_cache, feat_idx=feat_idx)
    if self.avg_shortcut is not None:
        _add_repeated(y, x, self.avg_shortcut, first_chunk)
    return y


_SHORTCUTS = {"WanResidualDownBlock": _down_block, "WanResidualUpBlock": _up_block}


def _kept(shortcut: Any) -> tuple[int, int, int]:
    """Return how many phases in (time, height, width) an AvgDown3D or DupUp3D tells apart, as channels.

    A voxel of factors (t, s, s) is t * s * s phases; the last ones are averaged into, or copied from, one channel.
    """
    factors = shortcut.factor_t, shortcut.factor_s, shortcut.factor_s
    merged = shortcut.group_size if hasattr(shortcut, "group_size") else shortcut.repeats
    kept = list(factors)
    for axis in (2, 1, 0):
        if merged % kept[axis] == 0:
            merged //= kept[axis]
            kept[axis] = 1
    if merged != 1:
        raise ValueError(f"{type(shortcut).__name__} must merge whole axes of its factors {factors}, got {merged} over")
    time, height, width = kept
    return time, height, width


def _averaged(x: Tensor, shortcut: Any) -> Tensor:
    """Return AvgDown3D's result: each voxel's phases, averaged but for those that become channels."""
    time, space = shortcut.factor_t, shortcut.factor_s
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0)) if x.shape[2] % time else x
    voxels = x.permute(0, 2, 3, 4, 1).unflatten(3, (-1, space)).unflatten(2, (-1, space)).unflatten(1, (-1, time))
    phases = voxels.permute(0, 1, 3, 5, 7, 2, 4, 6)  # (B, F, H, W, C, t, s, s)
    averaged = [5 + axis for axis, kept in enumerate(_kept(shortcut)) if kept == 1]
    return phases.mean(averaged, keepdim=True).flatten(4).permute(0, 4, 1, 2, 3)


def _add_repeated(y: Tensor, x: Tensor, shortcut: Any, first_chunk: bool) -> None:
    """Add DupUp3D's result to y, in place: each input position, or its channels in turn, over a voxel of y."""
    channels = x.unflatten(1, (-1, *_kept(shortcut))).permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, C, F, t, H, s, W, s)
    time, space = shortcut.factor_t, shortcut.factor_s
    if first_chunk and time > 1:  # the one frame of a first chunk stays one
        channels, time = channels[:, :, :, -1:], 1
    y.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time)).add_(channels)


def _attention(self: Any, x: Tensor) -> Tensor:
    batch, channels, frames, height, width = x.shape
    tokens = x.permute(0, 2, 3, 4, 1).reshape(batch * frames, height * width, channels)
    options = _norm_options(self.norm)
    normed = F.rms_norm(tokens, [channels], options["weight"].to(tokens.dtype), options["eps"])
    normed = normed if options["bias"] is None else normed + options["bias"]
    q, k, v = F.linear(normed, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
    attended = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
    tokens = F.linear(attended, self.proj.weight.flatten(1), self.proj.bias) + tokens
    return tokens.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


def _encode(self: Any, x: Tensor) -> Tensor:
    patch = self.config.patch_size or 1
    height, width = x.shape[3:]
    if self.use_tiling and (width > self.tile_sample_min_width or height > self.tile_sample_min_height):
        return type(self)._encode(self, x)
    self.clear_cache()
    encoded = []
    for end in range(1, x.shape[2] + 1, 4):
        self._enc_conv_idx = [0]
        chunk = _patchified(x[:, :, max(end - 4, 0) : end], patch)
        encoded.append(self.encoder(chunk, feat_cache=self._enc_feat_map, feat_idx=self._enc_conv_idx))
    self.clear_cache()
    return self.quant_conv(torch.cat(encoded, 2))


def _decode(self: Any, z: Tensor, return_dict: bool = True) -> Any:
    height, width = z.shape[3:]
    ratio = self.spatial_compression_ratio
    if self.use_tiling and (
        width > self.tile_sample_min_width // ratio or height > self.tile_sample_min_height // ratio
    ):
        return self.tiled_decode(z, return_dict=return_dict)
    patch = self.config.patch_size or 1
    chunks = (_unpatchified(chunk, patch).clamp(-1.0, 1.0) for chunk in _decoded(self, z))
    return _output(gather(chunks, _decoded_frames(self, z)), return_dict)


def _tiled_decode(self: Any, z: Tensor, return_dict: bool = True) -> Any:
    if torch.is_grad_enabled():  # tiles fade into one another in place
        return type(self).tiled_decode(self, z, return_dict)
    ratio, patch, frames = self.spatial_compression_ratio, self.config.patch_size or 1, _decoded_frames(self, z)
    size = self.tile_sample_min_height, self.tile_sample_min_width
    stride = self.tile_sample_stride_height, self.tile_sample_stride_width
    height, width = z.shape[3:]
    channels = self.decoder.conv_out.out_channels // patch**2
    shape = (z.shape[0], channels, frames, height * ratio, width * ratio)
    clip = z.new_empty(shape, dtype=autocast_dtype(z) or z.dtype)

    def tile(top: int, left: int) -> Tensor:
        bottom, right = top + size[0] // ratio, left + size[1] // ratio
        return gather(_decoded(self, z[:, :, :, top:bottom, left:right]), frames)

    blend_tiles(
        tile,
        starts=(range(0, height, stride[0] // ratio), range(0, width, stride[1] // ratio)),
        blend=(size[0] // patch - stride[0] // patch, size[1] // patch - stride[1] // patch),
        step=(stride[0] // patch, stride[1] // patch),
        out=_patches(clip, patch),
    )
    return _output(clip.clamp_(-1.0, 1.0), return_dict)


def _decoded(self: Any, z: Tensor) -> Iterator[Tensor]:
    """Decode a clip one latent frame at a time: first one frame, then ``_decoded_frames`` says how many each."""
    self.clear_cache()
    for i in range(z.shape[2]):
        self._conv_idx = [0]
        frame = self.post_quant_conv(z[:, :, i : i + 1])
        yield self.decoder(frame, feat_cache=self._feat_map, feat_idx=self._conv_idx, first_chunk=i == 0)
    self.clear_cache()


def _decoded_frames(self: Any, z: Tensor) -> int:
    return 1 + (z.shape[2] - 1) * 2 ** sum(self.temperal_upsample)


def _output(clip: Tensor, return_dict: bool) -> Any:
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=clip) if return_dict else (clip,)


def _patches(clip: Tensor, patch: int) -> Tensor:
    """Return (B, C, F, H * p, W * p) as its patches' (B, C, pW, pH, F, H, W), a view."""
    return clip.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).permute(0, 1, 6, 4, 2, 3, 5)


def _patchified(x: Tensor, patch: int) -> Tensor:
    return x if patch == 1 else _patches(x, patch).flatten(1, 3)


def _unpatchified(x: Tensor, patch: int) -> Tensor:
    if patch == 1:
        return x
    voxels = x.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2)  # (B, C, F, H, pH, W, pW)
    return voxels.flatten(5, 6).flatten(3, 4)

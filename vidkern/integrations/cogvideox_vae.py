"""AutoencoderKLCogVideoX of diffusers, decode and encode, whole and tiled.

From the first convolution on everything is channels_last_3d. Nothing is kept of a convolution of one frame (diffusers
keeps its whole input), and what comes from the latents for the norms is computed at their size.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    upsample_convolve,
)

_MODULE = "diffusers.models.autoencoders.autoencoder_kl_cogvideox"

#: The code of diffusers 0.42 that is replaced, or that what replaces it stands for.
_KNOWN = {
    "AutoencoderKLCogVideoX": {"_decode": "1d60fcddf4e4", "tiled_decode": "5a45c1ccf497"},
    "CogVideoXResnetBlock3D": {"forward": "37e2eb624c4e"},
    "CogVideoXSpatialNorm3D": {"forward": "d1c450ffaca1"},
    "CogVideoXCausalConv3d": {
        "__init__": "3a75455f9864",
        "fake_context_parallel_forward": "087db175adcb",
        "forward": "ce0570bf0ae3",
    },
    "CogVideoXSafeConv3d": {"forward": "b94af19627fd"},
    "CogVideoXUpsample3D": {"forward": "ecf9fa3b62a0"},
    "CogVideoXDownsample3D": {"forward": "3e49cc3a6cb5"},
}

#: Before the first frame comes the first frame again.
_TIME_PAD = "first_frame"

Caches = dict[str, Any]


def recognises(module: nn.Module) -> bool:
    """Return whether a module is an AutoencoderKLCogVideoX or of a subclass."""
    return patching.is_a(module, f"{_MODULE}.AutoencoderKLCogVideoX")


def apply_vidkern_to_cogvideox_vae(
    model: nn.Module,
    *,
    conv: bool = True,
    norm: bool = True,
    resample: bool = True,
    assembly: bool = True,
) -> patching.Report:
    """Speed up an AutoencoderKLCogVideoX of diffusers 0.42 in place; results stay the same.

    Args:
        model: the autoencoder.
        conv: causal convolutions pad by an index rule, and copy nothing for kT = 1.
        norm: the encoder's group norms, SiLU, padding and cache are written in one pass; the scale and shift of the
            decoder's norms are computed at the latents' size.
        resample: frames are resampled without rearranging them; an upsampled frame is never made (the convolution after
            it is four smaller ones of the frame before it), and a frame that is doubled in time is convolved once.
        assembly: decoded chunks and tiles are written into one clip as they come.

    Returns:
        What was changed.

    Raises:
        ValueError: it is a subclass, another version, or already changed by somebody else; it is left as it was.
    """
    patching.check_class(model, f"{_MODULE}.AutoencoderKLCogVideoX")
    patching.check_sources(model, _KNOWN)
    plan = patching.Plan(model)
    for path, module in model.named_modules():
        name = type(module).__name__
        if name == "CogVideoXCausalConv3d" and conv:
            _check_convolution(path, module)
            plan.replace(module, "forward", _convolution, f"{name}: padding by an index rule")
        elif name == "CogVideoXSpatialNorm3D" and norm:
            _check_spatial_norm(path, module)
            plan.replace(module, "forward", _spatial_norm, f"{name}: scale and shift at the latents' size")
        elif name == "CogVideoXResnetBlock3D" and norm:
            _check_block(path, module)
            plan.replace(module, "forward", _block, f"{name}: norm, SiLU, padding in one pass")
        elif name in _RESAMPLING and resample:
            if name == "CogVideoXUpsample3D":
                check_upsampling(module.conv, f"{path}.conv")
            plan.replace(module, "forward", _RESAMPLING[name], f"{name}: no rearranging")
    if assembly:
        for method, function in (("_decode", _decode), ("tiled_decode", _tiled_decode)):
            plan.replace(model, method, function, "method that assembles the clip: chunks written in place")
    return plan.apply()


def _check_convolution(path: str, conv: Any) -> None:
    patching.check_class(conv, f"{_MODULE}.CogVideoXCausalConv3d", path)
    patching.check_class(conv.conv, f"{_MODULE}.CogVideoXSafeConv3d", f"{path}.conv")
    patching.check_unhooked(conv.conv, f"{path}.conv")
    if conv.pad_mode == "replicate" or conv.conv.dilation != (1, 1, 1):
        raise ValueError(f"{path} must pad by its first frame and have no dilation, got pad_mode={conv.pad_mode!r}")


def _check_spatial_norm(path: str, norm: Any) -> None:
    patching.check_class(norm.norm_layer, "torch.nn.modules.normalization.GroupNorm", f"{path}.norm_layer")
    for name in ("conv_y", "conv_b"):
        _check_convolution(f"{path}.{name}", getattr(norm, name))
        patching.check_unhooked(getattr(norm, name), f"{path}.{name}")
        if getattr(norm, name).conv.kernel_size != (1, 1, 1):
            raise ValueError(f"{path}.{name} must be a convolution of 1x1x1")


def _check_block(path: str, block: Any) -> None:
    patching.check_class(block.nonlinearity, "torch.nn.modules.activation.SiLU", f"{path}.nonlinearity")
    for name in ("norm1", "norm2"):
        norm, where = getattr(block, name), f"{path}.{name}"
        patching.check_unhooked(norm, where)
        if block.spatial_norm_dim is None:
            patching.check_class(norm, "torch.nn.modules.normalization.GroupNorm", where)
        else:
            patching.check_class(norm, f"{_MODULE}.CogVideoXSpatialNorm3D", where)
    for name in ("conv1", "conv2"):
        _check_convolution(f"{path}.{name}", getattr(block, name))
        patching.check_unhooked(getattr(block, name), f"{path}.{name}")


def _convolution(self: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    y, cache = convolve(channels_last(inputs), self.conv, conv_cache, time_pad=_TIME_PAD)
    return y, cache if self.time_kernel_size > 1 else None


def _spatial_norm(
    self: Any, f: Tensor, zq: Tensor, conv_cache: Caches | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    scale, shift = (F.conv3d(zq, conv.weight, conv.bias) for conv in (self.conv_y.conv, self.conv_b.conv))
    y = channels_last(self.norm_layer(f))
    # the first of an odd number of frames has a latent frame of its own
    parts = [slice(0, 1), slice(1, None)] if f.shape[2] > 1 and f.shape[2] % 2 else [slice(None)]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([_modulate(y[:, :, part], scale[:, :, part], shift[:, :, part]) for part in parts], 2), {}
    for part in parts:
        _modulate(y[:, :, part], scale[:, :, part], shift[:, :, part], in_place=True)
    return y, {}


def _modulate(x: Tensor, scale: Tensor, shift: Tensor, in_place: bool = False) -> Tensor:
    """Return x * scale + shift, where each position of the small scale and shift serves a box of x's positions."""
    frames, height, width = scale.shape[2:]
    boxes = x.unflatten(4, (width, -1)).unflatten(3, (height, -1)).unflatten(2, (frames, -1))
    scale, shift = (small[:, :, :, None, :, None, :, None] for small in (scale, shift))
    y = torch.addcmul(shift, boxes, scale, out=boxes if in_place else None)
    return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _block(
    self: Any,
    inputs: Tensor,
    temb: Tensor | None = None,
    zq: Tensor | None = None,
    conv_cache: Caches | None = None,
) -> tuple[Tensor, Caches]:
    caches, x = conv_cache or {}, channels_last(inputs)
    shortcut = x
    y, first = _activated_convolution(self.norm1, self.conv1, x, zq, caches.get("conv1"))
    if temb is not None:
        y = y + self.temb_proj(self.nonlinearity(temb))[:, :, None, None, None]
    new = {"conv1": first}
    if self.in_channels != self.out_channels and self.use_conv_shortcut:
        shortcut, new["conv_shortcut"] = self.conv_shortcut(x, conv_cache=caches.get("conv_shortcut"))
    elif self.in_channels != self.out_channels:
        shortcut = self.conv_shortcut(x)
    y, new["conv2"] = _activated_convolution(self.norm2, self.conv2, y, zq, caches.get("conv2"), shortcut, self.dropout)
    return y, new


def _activated_convolution(
    norm: Any,
    conv: Any,
    x: Tensor,
    zq: Tensor | None,
    cache: Tensor | None,
    residual: Tensor | None = None,
    dropout: nn.Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    if zq is None:
        options = {"norm": "group", "groups": norm.num_groups, "weight": norm.weight, "bias": norm.bias}
        return norm_convolve(x, {**options, "eps": norm.eps}, conv.conv, cache, residual, _TIME_PAD, dropout)
    activated = F.silu(norm(x, zq)[0], inplace=not torch.is_grad_enabled())
    activated = activated if dropout is None else dropout(activated)
    return convolve(activated, conv.conv, cache, residual, _TIME_PAD)


def _upsample(self: Any, inputs: Tensor) -> Tensor:
    x = upsample_convolve(inputs, self.conv)
    if not self.compress_time or x.shape[2] == 1:
        return x
    frames = x.permute(0, 2, 3, 4, 1).split(1, 1)
    single = len(frames) % 2  # the first of an odd number of frames stays one
    doubled = [frame for frame in frames[single:] for _ in range(2)]
    return torch.cat([*frames[:single], *doubled], 1).permute(0, 4, 1, 2, 3)


def _downsample(self: Any, x: Tensor) -> Tensor:
    if self.compress_time:
        single = x.shape[2] % 2  # the first of an odd number of frames stays one
        pairs = (x[:, :, single::2] + x[:, :, single + 1 :: 2]) / 2
        x = torch.cat((x[:, :, :1], pairs), 2) if single else pairs
    images = F.pad(frames_of(x), (0, 1, 0, 1))
    return clip_of(self.conv(images), x.shape[0])


_RESAMPLING = {"CogVideoXUpsample3D": _upsample, "CogVideoXDownsample3D": _downsample}


def _decode(self: Any, z: Tensor, return_dict: bool = True) -> Any:
    height, width = z.shape[3:]
    if self.use_tiling and (width > self.tile_latent_min_width or height > self.tile_latent_min_height):
        return self.tiled_decode(z, return_dict=return_dict)
    return _output(gather(_decoded(self, z), _decoded_frames(self, z)), return_dict)


def _tiled_decode(self: Any, z: Tensor, return_dict: bool = True) -> Any:
    if torch.is_grad_enabled():  # tiles fade into one another in place
        return type(self).tiled_decode(self, z, return_dict)
    size = self.tile_latent_min_height, self.tile_latent_min_width
    sample = self.tile_sample_min_height, self.tile_sample_min_width
    overlap = self.tile_overlap_factor_height, self.tile_overlap_factor_width
    blend = int(sample[0] * overlap[0]), int(sample[1] * overlap[1])
    step = sample[0] - blend[0], sample[1] - blend[1]
    starts = (
        range(0, z.shape[3], int(size[0] * (1 - overlap[0]))),
        range(0, z.shape[4], int(size[1] * (1 - overlap[1]))),
    )
    ratio = 2 ** (len(self.config.block_out_channels) - 1)
    rows, columns = (
        sum(min(step[axis], ratio * min(size[axis], z.shape[3 + axis] - start)) for start in starts[axis])
        for axis in (0, 1)
    )
    frames = _decoded_frames(self, z)
    shape = (z.shape[0], self.config.out_channels, frames, rows, columns)
    clip = z.new_empty(shape, dtype=autocast_dtype(z) or z.dtype)

    def tile(top: int, left: int) -> Tensor:
        return gather(_decoded(self, z[:, :, :, top : top + size[0], left : left + size[1]]), frames)

    return _output(blend_tiles(tile, starts, blend, step, clip), return_dict)


def _decoded(self: Any, z: Tensor) -> Iterator[Tensor]:
    """Decode a clip some latent frames at a time."""
    conv_cache = None
    for start, end in _chunks(self, z):
        latents = z[:, :, start:end]
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        chunk, conv_cache = self.decoder(latents, conv_cache=conv_cache)
        yield chunk


def _chunks(self: Any, z: Tensor) -> list[tuple[int, int]]:
    """Return each chunk's first latent frame and the one after its last; the first chunk takes what is left over."""
    frames, size = z.shape[2], self.num_latent_frames_batch_size
    ends = range(min(size + frames % size, frames), frames + 1, size)
    return list(zip([0, *ends], ends, strict=False))


def _decoded_frames(self: Any, z: Tensor) -> int:
    ratio = 2 ** sum(up.compress_time for block in self.decoder.up_blocks for up in block.upsamplers or ())
    sizes = (end - start for start, end in _chunks(self, z))
    return sum((size - 1) * ratio + 1 if size % 2 else size * ratio for size in sizes)


def _output(clip: Tensor, return_dict: bool) -> Any:
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=clip) if return_dict else (clip,)

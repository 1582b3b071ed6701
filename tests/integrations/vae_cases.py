"""Small video autoencoders of diffusers with random weights, beside their patched copies."""

import copy

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

import vidkern

WAN21 = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
WAN22 = {
    **WAN21,
    "is_residual": True,
    "decoder_base_dim": 8,
    "dim_mult": [1, 2, 4, 4],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
COGVIDEOX = {
    "block_out_channels": (8, 16, 16, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_height": 64,
    "sample_width": 96,
}


def wan(config=WAN21, **changes):
    return fill(AutoencoderKLWan(**{**config, **changes}).eval())


def cogvideox(**changes):
    return fill(AutoencoderKLCogVideoX(**{**COGVIDEOX, **changes}).eval())


def fill(model, seed=0):
    """Give every parameter a random value of a size at which no output saturates, norms' around one."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device="cpu")
        if "norm" in name and "conv" not in name and not name.endswith("bias"):
            values = 1 + 0.2 * values
        else:
            values = values / (parameter[0].numel() if parameter.dim() > 1 else 16) ** 0.5
        with torch.no_grad():
            parameter.copy_(values)
    return model


def patched(model, **switches):
    """Return a patched copy."""
    model = copy.deepcopy(model)
    vidkern.patch(model, **switches)
    return model


def relative(ours, theirs):
    """Return max |ours - theirs| / max |theirs|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())

"""Small video autoencoders of diffusers with random weights, beside their patched copies."""

import contextlib
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


@contextlib.contextmanager
def tiling(models, **options):
    """Let models work in tiles for a while; what began with another setting goes back to it."""
    with contextlib.ExitStack() as stack:
        for model in models:
            held = {name: value for name, value in vars(model).items() if "til" in name}
            stack.callback(vars(model).update, held)
            model.enable_tiling(**options)
        yield


def relative(ours, theirs):
    """Return max |ours - theirs| / max |theirs|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_same_gradients(theirs, ours, loss, *inputs_and_tolerance):
    """Hold every gradient of ours, of parameters and inputs, to theirs, relative to its largest element."""
    *inputs, tolerance = inputs_and_tolerance
    gradients = []
    for model in (theirs, ours):
        leaves = {f"input {i}": value.clone().requires_grad_() for i, value in enumerate(inputs)}
        loss(model, *leaves.values()).backward()
        gradients.append({**leaves, **dict(model.named_parameters())})
        gradients[-1] = {name: leaf.grad for name, leaf in gradients[-1].items()}
        model.zero_grad(set_to_none=True)
    expected, got = gradients
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None and gradient.abs().max() > 0:
            assert relative(got[name], gradient) < tolerance, name


def peak_bytes(run):
    """Return the most bytes that torch's CPU allocator held at once while run() ran, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

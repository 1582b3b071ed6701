"""The call that is compared with the public VDM code (lucidrains), made again from a seed wherever it runs."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models.vdm import VDM, VDMConfig
from tests.models.public_cases import fill, normal

RECORDED = Path(__file__).parent / "data" / "public_vdm.safetensors"

#: Twelve frames reach T5's buckets of more than one distance.
BATCH, FRAMES, SIZE = 1, 12, 8

CONFIG = VDMConfig(
    input_size=SIZE, num_frames=FRAMES, base_channels=16, channel_multipliers=(1, 2), num_heads=3, text_width=6
)


def public_model() -> VDM:
    """Return the network with random weights, and nothing in it that the public one does not have.

    That has no bias in an attention's norm and projection, and a weight instead of the time in its last block.
    """
    model = VDM(CONFIG)
    fill(model.named_parameters(), 1)
    _, shift = model.out_block.modulation[1].bias.data.chunk(2)
    model.out_block.modulation[1].weight.data.zero_()
    shift.zero_()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_shift", "time.proj.bias", "space.proj.bias")):
            parameter.data.zero_()
        if parameter.dim() == 1 and name.endswith(("block1.weight", "block2.weight", "out_block.weight")):
            parameter.data.add_(1)
    return model


def public_inputs() -> dict[str, Tensor]:
    """Return x, t and text."""
    generator = torch.Generator().manual_seed(2)
    return {
        "x": normal((BATCH, FRAMES, CONFIG.in_channels, SIZE, SIZE), generator).to(torch.get_default_device()),
        "t": torch.tensor([412]),
        "text": normal((BATCH, 5, 6), generator).to(torch.get_default_device()),
    }


def public_results(call: Callable[[], Tensor], bias: Tensor, first: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of the relative bias and of the first convolution's weight."""
    output = call()
    weights = normal(output.shape, torch.Generator().manual_seed(3)).to(output)
    of_bias, of_first = torch.autograd.grad((output * weights).sum(), (bias, first))
    found = {"output": output.detach(), "bias_gradient": of_bias, "first_gradient": of_first}
    return {name: value.float().cpu().contiguous() for name, value in found.items()}

"""FVDM: Latte's network with a timestep for each frame, and the public code's parameter names."""

import pytest
import torch

from models.fvdm import fvdm, latte_name
from models.latte import Latte, latte

SMALL = {"input_size": 8, "hidden_size": 64, "depth": 4, "num_heads": 2, "num_frames": 4}


def test_fvdm_is_latte_by_another_name():
    ours, theirs = fvdm("FVDM-B/2", **SMALL), latte("Latte-B/2", **SMALL)
    assert isinstance(ours, Latte)
    assert ours.config == theirs.config


def test_sizes_are_those_of_latte():
    with torch.device("meta"):
        model = fvdm("FVDM-XL/4")
    assert (model.config.depth, model.config.hidden_size, model.config.num_heads) == (28, 1152, 16)
    assert model.config.patch_size == 4
    with pytest.raises(ValueError, match=r"FVDM-S/2.*got 'Latte-S/2'"):
        fvdm("Latte-S/2")


def test_a_frames_timestep_reaches_its_own_modulation():
    model = fvdm("FVDM-S/2", **{**SMALL, "depth": 2})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():  # attention between frames off: what is left acts on each frame alone
        model.blocks[1].attn.proj.weight.zero_()
    x, t = torch.randn(1, 4, 4, 8, 8), torch.tensor([[10, 500, 900, 999]])
    moved = t.clone()
    moved[0, 2] = 100
    change = (model(x, moved) - model(x, t)).abs().amax((0, 2, 3, 4))
    assert change[2] > 1e-3
    assert torch.count_nonzero(change[[0, 1, 3]]) == 0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks_spatial.0.attn.qkv.weight", "blocks.0.attn.qkv.weight"),
        ("blocks_temp.0.mlp.fc1.bias", "blocks.1.mlp.fc1.bias"),
        ("blocks_spatial.13.attn.proj.bias", "blocks.26.attn.proj.bias"),
        ("blocks_temp.13.adaLN_modulation.1.weight", "blocks.27.adaLN_modulation.1.weight"),
        ("final_layer.linear.weight", "final_layer.linear.weight"),
        ("temp_embed", "temp_embed"),
    ],
)
def test_names_of_the_public_code(theirs, ours):
    assert latte_name(theirs) == ours

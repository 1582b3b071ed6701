"""The patch for the public Latte and FVDM networks, on networks of their structure."""

import pytest
import torch
from torch import nn

import vidkern
from models.latte import latte as our_latte
from tests.integrations.public_latte import Block, Latte, LatteIMG, LatteVIDEO
from tests.integrations.transformer_cases import (
    TOLERANCE,
    assert_as_accurate,
    assert_autocast_as_accurate,
    assert_closer,
    assert_compiles,
    assert_equal_training,
    assert_exactly_unpatched,
    fill,
    normal,
    patched,
    relative,
    saved_bytes,
    watched_operators,
)
from tests.models.test_no_rearranging import Rearranged
from vidkern.integrations import apply_vidkern_to_official_latte

BATCH, FRAMES, PLACES, WIDTH = 2, 4, 16, 64
NETWORKS = [Latte, LatteVIDEO]
EXTRAS = {"none": 1, "label": 2, "text": 78}


def network(cls=Latte, **changes):
    return fill(cls(**changes))


def call(model, frames=FRAMES):
    dtype = model.final_layer.linear.weight.dtype
    x = normal(BATCH, frames, 4, 8, 8).to(dtype)
    per_frame = [[0, 30, 600, 999], [5, 5, 5, 70]]
    t = torch.tensor(per_frame if isinstance(model, LatteVIDEO) else [10, 700], device="cpu")
    return model(x, t, **condition(model, dtype))


def condition(model, dtype=torch.float32):
    text = {"text_embedding": normal(BATCH, 77, 768, seed=3).to(dtype)}
    return {1: {}, 2: {"y": torch.tensor([1, 5], device="cpu")}, 78: text}[model.extras]


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize("cls", NETWORKS)
def test_output_and_gradients_are_the_unpatched_network_s(cls, extras):
    model = network(cls, extras=extras)
    assert_equal_training(model, patched(model), call)


@pytest.mark.parametrize(
    ("switch", "operators"),
    [
        ("modulation", {"layer_norm_modulate", "gate_residual_modulate"}),
        ("spatial_attention", {"spatial_attention"}),
        ("temporal_attention", {"temporal_attention"}),
    ],
)
@pytest.mark.parametrize("cls", NETWORKS)
def test_each_switch_turns_its_operators_off(cls, switch, operators, monkeypatch):
    called = watched_operators(monkeypatch)
    model = network(cls)
    assert_equal_training(model, patched(model, **{switch: False}), call)
    every = {"layer_norm_modulate", "gate_residual_modulate", "spatial_attention", "temporal_attention"}
    assert called == every - operators


def test_guidance_goes_through_the_patched_forward():
    model = network(extras=2)
    ours = patched(model)
    x, t, y = normal(BATCH, FRAMES, 4, 8, 8), torch.tensor([10, 10], device="cpu"), torch.tensor([1, 5], device="cpu")
    with torch.no_grad():
        theirs = model.forward_with_cfg(x, t, y, cfg_scale=2.5)
        got = ours.forward_with_cfg(x, t, y, cfg_scale=2.5)
    assert 0 < relative(got, theirs) < TOLERANCE


@pytest.mark.parametrize("cls", NETWORKS)
def test_float64_is_exact(cls):
    model = network(cls).double()
    assert_equal_training(model, patched(model), call, tolerance=1e-12)


def test_half_precision_by_the_network_s_own_switch():
    model, t = network(), torch.tensor([10, 700], device="cpu")
    x = normal(BATCH, FRAMES, 4, 8, 8)
    with torch.no_grad():
        exact = model(x, t)
        half = network().half()
        assert_closer(patched(half)(x, t, use_fp16=True), half(x, t, use_fp16=True), exact)


@pytest.mark.parametrize("cls", NETWORKS)
def test_bfloat16_is_as_accurate(cls):
    assert_as_accurate(network(cls), call)


@pytest.mark.parametrize("cls", NETWORKS)
def test_autocast_is_as_accurate(cls):
    assert_autocast_as_accurate(network(cls), call)


@pytest.mark.parametrize("cls", NETWORKS)
def test_tokens_stay_where_they_are(cls):
    model = patched(network(cls))
    with Rearranged(BATCH * FRAMES * PLACES * WIDTH) as rearranged:
        call(model).square().mean().backward()
    assert [shape for name, shape in rearranged.calls if name == "aten::clone"] == [(BATCH * FRAMES, PLACES, WIDTH)]


def test_training_keeps_no_condition_for_each_token():
    model = network(LatteVIDEO)
    ours = patched(model)
    every_token = BATCH * FRAMES * PLACES * 6 * WIDTH * 4
    assert saved_bytes(model, call) - saved_bytes(ours, call) > 2 * every_token


def test_a_head_size_without_a_kernel_is_named_in_the_report():
    model = network(heads=4)
    ours = patched(model)
    assert "over frames: its own (no kernel for heads of 16)" in str(vidkern.patch(ours))
    assert_equal_training(model, ours, call)


def test_another_number_of_frames_is_refused():
    with pytest.raises(ValueError, match="x must have the network's 4 frames, got 3"):
        call(patched(network()), frames=3)


@pytest.mark.parametrize("cls", NETWORKS)
def test_unpatched_it_is_exactly_what_it_was(cls):
    assert_exactly_unpatched(network(cls), call)


class Another(Latte):
    pass


class OtherBlock(nn.Module):
    def forward(self, x, condition):
        return x


def another_mode(model):
    model.blocks[1].attn.attention_mode = "flash"


def another_block(model):
    model.blocks[2] = OtherBlock()


def more_in_a_block(model):
    model.blocks[3].cross_attn = nn.Linear(2, 2)


def weights_in_a_norm(model):
    model.blocks[0].norm2 = nn.LayerNorm(WIDTH)


def dropout(model):
    model.blocks[0].attn.attn_drop.p = 0.1


def another_condition(model):
    model.extras = 3


def hooked(model):
    model.blocks[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_mode, "temporal block 0's attention_mode must be 'math', got 'flash'"),
        (another_block, "spatial block 1's forward must take x, c, got x, condition"),
        (
            more_in_a_block,
            "temporal block 1 must consist of adaLN_modulation, attn, mlp, norm1, norm2, got .*cross_attn",
        ),
        (weights_in_a_norm, "spatial block 0's norm2 must be a LayerNorm without weights"),
        (dropout, "spatial block 0's attn_drop must be 0, got 0.1"),
        (another_condition, "the network's extras must be 1, 2 or 78, got 3"),
        (hooked, "spatial block 0 has a forward hook"),
    ],
)
def test_another_structure_is_refused(change, reason):
    model = network()
    change(model)
    with pytest.raises(ValueError, match=reason):
        apply_vidkern_to_official_latte(model)
    assert "forward" not in model.__dict__


def test_a_subclass_and_the_joint_network_are_refused():
    with pytest.raises(ValueError, match=r"must be of a class derived from nn\.Module itself, got .*Latte"):
        apply_vidkern_to_official_latte(Another())
    (refusal,) = vidkern.patch(LatteIMG()).refused
    assert refusal.reason == (
        "the network's forward must take x, t, y, text_embedding, use_fp16,"
        " got x, t, y, use_fp16, y_image, use_image_num"
    )


def test_vidkern_s_own_latte_needs_no_patch():
    report = vidkern.patch(our_latte("Latte-S/2", depth=2, hidden_size=64, num_heads=2, input_size=8))
    assert str(report) == "nothing to patch"


def test_the_same_blocks_elsewhere_are_left_alone():
    assert str(vidkern.patch(nn.Sequential(Block(WIDTH, 2, "math")))) == "nothing to patch"


@pytest.mark.parametrize("cls", NETWORKS)
def test_compiled_in_one_graph(cls):
    assert_compiles(patched(network(cls, depth=2)), call)

"""diffusers' CogVideoXTransformer3DModel, patched beside unpatched."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

import vidkern
from tests.integrations.transformer_cases import (
    assert_as_accurate,
    assert_autocast_as_accurate,
    assert_checkpointing_equal,
    assert_compiles,
    assert_equal_training,
    assert_exactly_unpatched,
    fill,
    normal,
    patched,
    saved_bytes,
)
from vidkern.integrations import apply_vidkern_to_cogvideox

BATCH, FRAMES, TEXT = 2, 3, 6
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": TEXT,
}


def cogvideox(**changes):
    return fill(CogVideoXTransformer3DModel(**{**CONFIG, **changes}))


def call(model, frames=FRAMES, rotary=False, **arguments):
    dtype = model.proj_out.weight.dtype
    x, text = normal(BATCH, frames, 4, 8, 8).to(dtype), normal(BATCH, TEXT, 24, seed=3).to(dtype)
    places = frames // (model.config.patch_size_t or 1) * 16
    angles = normal(places, 16, seed=4)
    rope = (angles.cos(), angles.sin()) if rotary else None
    return model(x, text, torch.tensor([5, 700]), image_rotary_emb=rope, **arguments).sample


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({}, {}),
        ({"norm_elementwise_affine": False}, {}),
        ({"use_rotary_positional_embeddings": True}, {"rotary": True}),
        ({"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}, {"rotary": True}),
        (
            {"patch_size_t": 2, "patch_bias": False, "use_rotary_positional_embeddings": True, "ofs_embed_dim": 8},
            {"frames": 4, "rotary": True, "ofs": torch.tensor([2.0, 2.0], device="cpu")},
        ),
    ],
    ids=["2B", "without weights", "5B", "5B I2V", "1.5"],
)
def test_output_and_gradients_are_the_unpatched_model_s(config, arguments):
    model = cogvideox(**config)
    assert_equal_training(model, patched(model), lambda m: call(m, **arguments))


def test_float64_is_exact():
    model = cogvideox().double()
    assert_equal_training(model, patched(model), call, tolerance=1e-12)


def test_bfloat16_is_as_accurate():
    assert_as_accurate(cogvideox(), call)


def test_autocast_is_as_accurate():
    assert_autocast_as_accurate(cogvideox(), call)


def test_activation_checkpointing_gives_the_same_gradients():
    assert_checkpointing_equal(cogvideox(), call)


def test_fused_projections_go_on_working():
    model = cogvideox()
    ours = patched(model)
    for m in (model, ours):
        m.fuse_qkv_projections()
    assert_equal_training(model, ours, call)


def test_training_keeps_less():
    model = cogvideox()
    ours = patched(model)
    assert saved_bytes(ours, call) < 0.9 * saved_bytes(model, call)


def test_unpatched_it_is_exactly_what_it_was():
    assert_exactly_unpatched(cogvideox(), call)


class Another(CogVideoXTransformer3DModel):
    pass


def test_a_subclass_is_refused():
    with pytest.raises(ValueError, match="a subclass of it"):
        apply_vidkern_to_cogvideox(Another(**CONFIG))
    assert [refusal.model for refusal in vidkern.patch(Another(**CONFIG)).refused] == ["Another"]


def replace_norm(model):
    model.transformer_blocks[0].norm2.norm = torch.nn.RMSNorm(32)


def hook_norm(model):
    model.transformer_blocks[1].norm1.register_forward_hook(lambda *_: None)


def replace_block(model):
    model.transformer_blocks[1] = torch.nn.Identity()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_norm, r"transformer_blocks\.0\.norm2\.norm must be a \S*LayerNorm itself, got another class"),
        (hook_norm, r"transformer_blocks\.1\.norm1 has a forward hook"),
        (replace_block, r"transformer_blocks\.1 must be a \S*CogVideoXBlock itself"),
    ],
)
def test_what_is_not_known_is_refused(change, reason):
    model = cogvideox()
    change(model)
    with pytest.raises(ValueError, match=reason):
        apply_vidkern_to_cogvideox(model)
    assert not any("forward" in part.__dict__ for part in model.modules())


def test_compiled_in_one_graph():
    assert_compiles(patched(cogvideox(num_layers=1)), call)

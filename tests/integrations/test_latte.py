"""diffusers' LatteTransformer3DModel, patched beside unpatched."""

import pytest
import torch
from diffusers import LatteTransformer3DModel
from diffusers.models.attention_processor import AttnProcessor

import vidkern
from tests.integrations.transformer_cases import (
    TOLERANCE,
    assert_as_accurate,
    assert_autocast_as_accurate,
    assert_checkpointing_equal,
    assert_compiles,
    assert_equal_training,
    assert_exactly_unpatched,
    fill,
    normal,
    patched,
    relative,
    watched_operators,
)
from tests.models.test_no_rearranging import Rearranged
from vidkern.integrations import apply_vidkern_to_latte

BATCH, FRAMES = 2, 5
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 64,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 24,
    "video_length": FRAMES,
}


def latte(**changes):
    return fill(LatteTransformer3DModel(**{**CONFIG, **changes}))


def call(model, frames=FRAMES, size=(8, 8), **arguments):
    dtype = model.proj_out.weight.dtype
    x, text = normal(BATCH, 4, frames, *size).to(dtype), normal(BATCH, 7, 24, seed=3).to(dtype)
    return model(x, torch.tensor([10, 700]), text, **arguments).sample


@pytest.mark.parametrize(
    "switches", [{}, {"modulation": False}, {"temporal_attention": False}], ids=["all", "attention", "modulation"]
)
def test_output_and_gradients_are_the_unpatched_model_s(switches):
    model = latte()
    assert_equal_training(model, patched(model, **switches), call)


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({"norm_elementwise_affine": True}, {}),
        ({"attention_bias": False, "activation_fn": "geglu"}, {}),
        ({}, {"enable_temporal_attentions": False}),
        ({}, {"size": (12, 4)}),
        ({"video_length": 1}, {"frames": 1}),
        ({"attention_head_dim": 24, "cross_attention_dim": 48}, {}),
    ],
    ids=["affine", "geglu", "spatial", "grid", "image", "head24"],
)
def test_every_configuration_and_argument(config, arguments):
    model = latte(**config)
    assert_equal_training(model, patched(model), lambda m: call(m, **arguments))


def test_a_mask_of_the_text():
    model = latte()
    mask = torch.zeros(BATCH * FRAMES, 1, 7).masked_fill(torch.arange(7) > 3, -10000.0)
    assert_equal_training(model, patched(model), lambda m: call(m, encoder_attention_mask=mask))
    with torch.no_grad():
        assert relative(call(model, encoder_attention_mask=mask), call(model)) > 1e-3


def test_float64_is_exact():
    model = latte().double()
    model.temp_pos_embed, model.pos_embed.pos_embed = model.temp_pos_embed.double(), model.pos_embed.pos_embed.double()
    assert_equal_training(model, patched(model), call, tolerance=1e-12)


def test_bfloat16_is_as_accurate():
    assert_as_accurate(latte(), call)


def test_autocast_is_as_accurate():
    assert_autocast_as_accurate(latte(), call)


def test_activation_checkpointing_gives_the_same_gradients():
    assert_checkpointing_equal(latte(), call)


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, {"layer_norm_modulate", "gate_residual", "gate_residual_modulate", "temporal_attention"}),
        ({"modulation": False}, {"temporal_attention"}),
        ({"temporal_attention": False}, {"layer_norm_modulate", "gate_residual", "gate_residual_modulate"}),
    ],
    ids=["all", "attention", "modulation"],
)
def test_each_switch_turns_its_operators_on(switches, expected, monkeypatch):
    called = watched_operators(monkeypatch)
    model = patched(latte(), **switches)
    with torch.no_grad():
        call(model)
    assert called == expected


def test_tokens_stay_where_they_are():
    model = patched(latte())
    with Rearranged(BATCH * FRAMES * 16 * 64) as rearranged:
        call(model).square().mean().backward()
    copies = [shape for name, shape in rearranged.calls if name != "aten::transpose"]
    assert copies == [(BATCH * FRAMES, 16, 64)]  # the patch embedding's; transposes are views, heads first for SDPA


def test_a_head_size_without_a_kernel_and_another_processor_are_named_in_the_report():
    report = apply_vidkern_to_latte(latte(attention_head_dim=24, cross_attention_dim=48))
    assert "attention on rearranged copies (no kernel for heads of 24)" in str(report)
    model = latte()
    model.temporal_transformer_blocks[0].attn1.set_processor(AttnProcessor())
    report = apply_vidkern_to_latte(model)
    assert "attention on rearranged copies (its processor is AttnProcessor)" in str(report)
    assert "1 x temporal block: fused adaLN-single, vidkern's temporal attention" in str(report)


def test_a_processor_set_later_is_used():
    model = patched(latte())
    seen = []

    class Watched(AttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            seen.append(tuple(hidden_states.shape))
            return super().__call__(attn, hidden_states, *args, **kwargs)

    model.temporal_transformer_blocks[1].attn1.set_processor(Watched())
    with torch.no_grad():
        assert relative(call(model), call(latte())) < TOLERANCE
    assert seen == [(BATCH * 16, FRAMES, 64)]


def test_a_block_called_alone_does_what_it_did():
    model, ours = latte(), patched(latte(), mlp=False)
    x, vectors = normal(3, 16, 64), normal(3, 6 * 64, seed=4)
    for name in ("transformer_blocks", "temporal_transformer_blocks"):
        theirs = getattr(model, name)[0](x, None, normal(3, 7, 64, seed=5), None, vectors)
        assert torch.equal(getattr(ours, name)[0](x, None, normal(3, 7, 64, seed=5), None, vectors), theirs)


def test_unpatched_it_is_exactly_what_it_was():
    assert_exactly_unpatched(latte(), call)


class Another(LatteTransformer3DModel):
    pass


def norm_of_another_type(model):
    model.transformer_blocks[1].norm_type = "layer_norm"


def chunked(model):
    model.temporal_transformer_blocks[0].set_chunk_feed_forward(2)


def hooked(model):
    model.temporal_transformer_blocks[0].attn1.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (norm_of_another_type, r"transformer_blocks\.1 must have norm_type 'ada_norm_single', got 'layer_norm'"),
        (chunked, r"temporal_transformer_blocks\.0 must have _chunk_size = None, got 2"),
        (hooked, r"temporal_transformer_blocks\.0\.attn1 has a forward hook"),
    ],
)
def test_what_is_not_known_is_refused(change, reason):
    model = latte()
    change(model)
    with pytest.raises(ValueError, match=reason):
        apply_vidkern_to_latte(model)
    assert "forward" not in model.__dict__


def test_a_subclass_is_refused():
    with pytest.raises(ValueError, match="a subclass of it"):
        apply_vidkern_to_latte(Another(**CONFIG))
    assert [refusal.model for refusal in vidkern.patch(Another(**CONFIG)).refused] == ["Another"]


def test_a_width_without_kernels_is_refused():
    with pytest.raises(ValueError, match=r"must have a multiple of 8 channels, at most 8192, got 12"):
        apply_vidkern_to_latte(latte(num_attention_heads=1, attention_head_dim=12, cross_attention_dim=12))


def test_compiled_in_one_graph():
    assert_compiles(patched(latte(num_layers=1)), call)

"""diffusers' Wan and SkyReels-V2 transformers, patched beside unpatched: timesteps for clips, frames and tokens."""

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel

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
    saved_bytes,
)
from vidkern.integrations import apply_vidkern_to_skyreels_v2, apply_vidkern_to_wan

BATCH, FRAMES, PLACES = 2, 3, 8
WIDTH = 32
CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": WIDTH // 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
CLIP = torch.tensor([3.0, 900.0], device="cpu")
#: The first frame is given, as in Wan 2.2's image-to-video.
FRAME = torch.tensor([[0.0, 500.0, 500.0], [0.0, 7.0, 7.0]], device="cpu")
FOUR = torch.tensor([[0.0, 9.0, 300.0, 800.0]] * 2, device="cpu")
TOKEN = FRAME.repeat_interleave(PLACES, dim=1)
UNEQUAL = torch.where(torch.arange(FRAMES * PLACES, device="cpu") == 13, 250.0, TOKEN)
TIMESTEPS = {"clip": CLIP, "frame": TOKEN, "token": UNEQUAL}


def wan(**changes):
    return fill(WanTransformer3DModel(**{**CONFIG, **changes}))


def skyreels(**changes):
    return fill(SkyReelsV2Transformer3DModel(**{**CONFIG, **changes}))


def call(model, timestep=TOKEN, batch=BATCH, frames=FRAMES, **arguments):
    dtype = model.proj_out.weight.dtype
    x, text = normal(batch, 4, frames, 4, 8).to(dtype), normal(batch, 6, 24, seed=3).to(dtype)
    return model(x, timestep, text, **arguments).sample


def embedded(model, **arguments):
    """Return the shape of the tokens whose timestep is embedded in a call."""
    shapes = []
    hook = model.condition_embedder.time_proj.register_forward_hook(lambda *a: shapes.append(tuple(a[2].shape[:-1])))
    with torch.no_grad():
        call(model, **arguments)
    hook.remove()
    (shape,) = shapes
    return shape


@pytest.mark.parametrize("timestep", TIMESTEPS.values(), ids=TIMESTEPS.keys())
def test_output_and_gradients_are_the_unpatched_model_s(timestep):
    model = wan()
    assert_equal_training(model, patched(model), lambda m: call(m, timestep))


@pytest.mark.parametrize(
    "config",
    [{"cross_attn_norm": False}, {"patch_size": (1, 4, 2)}, {"out_channels": None, "qk_norm": None}],
    ids=["no cross norm", "patch", "out"],
)
def test_every_configuration(config):
    model = wan(**config)
    tokens = FRAME.repeat_interleave(32 // (config.get("patch_size", (1, 2, 2))[1] * 2), dim=1)
    assert_equal_training(model, patched(model), lambda m: call(m, tokens))


def test_image_conditioning():
    model = wan(image_dim=16, added_kv_proj_dim=WIDTH, text_dim=24)
    ours = patched(model)

    def conditioned(m):
        x, text, image = normal(BATCH, 4, FRAMES, 4, 8), normal(BATCH, 512, 24, seed=3), normal(BATCH, 5, 16, seed=4)
        return m(x, CLIP, text, image, return_dict=False)[0]

    assert_equal_training(model, ours, conditioned)


def test_the_time_is_embedded_once_a_frame_where_its_tokens_share_it():
    model = patched(wan())
    assert embedded(model, timestep=TOKEN) == (BATCH, FRAMES)
    assert embedded(model, timestep=TOKEN[:1].expand(BATCH, -1)) == (BATCH, FRAMES)
    assert embedded(model, timestep=UNEQUAL) == (BATCH, FRAMES * PLACES)
    assert embedded(model, timestep=CLIP) == (BATCH,)


def test_timesteps_of_frames_are_those_of_their_tokens():
    model = patched(wan())
    with torch.no_grad():
        assert torch.equal(call(model, FRAME), call(model, TOKEN))


def test_a_promise_takes_each_frame_s_first_token():
    model = patched(wan(), frame_timesteps=True)
    assert embedded(model, timestep=TOKEN) == (BATCH, FRAMES)
    with torch.no_grad():
        assert torch.equal(call(model, UNEQUAL), call(model, TOKEN))
        assert relative(call(model, TOKEN), call(wan(), TOKEN)) < TOLERANCE


def test_frame_timesteps_false_keeps_one_for_each_token():
    model = patched(wan(), frame_timesteps=False)
    assert embedded(model, timestep=TOKEN) == (BATCH, FRAMES * PLACES)
    with torch.no_grad():
        assert relative(call(model, TOKEN), call(wan(), TOKEN)) < TOLERANCE


def test_training_keeps_no_modulation_for_each_token():
    model = wan()
    ours = patched(model)
    one_vector = BATCH * FRAMES * PLACES * WIDTH * 4
    assert saved_bytes(model, call) - saved_bytes(ours, call) > CONFIG["num_layers"] * 6 * one_vector


KEPT_IN_FLOAT32 = WanTransformer3DModel._keep_in_fp32_modules


@pytest.mark.parametrize("keep_float32", [(), KEPT_IN_FLOAT32], ids=["all", "as loaded"])
def test_bfloat16_is_as_accurate(keep_float32):
    assert_as_accurate(wan(), call, keep_float32=keep_float32)


def test_autocast_is_as_accurate():
    assert_autocast_as_accurate(wan(), call)


@pytest.mark.parametrize("timestep", TIMESTEPS.values(), ids=TIMESTEPS.keys())
def test_activation_checkpointing_gives_the_same_gradients(timestep):
    assert_checkpointing_equal(wan(), lambda m: call(m, timestep))


def test_a_block_called_alone_with_a_vector_for_each_token():
    model, ours = wan(), patched(wan())
    x, text, rotary = normal(1, 24, WIDTH), normal(1, 6, WIDTH, seed=3), model.rope(normal(1, 4, FRAMES, 4, 8))
    for shape in ((1, 6, WIDTH), (1, 24, 6, WIDTH)):
        vectors = normal(*shape, seed=4)
        with torch.no_grad():
            assert relative(ours.blocks[0](x, text, vectors, rotary), model.blocks[0](x, text, vectors, rotary)) < 1e-5


@pytest.mark.parametrize("build", [wan, skyreels])
def test_unpatched_it_is_exactly_what_it_was(build):
    assert_exactly_unpatched(build(), lambda m: call(m, CLIP))


class AnotherWan(WanTransformer3DModel):
    pass


class AnotherSkyReels(SkyReelsV2Transformer3DModel):
    pass


@pytest.mark.parametrize(
    ("cls", "apply"),
    [(AnotherWan, apply_vidkern_to_wan), (AnotherSkyReels, apply_vidkern_to_skyreels_v2)],
)
def test_a_subclass_is_refused(cls, apply):
    with pytest.raises(ValueError, match="a subclass of it"):
        apply(cls(**CONFIG))
    assert [refusal.model for refusal in vidkern.patch(cls(**CONFIG)).refused] == [cls.__name__]


def test_another_block_and_a_hooked_norm_are_refused():
    model = wan()
    model.blocks[1] = skyreels().blocks[1]
    with pytest.raises(ValueError, match=r"blocks\.1 must be a \S*WanTransformerBlock itself, got another class"):
        apply_vidkern_to_wan(model)
    model = wan()
    model.blocks[0].norm3.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks\.0\.norm3 has a forward hook"):
        apply_vidkern_to_wan(model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("frame_timesteps", [None, True])
def test_compiled_in_one_graph(frame_timesteps):
    assert_compiles(patched(wan(num_layers=1), frame_timesteps=frame_timesteps), call)


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({}, {"timestep": CLIP}),
        ({}, {"timestep": FRAME, "enable_diffusion_forcing": True}),
        ({"num_frame_per_block": 2}, {"timestep": FOUR, "frames": 4, "enable_diffusion_forcing": True}),
        ({"cross_attn_norm": False}, {"timestep": FRAME, "enable_diffusion_forcing": True}),
        ({"inject_sample_info": True}, {"timestep": CLIP, "fps": [0, 1]}),
        (
            {"inject_sample_info": True},
            {"timestep": FRAME[:1], "fps": [1], "enable_diffusion_forcing": True, "batch": 1},
        ),
    ],
    ids=["clip", "forcing", "causal", "no cross norm", "fps", "forcing fps"],
)
def test_skyreels_output_and_gradients_are_the_unpatched_model_s(config, arguments):
    model = skyreels(**config)
    assert_equal_training(model, patched(model), lambda m: call(m, **arguments))


def test_skyreels_diffusion_forcing_keeps_no_modulation_for_each_token():
    model = skyreels()
    ours = patched(model)
    one_vector = BATCH * FRAMES * PLACES * WIDTH * 4

    def forced(m):
        return call(m, FRAME, enable_diffusion_forcing=True)

    assert saved_bytes(model, forced) - saved_bytes(ours, forced) > 12 * one_vector


def test_skyreels_bfloat16_is_as_accurate():
    assert_as_accurate(skyreels(), lambda m: call(m, FRAME, enable_diffusion_forcing=True))


def test_skyreels_compiled_in_one_graph():
    assert_compiles(patched(skyreels(num_layers=1)), lambda m: call(m, FRAME, enable_diffusion_forcing=True))

"""S2DM: its U-Net is diffusers', its conditions reach the frames they belong to, its noise is shared."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from models.checkpoints import load_weights
from models.data.digits import MovingDigits
from models.frame_encoder import FrameEncoder
from models.s2dm import CONDITIONS, S2DM, S2DMConfig
from models.sampling.guidance import guide
from models.sampling.inversion import invert
from tests.models.public_cases import fill
from vidkern.diffusion import diffusion_loss, make_schedule, sample

BATCH, FRAMES, CHANNELS, SIZE = 2, 3, 2, 8
TEXT_LENGTH, TEXT_WIDTH, POSE_CHANNELS = 5, 12, 2
SMALL = {
    "input_size": SIZE,
    "in_channels": CHANNELS,
    "num_frames": FRAMES,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "num_heads": 2,
    "cross_attention_dim": 24,
    "norm_groups": 4,
    "text_width": TEXT_WIDTH,
    "token_grid": 2,
    "encoder_channels": 8,
}
WHOLE = {"image_width": 24, "reference": True, "motion": True, "pose_channels": POSE_CHANNELS}

#: What the published file unet/config.json of Stable Diffusion 1.5 says.
PUBLISHED = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


def small(**options: Any) -> S2DM:
    """A float64 model with random weights."""
    model = S2DM(S2DMConfig(**{**SMALL, **options})).double()
    fill(model.named_parameters(), 0)
    return model.eval()


def inputs(**options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, t and the conditions of a model with these options."""
    torch.manual_seed(0)
    conditions = {
        "text": torch.randn(BATCH, TEXT_LENGTH, TEXT_WIDTH),
        "image": torch.randn(BATCH, 4, 24),
        "reference": torch.randn(BATCH, CHANNELS, SIZE, SIZE),
        "motion": torch.randn(BATCH, FRAMES, 3, 16, 16),
        "pose": torch.randn(BATCH, FRAMES, POSE_CHANNELS, 11, 9),
    }
    wanted = S2DMConfig(**{**SMALL, **options}).conditions
    x = torch.randn(BATCH, FRAMES, CHANNELS, SIZE, SIZE).double()
    return x, torch.tensor([3, 700]), {name: conditions[name].double() for name in wanted}


def samples(*which: bool) -> Tensor:
    return torch.tensor(which)


def changed(a: Tensor, b: Tensor) -> list[list[bool]]:
    """Which frames of which clips differ."""
    return [[bool((a[i, f] != b[i, f]).any()) for f in range(a.shape[1])] for i in range(len(a))]


def test_the_defaults_are_the_published_unet():
    with torch.device("meta"):
        ours = S2DM(S2DMConfig()).unet
        published = UNet2DConditionModel.from_config(PUBLISHED)
    shapes = {name: value.shape for name, value in published.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964


def test_a_frame_is_a_call_of_the_unet_with_its_own_tokens():
    model, (x, t, conditions) = small(**WHOLE), inputs(**WHOLE)
    ours = model(x, t, **conditions)
    for b in range(BATCH):
        for f in range(FRAMES):
            tokens = [
                model.encoders["text"](conditions["text"][b]),
                conditions["image"][b],
                model.encoders["reference"](conditions["reference"][b, None])[0],
                model.encoders["motion"](conditions["motion"][b, f, None])[0],
                model.encoders["pose"](conditions["pose"][b, f, None])[0],
            ]
            wanted = model.unet(x[b, f, None], t[b], torch.cat(tokens)[None]).sample[0]
            torch.testing.assert_close(ours[b, f], wanted, rtol=1e-11, atol=1e-11)


def test_embeddings_of_the_attentions_width_go_in_as_they_are():
    options = {"text_width": 24, "motion": False}
    model = small(**options)
    x, t, _ = inputs()
    text = torch.randn(BATCH, TEXT_LENGTH, 24).double()
    ours = model(x, t, text=text)
    wanted = torch.stack([model.unet(x[:, f], t, text).sample for f in range(FRAMES)], 1)
    torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


def test_every_frame_can_have_a_timestep_of_its_own():
    model, (x, _, conditions) = small(), inputs()
    t = torch.tensor([[0, 500, 999], [7, 7, 8]])
    ours = model(x, t, **conditions)
    for f in range(FRAMES):
        torch.testing.assert_close(ours[:, f], model(x, t[:, f], **conditions)[:, f], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_reaches_its_own_frames_and_no_others(name):
    model, (x, t, conditions) = small(**WHOLE), inputs(**WHOLE)
    before = model(x, t, **conditions)
    moved = conditions[name].clone()
    of_frame = name in ("motion", "pose")
    moved[(1, 2) if of_frame else 1] += 1
    after = model(x, t, **{**conditions, name: moved})
    assert changed(before, after) == [[False] * 3, [not of_frame, not of_frame, True]]


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_dropped_condition_is_its_own_null(name):
    model, (x, t, conditions) = small(**WHOLE), inputs(**WHOLE)
    whole = model(x, t, **conditions)
    dropped = {name: samples(True, False)}
    ours = model(x, t, **conditions, dropped=dropped)
    other = {**conditions, name: torch.randn_like(conditions[name])}
    assert torch.equal(ours[0], model(x, t, **other, dropped=dropped)[0])
    assert torch.equal(ours[1], whole[1])
    assert (ours[0] - whole[0]).abs().max() > 1e-4
    ours.square().sum().backward()
    assert [null for null, p in model.nulls.items() if p.grad is not None and p.grad.abs().max() > 0] == [name]


def test_training_draws_the_drops_of_each_condition_by_its_own_probability():
    torch.manual_seed(0)
    model = small(text_dropout=0.5, motion_dropout=0.0).train()
    x, t, conditions = inputs()
    many = {name: value[:1].expand(100, *value.shape[1:]) for name, value in conditions.items()}
    x, t = x[:1, :1].expand(100, -1, -1, -1, -1), t[:1].expand(100)
    many["motion"] = many["motion"][:, :1]
    out = model(x, t, **many)
    kept, without = (
        model(x[:1], t[:1], text=many["text"][:1], motion=many["motion"][:1], dropped=drop)
        for drop in ({}, {"text": samples(True)})
    )
    is_kept = (out - kept).flatten(1).abs().amax(1) < 1e-9
    is_dropped = (out - without).flatten(1).abs().amax(1) < 1e-9
    assert (is_kept ^ is_dropped).all()
    assert 30 < is_dropped.sum() < 70  # 50 +- 4 standard deviations
    assert torch.equal(model(x, t, **many, dropped={}), model.eval()(x, t, **many))


def test_motion_has_the_same_tokens_at_every_resolution():
    model, (x, t, conditions) = small(), inputs()
    larger = conditions["motion"].repeat_interleave(3, -1).repeat_interleave(2, -2)
    ours = model(x, t, text=conditions["text"], motion=larger)
    torch.testing.assert_close(ours, model(x, t, **conditions), rtol=1e-11, atol=1e-11)


def test_tokens_know_their_places():
    encoder = FrameEncoder(in_channels=3, channels=8, width=24, grid=4).double()
    flat = encoder(torch.zeros(1, 3, 32, 32).double())[0]
    assert len(torch.unique(flat, dim=0)) == 16
    left = torch.zeros(1, 3, 32, 32).double()
    left[..., :8] = 1  # a quarter of the frame, at the left
    moved = (encoder(left)[0] - flat).abs().amax(1).unflatten(0, (4, 4))
    assert moved[:, :2].min() > 1e-3
    assert moved[:, 2:].max() == 0


def test_a_fresh_encoders_tokens_say_what_moves_as_well_as_where_they_are():
    torch.manual_seed(0)
    encoder = FrameEncoder(in_channels=3, channels=32, width=48, grid=4)
    digits = MovingDigits(num_frames=4, length=32, motion=True)
    tokens = encoder(torch.cat([digits[i]["motion"][1:] for i in range(32)]))
    assert (tokens - tokens.mean(0)).std() > 0.2 * tokens.std()


def test_a_fresh_motion_adapter_leaves_the_unet_as_it_was():
    assert S2DM(S2DMConfig(**SMALL, motion_adapter=True)).motion_adapter.gains.eq(0).all()
    adapted, (x, t, conditions) = small(motion_adapter=True), inputs()
    torch.nn.init.zeros_(adapted.motion_adapter.gains)
    plain = small()
    plain.load_state_dict(adapted.state_dict(), strict=False)
    assert torch.equal(adapted(x, t, **conditions), plain(x, t, **conditions))


def test_a_motion_adapter_adds_its_features_to_the_way_down():
    model, (x, t, conditions) = small(motion_adapter=True), inputs()
    motion = conditions["motion"] = torch.randn(BATCH, FRAMES, 3, SIZE, SIZE).double()
    ours = model(x, t, **conditions, dropped={"motion": samples(False, True)})
    for b, dropped in enumerate((False, True)):
        text = model.encoders["text"](conditions["text"][b]).expand(FRAMES, -1, -1)
        moved = model.encoders["motion"](motion[b])
        tokens = torch.cat([text, model.nulls["motion"].expand_as(moved) if dropped else moved], 1)
        features = zip(model.motion_adapter.gains, model.motion_adapter.adapter(motion[b]), strict=True)
        added = None if dropped else [gain * feature for gain, feature in features]
        wanted = model.unet(x[b], t[b], tokens, down_intrablock_additional_residuals=added).sample
        torch.testing.assert_close(ours[b], wanted, rtol=1e-11, atol=1e-11)


def test_a_motion_adapter_takes_motion_of_any_size():
    model, (x, t, conditions) = small(motion_adapter=True), inputs()
    x = x[..., :-1]  # an odd width, which the U-Net's strides and the adapter's pooling round in the same way
    assert model(x, t, **conditions).shape == x.shape


def test_training_with_a_motion_adapter_uses_motion():
    """A toy: the frame is the motion's first channel, so that without motion nothing can be known of it."""
    torch.manual_seed(0)
    model = small(motion_adapter=True, text_width=None, motion_dropout=0.0).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    noise = torch.zeros(8, 1, CHANNELS, SIZE, SIZE)
    for _ in range(30):
        motion = F.interpolate(torch.randn(8, 3, 2, 2), SIZE, mode="bilinear")[:, None]
        wanted = motion[:, :, :1].expand_as(noise)
        loss = (model(noise, torch.full((8,), 999), motion=motion, dropped={}) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5 * wanted.var()


@pytest.mark.parametrize("step_sharing", ["shared", "independent"])
@pytest.mark.parametrize("sharing", ["shared", "independent"])
def test_frames_of_equal_conditions_are_equal_under_shared_noise(sharing, step_sharing):
    model = small(motion=False).float()
    text = torch.randn(BATCH, TEXT_LENGTH, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    clips = sample(
        functools.partial(model, text=text),
        (BATCH, FRAMES, CHANNELS, SIZE, SIZE),
        make_schedule("scaled_linear"),
        torch.tensor([7, 0]),
        num_steps=4,
        eta=1.0,
        sharing=sharing,
        step_sharing=step_sharing,
    )
    same = bool((clips == clips[:, :1]).all())
    assert same == (sharing == step_sharing == "shared")
    assert not torch.equal(clips[0], clips[1])


def test_a_clip_at_rest_is_drawn_from_its_given_first_frame():
    model, text = (
        small().float(),
        torch.randn(BATCH, TEXT_LENGTH, TEXT_WIDTH, generator=torch.Generator().manual_seed(0)),
    )
    first = torch.rand(BATCH, 1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rest = torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 3, 1, 1).expand(BATCH, FRAMES, 3, 8, 8)  # no flow, all shown
    schedule = make_schedule("scaled_linear")
    alone = functools.partial(model, text=text, motion=rest[:, :1])
    noise = invert(alone, first, schedule, 5, refinements=8).expand(-1, FRAMES, -1, -1, -1)
    clips = sample(functools.partial(model, text=text, motion=rest), noise, schedule, torch.tensor([7, 0]), num_steps=5)
    assert (noise[:, :1] - first).norm() / first.norm() > 0.5
    for f in range(FRAMES):
        assert (clips[:, f] - first[:, 0]).norm() / first.norm() < 1e-3


def test_guidance_weighs_text_and_motion():
    model, (x, t, conditions) = small(), inputs()
    kept, lost = samples(False, False), samples(True, True)
    none = model(x, t, **conditions, dropped={"text": lost, "motion": lost})
    moved = model(x, t, **conditions, dropped={"text": lost, "motion": kept})
    whole = model(x, t, **conditions)
    ours = guide(model, conditions, {"motion": 1.5, "text": 7.5})(x, t)
    torch.testing.assert_close(ours, none + 1.5 * (moved - none) + 7.5 * (whole - moved), rtol=1e-10, atol=1e-10)


def test_training_on_shared_noise_has_one_loss_for_equal_frames():
    model, (x, t, conditions) = small().float(), inputs()
    conditions = {name: value.float() for name, value in conditions.items()}
    conditions["motion"] = conditions["motion"][:, :1].expand(-1, FRAMES, -1, -1, -1)
    still = x[:, :1].float().expand(-1, FRAMES, -1, -1, -1).contiguous()
    loss = functools.partial(
        diffusion_loss,
        functools.partial(model, **conditions),
        still,
        t,
        make_schedule("scaled_linear"),
        torch.tensor([7, 0]),
        learned_range=False,
    )
    shared = loss(sharing="shared")["per_frame"]
    torch.testing.assert_close(shared, shared[:, :1].expand(-1, FRAMES), rtol=1e-6, atol=0)
    independent = loss()["per_frame"]
    assert (independent - independent[:, :1]).abs()[:, 1:].min() > 1e-3


def test_a_fresh_model_learns_through_every_parameter():
    torch.manual_seed(0)
    model = S2DM(S2DMConfig(**{**SMALL, **WHOLE, "learn_sigma": True})).double()
    x, t, conditions = inputs(**WHOLE)
    dropped = {name: samples(True, False) for name in CONDITIONS}
    out = model(x, t, **conditions, dropped=dropped)
    assert out.shape == (BATCH, FRAMES, 2 * CHANNELS, SIZE, SIZE)
    out.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [name for name, p in model.encoders.named_parameters() if p.grad.abs().max() == 0] == []


def test_activation_checkpointing_gives_the_same_gradients():
    model, (x, t, conditions) = small().train(), inputs()

    def gradients(checkpointing: bool) -> list[Tensor]:
        model.activation_checkpointing = checkpointing
        assert model.activation_checkpointing is checkpointing
        model.zero_grad()
        model(x, t, **conditions, dropped={}).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for ours, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_bfloat16_autocast_is_close_to_float32():
    model, (x, t, conditions) = small().float(), inputs()
    x, conditions = x.float(), {name: value.float() for name, value in conditions.items()}
    wanted = model(x, t, **conditions)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(x, t, **conditions, dropped={"text": samples(False, False)})
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - wanted).norm() / wanted.norm() < 0.03


def test_the_graph_is_whole_and_the_same_for_every_drop():
    model, (x, t, conditions) = small(block_out_channels=(16,)).train(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ours = compiled(x, t, **conditions, dropped={"text": samples(True, False)})
    with torch.compiler.set_stance("fail_on_recompile"):
        other = compiled(x, t, **conditions, dropped={"text": samples(False, True)})
    assert torch.equal(ours, model(x, t, **conditions, dropped={"text": samples(True, False)}))
    assert torch.equal(other, model(x, t, **conditions, dropped={"text": samples(False, True)}))


@pytest.mark.parametrize("folder", ["unet", "."])
def test_weights_come_from_a_local_folder(tmp_path: Path, folder: str):
    saved = small().float()
    saved.unet.save_pretrained(tmp_path / folder)
    model = S2DM(S2DMConfig(**SMALL, unet=str(tmp_path)))
    for name, value in saved.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], value), name


def test_a_unet_of_another_structure_is_refused(tmp_path: Path):
    small().unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"the U-Net of {tmp_path} has layers_per_block = 1, the configuration asks"):
        S2DM(S2DMConfig(**{**SMALL, "layers_per_block": 2}, unet=str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "act_fn": "gelu"}))
    with pytest.raises(ValueError, match="has act_fn = gelu, the configuration asks for silu"):
        S2DM(S2DMConfig(**SMALL, unet=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", r"no U-Net at \./absent: want a local folder, or owner/name on the hub"),
        ("EMPTY", "cannot load a UNet2DConditionModel from "),
    ],
)
def test_an_absent_unet_is_named(tmp_path: Path, name: str, message: str):
    name = str(tmp_path) if name == "EMPTY" else name
    with pytest.raises(ValueError, match=message) as raised:
        S2DM(S2DMConfig(**SMALL, unet=name))
    assert "\n" not in str(raised.value)


def test_a_saved_model_is_loaded_whole():
    saved = small(**WHOLE)
    model = S2DM(saved.config).double().eval()
    report = load_weights(model, {"ema": saved.state_dict()})
    assert set(report.loaded) == set(saved.state_dict())
    x, t, conditions = inputs(**WHOLE)
    assert torch.equal(model(x, t, **conditions), saved(x, t, **conditions))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_out_channels": (16, 30)}, "block_out_channels must be multiples of norm_groups = 4"),
        ({"block_out_channels": ()}, "block_out_channels must be multiples"),
        ({"text_width": None, "motion": False}, "motion must be True where there is no other condition"),
        ({"motion_dropout": 1.0}, r"motion_dropout must be in \[0, 1\), got 1.0"),
        ({"input_size": (8, 0)}, r"input_size must be positive, got \(8, 0\)"),
        ({"encoder_channels": 6}, "encoder_channels must be a multiple of 4, got 6"),
        ({"token_grid": 0}, "token_grid must be positive, got 0"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        S2DMConfig(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 5, 8, 8)}, r"x must be \(B, F, C = 2, H, W\), got \(2, 3, 5, 8, 8\)"),
        ({"t": torch.zeros(3)}, r"t must be \(B,\) = \(2,\) or \(B, F\) = \(2, 3\), got \(3,\)"),
        ({"text": None}, r"text must be of shape \(2, L, 12\), got None"),
        ({"text": torch.zeros(2, 12)}, r"text must be of shape \(2, L, 12\), got \(2, 12\)"),
        ({"motion": torch.zeros(2, 4, 3, 8, 8)}, r"motion must be of shape \(2, 3, 3, h, w\), got \(2, 4, 3, 8, 8\)"),
        ({"pose": torch.zeros(2, 3, 2, 8, 8)}, r"pose must be None, got \(2, 3, 2, 8, 8\)"),
        (
            {"dropped": {"pose": samples(True, True)}},
            r"dropped must name conditions among \(text, motion\), got 'pose'",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x, t, conditions = inputs()
    arguments = {"x": x, "t": t, **conditions, **change}
    with pytest.raises(ValueError, match=message):
        small()(**arguments)


def test_conditions_and_dropouts_follow_the_configuration():
    assert S2DMConfig().conditions == ("text", "motion")
    config = dataclasses.replace(S2DMConfig(), text_width=None, reference=True, reference_dropout=0.3)
    assert config.dropouts == {"reference": 0.3, "motion": 0.1}

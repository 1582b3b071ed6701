"""VDM as users call it: its plain writing, other sizes, frames that meet in temporal attention only, conditions."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.vdm import VDM, VDMConfig
from tests.models.plain_vdm import plain_vdm
from tests.models.public_cases import fill
from tests.models.public_vdm import RECORDED, public_inputs, public_model, public_results

BATCH, FRAMES, CHANNELS, SIZE, TEXT, TOKENS = 2, 4, 3, 8, 10, 5
SMALL = {
    "input_size": SIZE,
    "num_frames": FRAMES,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "num_heads": 2,
}
CONDITIONED = {"text_width": TEXT, "reference_channels": 3}


def small(seed: int = 0, **options: Any) -> VDM:
    model = VDM(VDMConfig(**{**SMALL, **options}))
    fill(model.named_parameters(), seed)
    return model.eval()


def clip(frames: int = FRAMES, batch: int = BATCH, size: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch, frames, CHANNELS, *size)


def conditions(batch: int = BATCH) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {"text": torch.randn(batch, TOKENS, TEXT), "reference": torch.randn(batch, 3, 2 * SIZE, 3 * SIZE)}


def gradients(model: VDM, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(9)
    (output.float() * torch.randn(output.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(ours: Tensor, wanted: Tensor) -> float:
    ours, wanted = ours.detach().double(), wanted.detach().double()
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spatial_from": 1, "learn_sigma": True, "text_width": TEXT},
        {"channel_multipliers": (1, 2, 2), "reference_channels": 3, "head_size": 64},
    ],
    ids=["unconditional", "text", "reference"],
)
def test_the_network_is_its_plain_writing(options):
    model = small(**options)
    x, t = clip(), torch.tensor([[3, 700, 0, 41], [999, 20, 500, 8]])
    given = {name: value for name, value in conditions().items() if name in model.config.conditions}
    weights = {name: value.double().requires_grad_() for name, value in model.state_dict().items()}
    plain = plain_vdm(weights, model.config, x.double(), t, **{name: value.double() for name, value in given.items()})
    ours = model(x, t, **given)
    assert ours.shape == (BATCH, FRAMES, model.config.out_channels, SIZE, SIZE)
    assert relative(ours, plain) < 1e-6
    torch.manual_seed(9)
    (plain * torch.randn(plain.shape)).sum().backward()
    of_ours = gradients(model, ours)
    for name, weight in weights.items():
        if name != "text_pool.null":
            assert relative(of_ours[name], weight.grad) < 2e-5, name


def test_outputs_and_gradients_are_those_of_the_public_code():
    model, tensors = public_model().eval(), public_inputs()
    bias = model.relative_bias.relative_attention_bias.weight
    ours = public_results(lambda: model(**tensors), bias, model.in_conv.weight)
    for name, theirs in load_file(RECORDED).items():
        assert relative(ours[name], theirs) < 1e-5, name


def test_a_fresh_model_predicts_exactly_zero_and_can_learn():
    model = VDM(VDMConfig(**SMALL, **CONDITIONED))
    output = model(clip(), torch.tensor([3, 700]), **conditions())
    assert torch.count_nonzero(output) == 0
    assert gradients(model, output)["out_linear.weight"].norm() > 0


def test_every_parameter_learns():
    model = small(**CONDITIONED, spatial_from=1)
    drops = {"text": torch.tensor([False, True]), "reference": torch.tensor([False, True])}
    found = gradients(model, model(clip(), torch.tensor([3, 700]), **conditions(), dropped=drops))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert min(gradient.norm() for gradient in found.values()) > 0


def test_every_parameter_gets_a_gradient_where_nothing_is_dropped():
    model = small(**CONDITIONED, text_dropout=0.0, reference_dropout=0.0).train()
    found = gradients(model, model(clip(), torch.tensor([3, 700]), **conditions()))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert torch.count_nonzero(found["text_pool.null"]) == 0


def test_one_timestep_for_the_clip_equals_the_same_for_every_frame():
    model, x, t = small(), clip(), torch.tensor([3, 700])
    assert relative(model(x, t[:, None].expand(-1, FRAMES)), model(x, t)) < 1e-6
    assert relative(model(x, torch.tensor([[3, 700, 3, 3], [700] * 4]))[0], model(x, t)[0]) > 0.001


@pytest.mark.parametrize(("frames", "size"), [(1, (SIZE, SIZE)), (7, (6, 12))])
def test_other_lengths_and_sizes_are_those_of_a_model_built_for_them(frames, size):
    x, t = clip(frames, size=size), torch.tensor([3, 700])
    assert torch.equal(small()(x, t), small(num_frames=frames, input_size=size)(x, t))


class Unturned(nn.Module):
    """A relative bias of zeros."""

    def forward(self, frames: int) -> Tensor:
        return torch.zeros(SMALL["num_heads"], frames, frames)


def test_without_rope_and_bias_permuted_frames_give_permuted_frames(monkeypatch):
    model, x, t = small(), clip(), torch.tensor([[3, 700, 0, 41], [999, 20, 500, 8]])
    order = torch.tensor([2, 0, 3, 1])
    assert relative(model(x[:, order], t[:, order]), model(x, t)[:, order]) > 0.001
    ones, zeros = torch.ones(FRAMES, model.config.head_size), torch.zeros(FRAMES, model.config.head_size)
    monkeypatch.setattr("models.vdm.rotary_tables", lambda *_: (ones, zeros))
    model.relative_bias = Unturned()
    assert relative(model(x[:, order], t[:, order]), model(x, t)[:, order]) < 1e-6


def test_frames_that_shrink_to_one_position_are_served():
    model, x, t = small(channel_multipliers=(1, 1, 1, 1)), clip(), torch.tensor([[3, 700, 0, 41], [999, 20, 500, 8]])
    ours = model(x, t)
    assert relative(ours, plain_vdm(model.double().state_dict(), model.config, x.double(), t)) < 1e-6


def test_frames_meet_in_temporal_attention_only():
    model, x, t = small(), clip(), torch.tensor([3, 700])
    changed = x.clone()
    changed[:, -1] += 1
    assert relative(model(changed, t)[:, 0], model(x, t)[:, 0]) > 0.001
    for name, parameter in model.named_parameters():
        if "time.proj" in name:
            nn.init.zeros_(parameter)
    assert torch.equal(model(changed, t)[:, 0], model(x, t)[:, 0])


def test_in_joint_training_images_are_clips_of_one_frame_without_conditions():
    model, x = small(**CONDITIONED), clip(FRAMES + 2)
    t = torch.randint(0, 1000, (BATCH, FRAMES + 2))
    joint = model(x, t, **conditions(), num_images=2)
    assert relative(joint[:, :FRAMES], model(x[:, :FRAMES], t[:, :FRAMES], **conditions())) < 1e-6
    none = {name: torch.tensor([True, True]) for name in model.config.conditions}
    for i in (-2, -1):
        alone = model(x[:, i, None], t[:, i, None], **conditions(), dropped=none)
        assert relative(joint[:, i, None], alone) < 1e-6
    shared = model(x, t[:, -1], **conditions(), num_images=2)
    assert relative(shared[:, -1], joint[:, -1]) < 1e-6


@pytest.mark.parametrize("name", ["text", "reference"])
def test_a_dropped_condition_is_null_for_its_sample_alone(name):
    model, x, t, given = small(**CONDITIONED), clip(), torch.tensor([3, 700]), conditions()
    full, dropped = model(x, t, **given), model(x, t, **given, dropped={name: torch.tensor([False, True])})
    assert torch.equal(dropped[0], full[0])
    assert relative(dropped[1], full[1]) > 0.001
    other = {**given, name: given[name].flip(-1)}
    assert torch.equal(model(x, t, **other, dropped={name: torch.tensor([False, True])})[1], dropped[1])
    assert relative(model(x, t, **other)[1], full[1]) > 0.0001


def test_a_dropped_reference_is_zeros():
    model, x, t, given = small(**CONDITIONED), clip(), torch.tensor([3, 700]), conditions()
    zeros = {**given, "reference": torch.zeros_like(given["reference"])}
    dropped = model(x, t, **given, dropped={"reference": torch.tensor([True, True])})
    assert torch.equal(dropped, model(x, t, **zeros))


def test_conditions_are_dropped_in_training_only_and_only_where_the_caller_does_not_say():
    model = small(**CONDITIONED, text_dropout=0.5, reference_dropout=0.0)
    x, t, given = clip(), torch.tensor([3, 700]), conditions()
    kept = model(x, t, **given)
    without = model(x, t, **given, dropped={"text": torch.tensor([True, True])})
    model.train()
    assert torch.equal(model(x, t, **given, dropped={}), kept)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        drawn = model(x, t, **given)
        for b in range(BATCH):
            assert torch.equal(drawn[b], kept[b]) or torch.equal(drawn[b], without[b])
            seen.add((b, torch.equal(drawn[b], kept[b])))
    assert len(seen) == 2 * BATCH


def test_the_reference_frame_comes_by_area_at_every_size():
    model, x, t, given = small(**CONDITIONED), clip(), torch.tensor([3, 700]), conditions()
    pooled = given["reference"].unflatten(-1, (SIZE, 3)).unflatten(-3, (SIZE, 2)).mean((-1, -3))
    assert relative(model(x, t, **given), model(x, t, **{**given, "reference": pooled})) < 1e-6


@pytest.mark.parametrize("recompute", ["all", "cheap"])
def test_checkpointing_gives_the_same_bits(recompute):
    model, x, t, given = small(**CONDITIONED), clip(), torch.tensor([3, 700]), conditions()
    plain = gradients(model, model(x, t, **given))
    model.activation_checkpointing, model.recompute = True, recompute
    checkpointed = gradients(model, model(x, t, **given))
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_float64_is_close_to_float32():
    model, x, t, given = small(**CONDITIONED), clip(), torch.tensor([3, 700]), conditions()
    ours = model(x, t, **given)
    exact = model.double()(x.double(), t, **{name: value.double() for name, value in given.items()})
    assert exact.dtype == torch.float64
    assert relative(ours, exact) < 1e-6


def test_bfloat16_autocast_is_close_to_float32():
    model, x, t, given = small(**CONDITIONED), clip(), torch.tensor([3, 700]), conditions()
    exact = model(x, t, **given)
    wanted = gradients(model, exact)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        ours = model(x, t, **given)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) < 0.03
    of_ours = gradients(model, ours)
    assert all(of_ours[name].dtype == torch.float32 for name in wanted)
    all_of_ours, all_wanted = (torch.cat([g[name].flatten() for name in wanted]) for g in (of_ours, wanted))
    assert relative(all_of_ours, all_wanted) < 0.05


class Copies(TorchDispatchMode):
    """Counts the copies of whole clips."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        result = func(*args, **(kwargs or {}))
        if name in ("clone", "copy_", "_to_copy", "cat") and result.numel() >= self.elements:
            self.calls.append(name)
        return result


def test_clips_are_copied_at_the_ends_and_at_skip_connections_only():
    model, x, t = small(), clip(size=(2 * SIZE, 2 * SIZE)), torch.tensor([3, 700])
    with Copies(x.numel()) as copies:
        model(x, t)
    levels = len(model.config.channel_multipliers)
    # upsample_conv writes its four phases where they belong
    assert sorted(copies.calls) == ["cat"] * (levels + 1) + ["clone"] * 2 + ["copy_"] * 4 * (levels - 1)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    model, x, t, given = small(**CONDITIONED, channel_multipliers=(1,)), clip(), torch.tensor([3, 700]), conditions()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative(compiled(x, t, **given), model(x, t, **given)) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 20}, "base_channels must be a multiple of 8, got 20"),
        ({"input_size": 9}, "input_size must be a multiple of 2, which is halved"),
        ({"channel_multipliers": ()}, "channel_multipliers must be at least one, and positive, got "),
        ({"num_frames": 257}, "num_frames must be from 1 to 256, got 257"),
        ({"head_size": 48}, "head_size must be one of 32, 64, 72, 80, 96, 128, got 48"),
        ({"text_dropout": 1.0}, r"text_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VDMConfig(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(2, 4, 4, 8, 8)}, r"x must be \(B, F, C = 3, H, W\), got \(2, 4, 4, 8, 8\)"),
        ({"x": torch.zeros(2, 4, 3, 8, 7)}, r"x must have H and W multiples of 2, got \(8, 7\)"),
        ({"t": torch.zeros(3)}, r"t must be \(B,\) = \(2,\) or \(B, F\) = \(2, 4\), got \(3,\)"),
        ({"text": None}, r"text must be of shape \(2, L, 10\), got None"),
        ({"text": torch.zeros(2, 5, 9)}, r"text must be of shape \(2, L, 10\), got \(2, 5, 9\)"),
        ({"reference": torch.zeros(1, 3, 8, 8)}, r"reference must be of shape \(2, 3, H, W\), got \(1, 3, 8, 8\)"),
        ({"x": torch.zeros(2, 257, 3, 2, 2)}, "x must have at most 256 frames, got F = 257"),
        ({"num_images": 4}, "num_images must be at least 0 and below x's 4 frames, got 4"),
        ({"dropped": {"pose": torch.tensor([True, True])}}, "dropped must name conditions among"),
    ],
)
def test_calls_that_do_not_fit_are_refused(options, message):
    call = {"x": clip(), "t": torch.tensor([3, 700]), **conditions(), **options}
    with pytest.raises(ValueError, match=message):
        small(**CONDITIONED)(**call)


def test_an_unknown_condition_is_refused():
    with pytest.raises(ValueError, match=r"text must be None, got \(2, 5, 10\)"):
        small()(clip(), torch.tensor([3, 700]), text=conditions()["text"])

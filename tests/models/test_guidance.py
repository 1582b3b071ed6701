"""Guidance with a scale for each condition, against its definition and against the sampler's own."""

import functools

import pytest
import torch
from torch import Tensor

from models.latte import Latte, LatteConfig
from models.sampling.guidance import guide
from tests.models.public_cases import fill
from vidkern.diffusion import make_schedule, sample

BATCH, FRAMES, CHANNELS, SIZE = 2, 3, 2, 4


class Plain:
    """A float64 network of three conditions that interact; counts the samples it is asked for."""

    def __init__(self, out_channels: int = CHANNELS) -> None:
        torch.manual_seed(1)
        self.mix = torch.randn(out_channels, CHANNELS, dtype=torch.float64)
        self.samples = 0

    def __call__(self, x: Tensor, t: Tensor, *, dropped: dict[str, Tensor], **conditions: Tensor) -> Tensor:
        self.samples += len(x)
        factor = torch.ones(len(x), dtype=torch.float64)
        for name, value in conditions.items():
            null = torch.full_like(value, 0.3)
            factor = factor * (torch.where(dropped[name], null, value) if name in dropped else value)
        hidden = torch.tanh(torch.einsum("oc,bfchw->bfohw", self.mix, x) * factor[:, None, None, None, None])
        return hidden + torch.cos(t.double())[..., None, None, None]


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, FRAMES, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    t = torch.randint(1000, (BATCH, FRAMES))
    return x, t, {name: torch.rand(BATCH, dtype=torch.float64) + 0.5 for name in ("text", "reference", "motion")}


def separately(model: Plain, x: Tensor, t: Tensor, conditions: dict[str, Tensor], kept: set[str]) -> Tensor:
    dropped = {name: torch.full((BATCH,), name not in kept) for name in conditions}
    return model(x, t, dropped=dropped, **conditions)


def test_scales_weigh_conditions_in_their_order():
    model, (x, t, conditions) = Plain(), inputs()
    ours = guide(model, conditions, {"motion": 2.5, "text": 7.5, "reference": 1.7})(x, t)
    none = separately(model, x, t, conditions, set())
    motion = separately(model, x, t, conditions, {"motion"})
    text = separately(model, x, t, conditions, {"motion", "text"})
    whole = separately(model, x, t, conditions, set(conditions))
    wanted = none + 2.5 * (motion - none) + 7.5 * (text - motion) + 1.7 * (whole - text)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    other_order = guide(model, conditions, {"text": 7.5, "motion": 2.5, "reference": 1.7})(x, t)
    assert (other_order - wanted).abs().max() > 0.1


def test_a_condition_without_a_scale_is_always_kept():
    model, (x, t, conditions) = Plain(), inputs()
    ours = guide(model, conditions, {"text": 3.0})(x, t)
    rest = separately(model, x, t, conditions, {"reference", "motion"})
    whole = separately(model, x, t, conditions, set(conditions))
    torch.testing.assert_close(ours, rest + 3 * (whole - rest), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales", [{}, {"text": 1.0}, {"motion": 1.0, "text": 1.0, "reference": 1.0}])
def test_scales_of_1_are_the_conditional_model_at_its_cost(scales):
    model, (x, t, conditions) = Plain(), inputs()
    ours = guide(model, conditions, scales)(x, t)
    assert model.samples == BATCH
    assert torch.equal(ours, separately(model, x, t, conditions, set(conditions)))


def test_a_scale_of_0_ignores_the_condition():
    model, (x, t, conditions) = Plain(), inputs()
    ours = guide(model, conditions, {"motion": 2.0, "text": 0.0})(x, t)
    without = separately(model, x, t, conditions, {"reference"})
    moved = separately(model, x, t, conditions, {"reference", "motion"})
    torch.testing.assert_close(ours, without + 2 * (moved - without), rtol=1e-12, atol=1e-12)


def test_the_variance_is_that_of_the_whole_condition():
    model, (x, t, conditions) = Plain(2 * CHANNELS), inputs()
    scales = {"motion": 2.5, "text": 7.5, "reference": 4.0}
    epsilon, sigma = guide(model, conditions, scales)(x, t).chunk(2, dim=2)
    whole = separately(model, x, t, conditions, set(conditions))
    assert torch.equal(sigma, whole[:, :, CHANNELS:])
    assert (epsilon - whole[:, :, :CHANNELS]).abs().max() > 0.1


def test_predictions_in_bfloat16_are_weighed_in_float32():
    model, (x, t, conditions) = Plain(), inputs()

    def narrow(*args: Tensor, **options: Tensor) -> Tensor:
        return model(*args, **options).bfloat16()

    ours = guide(narrow, conditions, {"text": 9.0})(x, t)
    rest = separately(model, x, t, conditions, {"reference", "motion"}).bfloat16().float()
    whole = separately(model, x, t, conditions, set(conditions)).bfloat16().float()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, rest + 9 * (whole - rest), rtol=1e-6, atol=1e-5)


def test_an_unknown_condition_is_named():
    with pytest.raises(ValueError, match=r"scales must name conditions among \(text\), got pose, y"):
        guide(Plain(), {"text": torch.zeros(BATCH)}, {"pose": 2.0, "text": 1.0, "y": 1.0})


@pytest.mark.parametrize(("learn_sigma", "sampler"), [(True, "ddim"), (True, "ddpm"), (False, "ddim")])
def test_one_condition_is_the_guidance_of_the_sampler(learn_sigma, sampler):
    sizes = {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 2, "num_frames": FRAMES}
    model = Latte(LatteConfig(**sizes, num_classes=5, learn_sigma=learn_sigma)).eval()
    fill(model.named_parameters(), 0)
    y, shape = torch.tensor([3, 0]), (BATCH, FRAMES, 4, 8, 8)
    draw = functools.partial(
        sample,
        shape=shape,
        schedule=make_schedule("linear", 100),
        key=torch.tensor([5, 0]),
        sampler=sampler,
        num_steps=4,
        variance="learned_range" if learn_sigma else "fixed_small",
    )
    wanted = draw(model, y=y, y_null=5, cfg_scale=2.5)
    unguided = draw(model, y=y)
    ours = draw(guide(model, {"y": y}, {"y": 2.5}))
    assert (wanted - unguided).norm() / wanted.norm() > 0.01
    assert (ours - wanted).norm() / wanted.norm() < 1e-4

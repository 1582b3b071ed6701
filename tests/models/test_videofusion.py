"""VideoFusion: its decomposition of the noise, the paper's loss, conditions and sampling."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import sample as sample_command
from models import train
from models.command_line import UsageError
from models.latte import Latte, LatteConfig
from models.networks import noise_options
from models.sampling.network import load_network
from models.training import step
from models.training.data import Batches
from models.training.distributed import World
from models.videofusion import VideoFusion, frame_weights, middle_frame
from tests.models.public_cases import fill
from tests.models.runs import config, newest, options
from vidkern.diffusion import diffusion_loss, make_schedule, sample
from vidkern.ops import philox_normal
from vidkern.rng import KeyStream

BATCH, FRAMES, CHANNELS, SIZE, WEIGHT = 2, 5, 3, 8, 0.6
SHAPE = (BATCH, FRAMES, CHANNELS, SIZE, SIZE)
MIDDLE = 2
SMALL = {
    "input_size": SIZE,
    "in_channels": CHANNELS,
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 2,
    "num_frames": FRAMES,
    "learn_sigma": False,
}
KEY = torch.tensor([7, 0])
SCHEDULE = make_schedule("linear")


def small(**options: Any) -> VideoFusion:
    model = VideoFusion(LatteConfig(**{**SMALL, **options}), SCHEDULE, WEIGHT)
    fill(model.named_parameters(), 0)
    return model.eval()


def clip(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """The linear schedule's coefficients for t (B,) or (B, F), written independently."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
    shape = (BATCH, -1, 1, 1, 1)
    return alpha_bar.sqrt().float().view(shape), (1 - alpha_bar).sqrt().float().view(shape)


def paper_loss(model: VideoFusion, x0: Tensor, t: Tensor, noise: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the paper, each a mean over its frames, frame by frame."""
    alpha, sigma = alpha_sigma(t)
    z = alpha * x0 + sigma * noise
    t_middle = t if t.dim() == 1 else t[:, MIDDLE]
    predicted = model.base(z[:, [MIDDLE]], t_middle)[:, 0]
    of_base = ((predicted - base) ** 2).mean()
    stopped = predicted.detach()
    cleaner = z.clone()
    for i in range(FRAMES):
        weight = 1.0 if i == MIDDLE else WEIGHT
        cleaner[:, i] -= sigma.expand(BATCH, FRAMES, 1, 1, 1)[:, i] * weight**0.5 * stopped
    residual = model.residual(cleaner, t)
    terms = [
        ((noise[:, i] - WEIGHT**0.5 * stopped - (1 - WEIGHT) ** 0.5 * residual[:, i]) ** 2).mean()
        for i in range(FRAMES)
        if i != MIDDLE
    ]
    return of_base, torch.stack(terms).mean()


@pytest.mark.parametrize("t", [torch.tensor([700, 40]), torch.tensor([[3, 700, 90, 0, 41], [999, 20, 500, 8, 1]])])
def test_the_loss_and_its_gradients_are_the_papers_two_terms(t: Tensor) -> None:
    model, x0 = small(), clip()
    weights = frame_weights(WEIGHT, FRAMES)
    losses = diffusion_loss(model, x0, t, SCHEDULE, KEY, learned_range=False, sharing="mixed", base_weight=weights)
    losses["loss"].backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    noise = philox_normal(SHAPE, KEY, sharing="mixed", base_weight=weights)
    of_base, of_residual = paper_loss(model, x0, t, noise, noise[:, MIDDLE])
    wanted = of_base / FRAMES + of_residual * (FRAMES - 1) / FRAMES
    torch.testing.assert_close(losses["loss"], wanted, rtol=1e-5, atol=0)
    wanted.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert len(ours) == sum(p.requires_grad for p in model.parameters())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_base_learns_from_the_middle_frame_alone_and_the_residual_from_the_others() -> None:
    model = small()
    out = model(clip(), torch.tensor([700, 40]))
    assert torch.equal(out[:, [MIDDLE]], model.base(clip()[:, [MIDDLE]], torch.tensor([700, 40])))
    others = [i for i in range(FRAMES) if i != MIDDLE]
    for frames, learner, idle in (([MIDDLE], model.base, model.residual), (others, model.residual, model.base)):
        model.zero_grad()
        out[:, frames].square().sum().backward(retain_graph=True)
        assert all(p.grad.norm() > 0 for p in learner.parameters() if p.requires_grad)
        assert all(p.grad is None or not p.grad.any() for p in idle.parameters())


def test_exact_predictions_of_both_parts_are_the_mixed_noise() -> None:
    """With networks that know the noise, what the residual network sees is alpha x_0 plus its own noise alone."""
    model, x0, t = small(), clip(), torch.tensor([700, 40])
    weights = frame_weights(WEIGHT, FRAMES)
    noise = philox_normal(SHAPE, KEY, sharing="mixed", base_weight=weights)
    base = noise[:, [MIDDLE]]
    residual = (noise - WEIGHT**0.5 * base) / (1 - WEIGHT) ** 0.5
    alpha, sigma = alpha_sigma(t)
    seen: list[Tensor] = []
    model.base.forward = lambda x, t, **_: base
    model.residual.forward = lambda x, t, **_: seen.append(x) or residual
    got = model(alpha * x0 + sigma * noise, t)
    torch.testing.assert_close(got, noise, rtol=1e-5, atol=1e-5)
    others = [i for i in range(FRAMES) if i != MIDDLE]
    wanted = alpha * x0 + sigma * (1 - WEIGHT) ** 0.5 * residual
    torch.testing.assert_close(seen[0][:, others], wanted[:, others], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0][:, MIDDLE], (alpha * x0)[:, MIDDLE], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [2, 5, 16])
def test_the_middle_frames_noise_is_the_base_of_all(frames: int) -> None:
    weights = frame_weights(0.36, frames)
    noise = philox_normal((1, frames, 1, 64, 64), KEY, sharing="mixed", base_weight=weights)[0].flatten(1)
    base = philox_normal((1, frames, 1, 64, 64), KEY, sharing="shared")[0].flatten(1)
    middle = middle_frame(frames)
    assert torch.equal(noise[middle], base[middle])
    for i in {0, frames - 1} - {middle}:
        correlation = torch.corrcoef(torch.stack([noise[i], noise[middle]]))[0, 1]
        assert abs(correlation - 0.6) < 5 / 64  # 5 standard deviations


def test_a_sample_loses_a_condition_in_both_networks() -> None:
    model, t = small(num_classes=3, class_dropout=0.5).train(), torch.tensor([700, 40])
    y, null = torch.tensor([0, 2]), torch.tensor([3, 2])
    dropped = model(clip(), t, y, dropped={"y": torch.tensor([True, False])})
    assert torch.equal(dropped, model(clip(), t, null, dropped={}))
    assert (dropped - model(clip(), t, y, dropped={}))[0].abs().max() > 1e-3
    torch.manual_seed(2)
    drawn = model(clip(), t, y)
    torch.manual_seed(2)
    assert torch.equal(drawn, model(clip(), t, y, dropped={"y": torch.rand(BATCH) < 0.5}))


def test_a_learned_variance_is_the_residual_networks() -> None:
    model, t = small(learn_sigma=True), torch.tensor([700, 40])
    out, plain = model(clip(), t), small()
    assert out.shape == (BATCH, FRAMES, 2 * CHANNELS, SIZE, SIZE)
    assert model.base.config.out_channels == CHANNELS
    weights = frame_weights(WEIGHT, FRAMES)
    losses = diffusion_loss(model, clip(), t, SCHEDULE, KEY, sharing="mixed", base_weight=weights)
    losses["loss"].backward()
    final = model.residual.final_layer.linear.weight.grad.unflatten(0, (-1, 2 * CHANNELS))
    assert final[:, CHANNELS:].norm() > 0
    assert plain(clip(), t).shape == SHAPE


def test_bfloat16_autocast_is_close_to_float32() -> None:
    model, t = small(), torch.tensor([700, 40])
    exact = model(clip(), t)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(clip(), t)
    assert (ours.float() - exact).norm() < 0.02 * exact.norm()


def test_sampling_starts_from_mixed_noise() -> None:
    weights = frame_weights(WEIGHT, FRAMES)
    drawn = sample(small(), SHAPE, SCHEDULE, KEY, num_steps=2, sharing="mixed", base_weight=weights)
    start = philox_normal(SHAPE, KEY, sharing="mixed", base_weight=weights)
    assert torch.equal(drawn, sample(small(), start, SCHEDULE, KEY, num_steps=2))
    other = sample(small(), SHAPE, SCHEDULE, KEY, num_steps=2)
    assert (drawn - other).abs().max() > 0.1


def test_checkpointing_reaches_both_networks_and_gives_the_same_bits() -> None:
    model, t = small(), torch.tensor([700, 40])
    model(clip(), t).sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.activation_checkpointing = True
    assert model.base.activation_checkpointing
    model(clip(), t).sum().backward()
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert len(list(model.blocks)) == 4


def test_the_base_takes_the_weights_of_an_image_model() -> None:
    image = Latte(LatteConfig(**{**SMALL, "num_frames": 1}))
    fill(image.named_parameters(), 3)
    model = small()
    model.base.load_state_dict(image.state_dict())
    t = torch.tensor([700, 40])
    assert torch.equal(model(clip(), t)[:, [MIDDLE]], image.eval()(clip()[:, [MIDDLE]], t))
    assert not any("sigma" in name for name in model.state_dict())


RUN = {
    "network": "videofusion",
    "diffusion__noise": "mixed",
    "diffusion__noise_base_weight": WEIGHT,
    "model__learn_sigma": False,
}


def test_a_training_step_is_the_loss_on_noise_whose_base_is_the_middle_frames(tmp_path: Path) -> None:
    settings, world = config(tmp_path, **RUN), World(0, 1, torch.device("cpu"))
    run = step.make_run(settings, world)
    fill(run.model.named_parameters(), 0)
    before = copy.deepcopy(run.model)
    seen: list[Tensor] = []
    run.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    x0, conditions = next(Batches(settings, world).after(0))
    loss = step.train_step(run, x0, conditions)[0]
    x, t = seen
    weights = torch.tensor([WEIGHT, WEIGHT, 1.0, WEIGHT])
    noise = philox_normal(x.shape, KeyStream(settings.seed).next(), sharing="mixed", base_weight=weights)
    alpha, sigma = (c.view(-1, 1, 1, 1, 1) for c in run.schedule.coefficients(t))
    torch.testing.assert_close(x, alpha * x0 + sigma * noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(((before(x, t, dropped={}) - noise) ** 2).mean(), loss, rtol=1e-5, atol=0)


def test_a_run_is_trained_and_sampled_by_the_commands(tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    assert train.main(options(run_dir, **RUN, steps=2, log__checkpoint_every=2)) == 0
    network, settings = load_network(run_dir)
    assert isinstance(network, VideoFusion)
    saved = newest(run_dir)["ema"]
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    assert torch.equal(noise_options(settings, torch.device("cpu"))["base_weight"], frame_weights(WEIGHT, 4))
    argv = ["--checkpoint", str(run_dir), "--out", str(out), "--steps", "2", "--device", "cpu"]
    assert sample_command.main(argv) == 0
    assert (out / "sheet.png").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"diffusion__prediction": "v"}, "--network videofusion wants --diffusion.prediction epsilon, got v"),
        (
            {"diffusion__noise": "progressive"},
            "--network videofusion wants --diffusion.noise mixed, got progressive",
        ),
    ],
)
def test_a_process_that_it_does_not_decompose_is_refused(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        config(tmp_path, **{**RUN, **overrides})


@pytest.mark.parametrize(
    ("sizes", "weight", "message"),
    [
        ({"patch_embedding": "tubelet", "num_frames": 4}, 0.5, "wants patch_embedding uniform"),
        ({"image_condition": "concat"}, 0.5, "image_condition None"),
        ({"num_frames": 1}, 0.5, "num_frames of at least 2"),
        ({}, 1.0, r"base_weight must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(sizes: dict[str, Any], weight: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoFusion(LatteConfig(**{**SMALL, **sizes}), SCHEDULE, weight)

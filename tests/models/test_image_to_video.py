"""Image-to-video: given frames in the network, in training and in sampling, and FrameInit's noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import sample as sample_command
from models import train
from models.checkpoints import load_weights
from models.command_line import UsageError
from models.image_to_video import GIVEN_MIX, bind, draw_given, frame_init
from models.latte import Latte, LatteConfig
from models.sampling.draw import draw_clips
from models.training import step
from models.training.distributed import World
from tests.models.public_cases import fill
from tests.models.runs import config, options
from vidkern.diffusion import diffusion_loss, image_to_video, interpolation, make_schedule, sample
from vidkern.ops import philox_normal

BATCH, FRAMES, CHANNELS, SIZE = 2, 4, 3, 8
SMALL = {
    "input_size": SIZE,
    "in_channels": CHANNELS,
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 2,
    "num_frames": FRAMES,
    "learn_sigma": False,
}
GIVEN = torch.tensor([[True, False, False, True], [False, False, False, False]])
T = torch.tensor([700, 300])


def small(**sizes: Any) -> Latte:
    model = Latte(LatteConfig(**{**SMALL, **sizes}))
    fill(model.named_parameters(), 0)
    return model.eval()


def clips(seed: int, count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, FRAMES, CHANNELS, SIZE, SIZE, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("patch_embedding", ["uniform", "tubelet"])
def test_replace_is_the_plain_network_on_clean_given_frames_at_timestep_0(patch_embedding: str) -> None:
    x, known = clips(0, 2)
    got = small(image_condition="replace", patch_embedding=patch_embedding)(x, T, known=known, given=GIVEN)
    mixed, t = x.clone(), T[:, None].repeat(1, FRAMES)
    mixed[0, [0, 3]], t[0, [0, 3]] = known[0, [0, 3]], 0
    assert torch.equal(got, small(patch_embedding=patch_embedding)(mixed, t))


def test_concat_embeds_the_clip_the_given_frames_and_their_mask() -> None:
    model = small(image_condition="concat")
    x, known = clips(1, 2)
    seen: list[Tensor] = []
    model.x_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    known[1] = float("nan")  # nothing is read where no frame is given
    model(x, T, known=known, given=GIVEN)
    for b in range(BATCH):
        for f in range(FRAMES):
            given = bool(GIVEN[b, f])
            frame = known[b, f] if given else x[b, f]
            zeros, ones = torch.zeros(CHANNELS, SIZE, SIZE), torch.ones(1, SIZE, SIZE)
            wanted = torch.cat([frame, frame if given else zeros, ones if given else 0 * ones])
            assert torch.equal(seen[0][b, f], wanted)


def test_concat_begins_as_the_network_whose_weights_it_loads() -> None:
    plain, model = small(), small(image_condition="concat")
    report = load_weights(model, plain.state_dict())
    assert report.widened == ("x_embedder.proj.weight",)
    assert "widened: x_embedder.proj.weight" in str(report)
    x, known = clips(2, 2)
    none = torch.zeros(BATCH, FRAMES, dtype=torch.bool)
    torch.testing.assert_close(model(x, T, known=known, given=none), plain(x, T), rtol=1e-5, atol=1e-6)
    mixed = torch.where(GIVEN[:, :, None, None, None], known, x)
    wanted = plain(mixed, T[:, None].repeat(1, FRAMES).masked_fill(GIVEN, 0))
    torch.testing.assert_close(model(x, T, known=known, given=GIVEN), wanted, rtol=1e-5, atol=1e-6)
    assert load_weights(small(image_condition="concat"), model.state_dict()).widened == ()


def test_given_frames_move_the_others_in_either_way() -> None:
    x, known, other = clips(3, 3)
    for way in ("replace", "concat"):
        model = small(image_condition=way)
        change = model(x, T, known=known, given=GIVEN) - model(x, T, known=other, given=GIVEN)
        assert change[0, 1].abs().max() > 1e-3
        assert change[1].abs().max() == 0


def test_the_loss_of_a_training_step_is_that_of_the_frames_to_be_drawn() -> None:
    model, schedule = small(image_condition="concat"), make_schedule("linear")
    x0 = clips(4)[0]
    key = torch.tensor([5, 0])
    losses = diffusion_loss(
        lambda x, t: model(x, t, known=x0, given=GIVEN), x0, T, schedule, key, learned_range=False, hold=GIVEN
    )
    assert torch.allclose(losses["loss"], losses["per_frame"][~GIVEN].mean(), rtol=1e-6)
    losses["loss"].backward()
    changed = x0.clone()
    changed[1] += 1  # of another sample, which is given nothing
    assert model.x_embedder.proj.weight.grad[:, CHANNELS:].norm() > 0
    again = diffusion_loss(
        lambda x, t: model(x, t, known=changed, given=GIVEN), x0, T, schedule, key, learned_range=False, hold=GIVEN
    )
    assert torch.equal(again["per_frame"], losses["per_frame"])


@pytest.mark.parametrize("way", ["replace", "concat"])
@pytest.mark.parametrize("task", [image_to_video, interpolation])
def test_sampling_holds_given_frames_and_follows_them(way: str, task: Any) -> None:
    model, schedule = small(image_condition=way), make_schedule("linear")
    given = task(torch.zeros(1, dtype=torch.int64), FRAMES)[1][0]
    settings: dict[str, Any] = {"num_steps": 3, "variance": "fixed_small", "task": task}
    shape, key = (BATCH, FRAMES, CHANNELS, SIZE, SIZE), torch.tensor([1, 0])
    one, two = (sample(bind(model, given), shape, schedule, key, known=known, **settings) for known in clips(6, 2))
    assert torch.equal(one[:, given], clips(6, 2)[0][:, given])
    assert (one - two)[:, ~given].abs().max() > 1e-3
    with_batch = sample(
        lambda x, t: model(x, t, known=clips(6)[0], given=given.expand(BATCH, -1)),
        shape,
        schedule,
        key,
        known=clips(6)[0],
        **settings,
    )
    torch.testing.assert_close(one, with_batch, rtol=1e-4, atol=1e-4)


def test_bound_networks_take_guidance() -> None:
    model = small(image_condition="concat", num_classes=3)
    given = torch.tensor([True, False, False, False])
    clip = sample(
        bind(model, given),
        (BATCH, FRAMES, CHANNELS, SIZE, SIZE),
        make_schedule("linear"),
        torch.tensor([1, 0]),
        num_steps=2,
        task=image_to_video,
        known=clips(7)[0],
        y=torch.tensor([0, 2]),
        y_null=3,
        cfg_scale=2.0,
        variance="fixed_small",
    )
    assert torch.isfinite(clip).all()
    assert torch.equal(clip[:, 0], clips(7)[0][:, 0])


def test_given_frames_are_drawn_as_the_mix_says() -> None:
    count, frames = 20000, 4
    given = draw_given(count, frames, generator=torch.Generator().manual_seed(0))
    code = (given * 2 ** torch.arange(frames)).sum(1)
    share = torch.bincount(code, minlength=2**frames).double() / count
    wanted = torch.zeros(2**frames, dtype=torch.float64)
    wanted[0] += GIVEN_MIX["none"]
    wanted[1] += GIVEN_MIX["first"]
    wanted[9] += GIVEN_MIX["ends"]
    for length in (1, 2, 3):
        wanted[2**length - 1] += GIVEN_MIX["prefix"] / 3
    wanted[:15] += GIVEN_MIX["random"] / 16
    wanted[1] += GIVEN_MIX["random"] / 16  # all frames become the first alone
    # 5 standard deviations of a binomial
    assert ((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt()).all()


def test_two_frames_never_give_the_whole_clip() -> None:
    given = draw_given(500, 2, generator=torch.Generator().manual_seed(0))
    assert not given.all(1).any()
    assert given[:, 0].any()


def test_a_mix_of_one_kind_is_that_kind() -> None:
    given = draw_given(50, 5, mix={"ends": 1.0}, generator=torch.Generator().manual_seed(0))
    assert torch.equal(given, torch.tensor([True, False, False, False, True]).expand(50, 5))


def plain_low_pass(clip: Tensor, cutoff_space: float, cutoff_time: float) -> Tensor:
    """Multiply each frequency by its Gaussian through matrices of the discrete Fourier transform, in float64."""
    values = clip.to(torch.complex128)
    for axis in (1, 3, 4):
        n = clip.shape[axis]
        index = torch.arange(n, dtype=torch.float64)
        dft = torch.exp(-2j * torch.pi * index[:, None] * index / n)
        frequency = torch.where(index <= n / 2, index, index - n) / (n / 2)
        gain = torch.exp(-((frequency / (cutoff_time if axis == 1 else cutoff_space)) ** 2) / 2)
        matrix = dft.conj() @ (gain[:, None] * dft) / n
        values = torch.tensordot(values, matrix, dims=([axis], [1])).movedim(-1, axis)
    return values.real


def test_frame_init_mixes_low_frequencies_of_the_noised_still_clip_into_the_noise() -> None:
    schedule = make_schedule("linear")
    noise, first = clips(8)[0], clips(9)[0][:, 0]
    got = frame_init(first, noise, schedule, level=0.85, cutoff_space=0.4, cutoff_time=0.3)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[850]
    still = alpha_bar.sqrt() * first[:, None].double() + (1 - alpha_bar).sqrt() * noise.double()
    wanted = plain_low_pass(still, 0.4, 0.3) + noise.double() - plain_low_pass(noise.double(), 0.4, 0.3)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    assert (got - noise).abs().max() > 0.01


def test_frame_init_leaves_the_noise_at_the_noisiest_level_and_is_the_still_clip_without_a_filter() -> None:
    schedule, noise, first = make_schedule("sde"), clips(8)[0], clips(9)[0][:, 0]
    alpha, sigma = float(schedule.alpha[500]), float(schedule.sigma[500])
    unfiltered = frame_init(first, noise, schedule, level=0.5, cutoff_space=1e4, cutoff_time=1e4)
    torch.testing.assert_close(unfiltered, alpha * first[:, None] + sigma * noise, rtol=0, atol=1e-5)
    pure = frame_init(first, noise, schedule, level=1.0)
    torch.testing.assert_close(pure, noise, rtol=0, atol=0.05)


def test_drawn_clips_start_from_frame_inits_noise_whatever_the_batches() -> None:
    model, schedule, known = small(image_condition="concat"), make_schedule("linear"), clips(10)[0][0]
    settings: dict[str, Any] = {"num_steps": 2, "task": image_to_video, "variance": "fixed_small"}
    got = draw_clips(model, schedule, 3, batch_size=2, seed=4, known=known, frame_init=0.6, **settings)
    noise = philox_normal((3, FRAMES, CHANNELS, SIZE, SIZE), torch.tensor([4, 0]))
    start = frame_init(known[:1].expand(3, -1, -1, -1), noise, schedule, level=0.6)
    given = torch.tensor([True, False, False, False])
    whole = known.expand(3, -1, -1, -1, -1)
    wanted = sample(bind(model, given), start, schedule, torch.tensor([4, 0]), known=whole, **settings)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[:, 0], whole[:, 0])
    plain = draw_clips(model, schedule, 3, batch_size=2, seed=4, known=known, **settings)
    assert (plain - got)[:, 1:].abs().max() > 0.01


def test_a_long_video_goes_on_from_the_frames_before() -> None:
    model, schedule = small(image_condition="concat"), make_schedule("linear")
    seen: list[tuple[Tensor, Tensor]] = []
    model.x_embedder.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0][0, :, -1, 0, 0].clone(), inputs[0][0, :, :CHANNELS].clone()))
    )
    video = draw_clips(
        model, schedule, 1, batch_size=1, seed=4, num_steps=2, chunks=2, overlap=1, variance="fixed_small"
    )
    masks = torch.stack([mask for mask, _ in seen])
    assert torch.equal(masks, torch.tensor([[0.0] * 4] * 2 + [[1.0, 0, 0, 0]] * 2))
    assert torch.equal(seen[-1][1][0], video[0, FRAMES - 1])
    assert video.shape == (1, 2 * FRAMES - 1, CHANNELS, SIZE, SIZE)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = {"model__image_condition": "concat", "model__in_channels": 3, "steps": 2, "log__checkpoint_every": 2}
    assert train.main(options(folder, **settings)) == 0
    return folder


def test_the_commands_train_and_sample_with_a_given_image(run_dir: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(tmp_path / "a.png")
    argv = ["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), "--image", str(tmp_path / "a.png")]
    argv += ["--steps", "2", "--num_clips", "1", "--device", "cpu", "--task", "image-to-video"]
    for extra in ([], ["--frame_init", "0.85"]):
        assert sample_command.main(argv + extra) == 0
        first = np.asarray(Image.open(tmp_path / "out" / "clip_000.gif").convert("RGB"))
        assert np.abs(first.astype(int) - 200).max() <= 2


def test_a_run_begins_with_the_weights_of_a_network_without_given_frames(tmp_path: Path) -> None:
    world, image = World(0, 1, torch.device("cpu")), {"model__image_condition": "concat"}
    plain = step.make_run(config(tmp_path), world).model
    fill(plain.named_parameters(), 3)
    torch.save({"ema": plain.state_dict()}, tmp_path / "plain.pt")
    run = step.make_run(config(tmp_path, **image, init=tmp_path / "plain.pt"), world)
    x, t = torch.randn(2, 4, 1, 16, 16), torch.tensor([700, 40])
    given = torch.zeros(2, 4, dtype=torch.bool)
    for model in (run.model.eval(), run.ema):
        torch.testing.assert_close(model(x, t, known=x, given=given), plain.eval()(x, t), rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="no checkpoint at nowhere"):
        step.make_run(config(tmp_path, init="nowhere"), world)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--frame_init", "0.85"], "--frame_init wants a task that is given the first frame, got --task standard"),
        (["--frame_init", "1.5", "--task", "image-to-video"], "--frame_init wants"),
    ],
)
def test_frame_init_without_a_first_frame_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        sample_command.main(["--checkpoint", str(run_dir), "--device", "cpu", *argv])
    assert message in capsys.readouterr().err


BAD_CALLS = {
    "no known": (lambda m, x: m(x, T, given=GIVEN), r"known must be of shape \(2, 4, 3, 8, 8\), got None"),
    "given": (
        lambda m, x: m(x, T, known=x, given=GIVEN[:, :3]),
        r"given must be of shape \(2, 4\), got \(2, 3\)",
    ),
    "dtype": (lambda m, x: m(x, T, known=x, given=GIVEN.float()), "given must be torch.bool, got torch.float32"),
    "images": (lambda m, x: m(x, T, known=x, given=GIVEN, num_images=1), "num_images must be 0 with image_condition"),
    "frames": (lambda m, x: draw_given(2, 1), "frames must be at least 2, got 1"),
    "mix": (lambda m, x: draw_given(2, 4, mix={"first": 0.5}), "that sum to 1"),
    "kind": (lambda m, x: draw_given(2, 4, mix={"last": 1.0}), "mix must give probabilities of first, prefix"),
    "level": (
        lambda m, x: frame_init(x[:, 0], x, make_schedule("linear"), level=1.5),
        "level must be above 0 and at most 1, got 1.5",
    ),
    "first": (lambda m, x: frame_init(x, x, make_schedule("linear")), r"first must be of shape \(2, 3, 8, 8\)"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_gets_one_clear_error(name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(small(image_condition="concat"), clips(0)[0])


def test_a_network_without_the_option_refuses_given_frames() -> None:
    x = clips(0)[0]
    with pytest.raises(ValueError, match="known must be None"):
        small()(x, T, known=x, given=GIVEN)
    with pytest.raises(ValueError, match="image_condition must be None, concat or replace, got 'crop'"):
        LatteConfig(image_condition="crop")

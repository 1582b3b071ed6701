"""Text-to-video in two stages and motion transfer: what each stage is given, what comes out, and mistakes."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from PIL import Image

from models import sample
from models.command_line import from_dict, to_dict
from models.config import TrainConfig
from models.data.write import write_mp4
from models.motion import from_network
from models.networks import build_network
from models.sampling import motion_tasks, text
from models.sampling.given import read_images
from models.sampling.motion_tasks import Rendered
from models.sampling.network import load_network
from models.sampling.options import SampleConfig
from models.sampling.text_to_video import Stage, at_rest, draw_first_frames, noise_of, render, resized
from models.training import checkpointing
from vidkern import diffusion

FRAMES, SIZE, WIDTH = 4, 16, 6
S2DM = {
    "input_size": SIZE,
    "in_channels": 3,
    "num_frames": FRAMES,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "num_heads": 2,
    "cross_attention_dim": 16,
    "norm_groups": 4,
    "text_width": WIDTH,
    "token_grid": 4,
    "encoder_channels": 8,
}
VDM = {
    "input_size": 8,
    "num_frames": FRAMES + 1,
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "num_heads": 1,
    "spatial_from": 1,
    "text_width": WIDTH,
    "reference_channels": 3,
}
LATTE = {
    "input_size": SIZE,
    "patch_size": 8,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 1,
    "num_frames": FRAMES,
    "text_size": 5 * WIDTH,
}
DATA = {"kind": "digits", "text": "stub"}
DIFFUSION = {"schedule": "cosine", "prediction": "v", "noise": "shared"}
QUICK = ["--steps", "4", "--num_clips", "2", "--device", "cpu"]


class Stub:
    """Embeddings that a text's letters make."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        codes = [[ord(letter) for letter in text.ljust(5)[:5]] for text in texts]
        return torch.sin(torch.tensor(codes)[:, :, None] * torch.arange(1, WIDTH + 1))


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "load_text_encoder", lambda spec: Stub())


def save_run(folder: Path, seed: int, **parts: Any) -> Path:
    """A run whose network has weights that make every condition count."""
    config = from_dict(TrainConfig, {"data": DATA, "diffusion": DIFFUSION, **parts})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(config)
        state = {name: value + 0.05 * torch.randn_like(value) for name, value in network.state_dict().items()}
    checkpointing.save(folder / "checkpoints", 1, {"step": 1, "config": to_dict(config), "model": state}, keep=1)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """s2dm, vdm and latte, and s2dm_plain and vdm_plain that take no text, s2dm_pose ...; a.png and a.mp4."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "s2dm", 1, network="s2dm", s2dm=S2DM)
    save_run(folder / "vdm", 2, network="vdm", vdm=VDM)
    latte = {"data": {**DATA, "kind": "videos", "path": "videos"}, "diffusion": {**DIFFUSION, "noise": "independent"}}
    save_run(folder / "latte", 3, model=LATTE, **latte)
    silent = {"data": {"kind": "digits"}}
    save_run(folder / "s2dm_plain", 4, network="s2dm", s2dm={**S2DM, "text_width": None, "reference": True}, **silent)
    save_run(folder / "vdm_plain", 5, network="vdm", vdm={**VDM, "text_width": None}, **silent)
    save_run(folder / "vdm_grey", 6, network="vdm", vdm={**VDM, "reference_channels": 1})
    save_run(folder / "s2dm_pose", 7, network="s2dm", s2dm={**S2DM, "pose_channels": 3})
    save_run(folder / "s2dm_pose_2", 8, network="s2dm", s2dm={**S2DM, "pose_channels": 2})
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(pixels.numpy()).save(folder / "a.png")
    write_mp4(folder / "a.mp4", moving(8))
    return folder


def moving(frames: int) -> torch.Tensor:
    """A smooth random picture (F, 3, 64, 64) that goes 4 pixels to the right a frame."""
    noise = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    picture = functional.avg_pool2d(functional.avg_pool2d(noise, 9, 1, 4), 9, 1, 4)[0]
    picture = picture / picture.abs().max()
    return torch.stack([picture[..., 64 - 4 * i : 128 - 4 * i] for i in range(frames)])


@pytest.fixture
def run(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rendered]:
    """Run the command in the folder of the runs, and return what it drew."""
    monkeypatch.chdir(runs)
    draw = motion_tasks.draw_with_motion

    def command(*argv: str) -> Rendered:
        drawn = []
        monkeypatch.setattr(motion_tasks, "draw_with_motion", lambda *args: drawn.append(draw(*args)) or drawn[0])
        assert sample.main([*QUICK, "--out", str(tmp_path / "out"), *argv]) == 0
        return drawn[0]

    return command


VIDEO = ("--task", "text-to-video", "--checkpoint", "s2dm", "--motion_checkpoint", "vdm")
TRANSFER = ("--task", "motion-transfer", "--checkpoint", "s2dm", "--clip", "a.mp4")


def test_text_becomes_motion_and_motion_becomes_a_clip(run: Callable[..., Rendered], tmp_path: Path) -> None:
    drawn = run(*VIDEO, "--text", "up")
    assert drawn.clips.shape == (2, FRAMES + 1, 3, SIZE, SIZE)
    assert drawn.motion.shape == (2, FRAMES + 1, 3, SIZE, SIZE)
    torch.testing.assert_close(drawn.clips[:, 0], drawn.first, rtol=0, atol=1e-4)
    assert torch.equal(drawn.motion[:, :1], at_rest(2, 1, (SIZE, SIZE)))
    assert not torch.allclose(drawn.motion[0], drawn.motion[1], atol=0.05)
    assert not torch.allclose(drawn.clips[0], drawn.clips[1], atol=0.05)
    assert not torch.allclose(drawn.clips[:, 0], drawn.clips[:, 1], atol=1e-3)
    names = {"clip_000.gif", "clip_000.mp4", "clip_001.gif", "clip_001.mp4", "sheet.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names

    again = run(*VIDEO, "--text", "up", "--batch_size", "1")
    torch.testing.assert_close(again.clips, drawn.clips, rtol=0, atol=1e-3)
    other = run(*VIDEO, "--text", "down")
    assert not torch.allclose(other.motion, drawn.motion, atol=0.01)
    assert not torch.allclose(other.first, drawn.first, atol=0.01)


def test_each_stage_has_its_own_guidance(run: Callable[..., Rendered]) -> None:
    plain = run(*VIDEO, "--text", "up")
    still = run(*VIDEO, "--text", "up", "--cfg_text", "1", "--cfg_motion", "1", "--motion_cfg_reference", "1")
    torch.testing.assert_close(still.clips, plain.clips, rtol=0, atol=1e-3)
    motion = run(*VIDEO, "--text", "up", "--motion_cfg_text", "4")
    assert torch.equal(motion.first, plain.first)
    assert not torch.allclose(motion.motion, plain.motion, atol=0.01)
    clips = run(*VIDEO, "--text", "up", "--cfg_motion", "4")
    assert not torch.allclose(clips.clips[:, 1:], plain.clips[:, 1:], atol=0.01)
    fewer = run(*VIDEO, "--text", "up", "--motion_steps", "2")
    assert torch.equal(fewer.first, plain.first)
    assert not torch.allclose(fewer.motion, plain.motion, atol=0.01)


def test_a_given_first_frame_stays_and_is_what_moves(run: Callable[..., Rendered], runs: Path) -> None:
    image = read_images([str(runs / "a.png")], (SIZE, SIZE), 3)[0]
    drawn = run(*VIDEO, "--text", "up", "--image", "a.png")
    for i in range(2):
        assert torch.equal(drawn.first[i], image)
        assert torch.equal(drawn.clips[i, 0], image)
    assert not torch.allclose(drawn.motion[0], drawn.motion[1], atol=0.05)
    assert not torch.allclose(drawn.motion, run(*VIDEO, "--text", "up").motion, atol=0.05)


def stage(folder: Path, steps: int, scales: dict[str, float] | None = None) -> Stage:
    network, config = load_network(folder)
    schedule = diffusion.make_schedule(config.diffusion.schedule, config.diffusion.num_steps)
    options = {"batch_size": 2, "seed": 5, "num_steps": steps}
    return Stage(network, config, schedule, scales or {}, options)


def test_the_noise_of_a_frame_renders_it_at_rest(runs: Path) -> None:
    renderer = stage(runs / "s2dm", 30, {"text": 1.5})
    first = read_images([str(runs / "a.png")], (SIZE, SIZE), 3)
    told = {"text": Stub().encode(["up"])}
    noise = noise_of(renderer, first, told, (SIZE, SIZE))
    clip = render(renderer, at_rest(1, 3, (SIZE, SIZE)), told, noise)
    error = (clip - first).abs().mean()
    assert error < 0.04
    assert torch.equal(clip[:, 0], clip[:, 2])
    drawn = render(renderer, at_rest(1, 1, (SIZE, SIZE)), told)
    assert (drawn - first).abs().mean() > 10 * error


def test_first_frames_are_drawn_without_the_condition_that_they_are(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = stage(runs / "s2dm_plain", 4)
    first = draw_first_frames(renderer, {}, 2, (SIZE, SIZE))
    model = functools.partial(
        renderer.network,
        reference=torch.randn(2, 3, SIZE, SIZE),
        motion=at_rest(2, 1, (SIZE, SIZE)),
        dropped={"reference": torch.ones(2, dtype=torch.bool)},
    )
    key = torch.tensor([5, 0])
    wanted = diffusion.sample(
        model, (2, 1, 3, SIZE, SIZE), renderer.schedule, key, num_steps=4, prediction="v", sharing="shared"
    )
    torch.testing.assert_close(first, wanted[:, 0], rtol=0, atol=1e-4)
    told = diffusion.sample(
        functools.partial(model, dropped={}), (2, 1, 3, SIZE, SIZE), renderer.schedule, key, num_steps=4, prediction="v"
    )
    assert not torch.allclose(first, told[:, 0], atol=0.01)


def test_networks_without_text_are_told_by_the_first_frame(run: Callable[..., Rendered]) -> None:
    plain = ("--task", "text-to-video", "--checkpoint", "s2dm_plain", "--motion_checkpoint", "vdm_plain")
    drawn, given = run(*plain), run(*plain, "--image", "a.png")
    assert drawn.clips.shape == (2, FRAMES + 1, 3, SIZE, SIZE)
    assert not torch.allclose(drawn.motion, given.motion, atol=0.01)


def test_the_motion_of_a_clip_is_transferred(run: Callable[..., Rendered]) -> None:
    drawn = run(*TRANSFER, "--text", "up")
    assert drawn.clips.shape == (2, FRAMES, 3, SIZE, SIZE)
    assert drawn.driving is not None
    assert torch.equal(drawn.motion[0], drawn.motion[1])
    flow, seen = from_network(drawn.motion[0])
    for i in range(1, FRAMES):  # one pixel of the 16 to the right each frame: back to the first frame is to the left
        inside = flow[i, :, 3:-3, 3 + i : -3 - i]
        assert (inside[0] + i).abs().mean() < 0.35
        assert inside[1].abs().mean() < 0.35
    assert seen[:, :, 4:-4, 7:-7].mean() > 0.8
    torch.testing.assert_close(drawn.clips[:, 0], drawn.first, rtol=0, atol=1e-4)
    held = run(*TRANSFER, "--text", "up", "--image", "a.png")
    assert torch.equal(held.motion, drawn.motion)
    assert torch.equal(held.clips[:, 0], held.first)


def test_resized_motion_is_the_same_motion() -> None:
    ramp = torch.linspace(-1, 1, 8).expand(1, 2, 3, 8, 8)
    large = resized(ramp, (16, 16))
    assert large.shape == (1, 2, 3, 16, 16)
    middle = torch.linspace(-1 - 1 / 14, 1 + 1 / 14, 16)[1:-1]  # the ramp at the centres of half-size pixels
    torch.testing.assert_close(large[..., 1:-1], middle.expand(1, 2, 3, 16, 14), rtol=0, atol=0.02)
    torch.testing.assert_close(
        from_network(large)[0].abs().mean(), 2 * from_network(ramp)[0].abs().mean(), rtol=0.1, atol=0
    )
    assert resized(ramp, (8, 8)) is ramp


def test_text_guides_a_latte(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(sample, "write_results", lambda options, clips, *_: drawn.append(torch.stack(clips)))
    for argv in (
        ["--text", "up"],
        ["--text", "down"],
        ["--text", "up", "--cfg_text", "3"],
        ["--text", "up", "--seed", "0"],
    ):
        assert sample.main(["--checkpoint", str(runs / "latte"), "--out", str(tmp_path), *QUICK, *argv]) == 0
    up, down, guided, again = drawn
    assert torch.equal(up, again)
    assert not torch.allclose(up, down, atol=1e-3)
    assert not torch.allclose(up, guided, atol=1e-3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*VIDEO], 'this network (s2dm) takes a text: give --text, "" for none in particular'),
        ([*VIDEO[:4], "--text", "up"], "--task text-to-video wants --motion_checkpoint with a VDM"),
        ([*VIDEO[:4], "--text", "up", "--motion_checkpoint", "latte"], "--motion_checkpoint wants a VDM, got latte"),
        ([*VIDEO[:4], "--text", "up", "--motion_checkpoint", "no"], "no checkpoint at no"),
        (
            [*VIDEO, "--checkpoint", "latte", "--text", "up"],
            "--task text-to-video wants a --checkpoint of S2DM with motion",
        ),
        ([*VIDEO, "--checkpoint", "s2dm_pose", "--text", "up"], "--task text-to-video: s2dm_pose wants a pose"),
        (
            [*VIDEO[:4], "--text", "up", "--motion_checkpoint", "vdm_grey"],
            "--motion_checkpoint wants first frames of 1 channels",
        ),
        ([*VIDEO, "--text", "up", "--clip", "a.mp4"], "--task text-to-video wants no --clip, got 1"),
        ([*VIDEO, "--text", "up", "--class", "1"], "--task text-to-video takes no --class"),
        ([*VIDEO, "--text", "up", "--frame_init", "0.8"], "--task text-to-video takes no --frame_init"),
        ([*VIDEO, "--text", "up", "--image", "no.png"], "cannot read the image no.png"),
        (
            [*VIDEO, "--text", "up", "--image", "a.png", "--eta", "1"],
            "--task text-to-video --image inverts DDIM without",
        ),
        ([*VIDEO, "--text", "up", "--cfg_image", "2"], "--cfg_image: the network takes no image"),
        ([*VIDEO, "--text", "up", "--motion_steps", "0"], "--motion_steps wants from 1 to 1000, got 0"),
        ([*VIDEO, "--text", "up", "--steps", "0"], "--steps wants from 1 to 1000, got 0"),
        ([*TRANSFER[:4], "--text", "up"], "--task motion-transfer wants --clip with 1 video, got 0"),
        (
            [*TRANSFER, "--text", "up", "--motion_checkpoint", "vdm"],
            "--motion_checkpoint is for --task text-to-video, got --task motion-transfer",
        ),
        ([*TRANSFER, "--text", "up", "--pose", "a.mp4"], "--task motion-transfer: s2dm takes no --pose"),
        ([*TRANSFER, "--text", "up", "--cfg_pose", "2"], "--cfg_pose: the network takes no pose"),
        (
            [*TRANSFER, "--text", "up", "--checkpoint", "s2dm_pose"],
            "--task motion-transfer: s2dm_pose wants --pose with 1 video",
        ),
        (
            [*TRANSFER, "--text", "up", "--checkpoint", "s2dm_pose_2", "--pose", "a.mp4"],
            "--task motion-transfer: --pose has 3 channels, s2dm_pose_2 wants 2",
        ),
        ([*TRANSFER, "--text", "up", "--checkpoint", "s2dm_pose", "--pose", "no.mp4"], "no.mp4: cannot be read"),
        ([*VIDEO, "--text", "up", "--pose", "a.mp4"], "--pose is for --task motion-transfer, got --task text-to-video"),
        ([*TRANSFER, "--text", "up", "--extractor", "raft"], "--extractor raft wants --raft"),
        ([*VIDEO, "--text", "up", "--extractor", "raft"], "--extractor is for --task motion-transfer, got --task text"),
        ([*VIDEO, "--text", "up", "--cfg_text", "nan"], "--cfg_text wants a finite number, got nan"),
        ([*VIDEO, "--text", "up", "--motion_cfg_text", "inf"], "--motion_cfg_text wants a finite number, got inf"),
        ([*VIDEO, "--text", "up\udc00"], "--text is not UTF-8: 'up\\udc00'"),
        ([*TRANSFER, "--text", "up", "--clip", "a.png"], "a.png: "),
        (["--checkpoint", "s2dm_plain", *TRANSFER[:2], *TRANSFER[4:], "--text", "up"], "--text does not go with s2dm"),
        (["--checkpoint", "s2dm"], "--task standard does not go with s2dm, whose use is --task text-to-video or"),
        (["--checkpoint", "vdm"], "--task standard does not go with vdm, whose use is --motion_checkpoint"),
        (["--checkpoint", "latte"], "this network (latte) takes a text: give --text"),
        (["--checkpoint", "latte", "--text", "up", "--cfg_motion", "2"], "--cfg_motion: the network takes no motion"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str],
    message: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as stopped:
        sample.main([*QUICK, "--out", str(tmp_path / "out"), *argv])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"models.sample: error: {message}")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_stage_1_does_not_see_the_noise_of_stage_2(runs: Path) -> None:
    options = SampleConfig("", motion_checkpoint=str(runs / "vdm"), seed=3)
    seeds = {motion_tasks._artist(options, torch.device("cpu"), (3, 3)).options["seed"], options.seed}
    assert len(seeds) == 2

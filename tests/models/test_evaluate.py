"""python -m models.evaluate from end to end, with a small network in I3D's place: sets of files, pairs, checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models import evaluate, sample
from models.command_line import from_dict, to_dict
from models.config import TrainConfig
from models.data.frames import to_uint8
from models.data.write import write_gif, write_mp4
from models.evaluation import features, report, sanity
from models.evaluation.clips import CutClips
from models.latte import Latte
from models.networks import build_network
from models.training import checkpointing
from tests.models.clip_files import shown, write_numbered

FRAMES, SIZE = 9, 16
MODEL = {"input_size": SIZE, "patch_size": 8, "in_channels": 3, "hidden_size": 64, "depth": 2, "num_heads": 2}


class Small(nn.Module):
    """In I3D's place: 400 sums of a clip's mean colours and of how these change."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        means = video.double().mean((3, 4)).flatten(1)
        weights = torch.randn(means.shape[1], 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return means @ weights


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(features, "weights_path", lambda path: path)
    monkeypatch.setattr(features, "load_i3d", lambda path: (Small(), "0123456789abcdef" * 4))
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """real/, 6 videos of 20 frames; fake/, 5 clips of 9 frames as models.sample writes them, each also as a GIF."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name, count, frames in (("real", 6, 20), ("fake", 5, FRAMES)):
        (folder / name).mkdir()
        for i in range(count):
            colours = rng.uniform(-0.5, 0.5, (1, 3, 1, 1)) + np.linspace(0, 0.4, frames)[:, None, None, None]
            clip = torch.from_numpy(colours).expand(frames, 3, SIZE, SIZE).float()
            write_mp4(folder / name / f"clip_{i:03d}.mp4", clip)
            if name == "fake":
                write_gif(folder / name / f"clip_{i:03d}.gif", clip)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = from_dict(
        TrainConfig,
        {"model": {**MODEL, "num_frames": FRAMES, "num_classes": 3}, "data": {"kind": "videos", "path": "v"}},
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in Latte(config.model).state_dict().items()
    }
    checkpointing.save(folder / "checkpoints", 1, {"step": 1, "config": to_dict(config), "ema": weights}, keep=1)
    return folder


def run(out: Path, *options: Any) -> dict[str, Any]:
    quick = ["--out", out, "--resamples", 20, "--device", "cpu"]
    assert evaluate.main(list(map(str, [*options, *quick]))) == 0
    return json.loads((out / "results.json").read_text())


def test_sets_of_files(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--real", videos / "real", "--num_frames", FRAMES]
    found = run(tmp_path / "a", *options, "--fake", videos / "fake")
    protocol, metrics = found["protocol"], found["metrics"]
    assert (protocol["clips_real"], protocol["clips_generated"]) == (12, 5)  # two clips a video; no GIF twice
    assert protocol["size"] == [SIZE, SIZE]
    assert protocol["stride"] == FRAMES
    assert protocol["i3d_sha256"] == "0123456789abcdef" * 4
    assert metrics["fvd"]["low"] < metrics["fvd"]["value"] < metrics["fvd"]["high"]
    printed = capsys.readouterr().out
    assert "layer: logits (400, averaged over time, before the softmax)" in printed
    assert "FVD is biased upwards with few clips (12 and 5 here; papers take 2048)" in printed
    assert f"| FVD | {report.number(metrics['fvd']['value'])} [" in printed
    assert (tmp_path / "a/table.md").read_text().strip() in printed

    same = run(tmp_path / "b", *options, "--fake", videos / "real", "--size", SIZE)
    assert same["protocol"]["clips_generated"] == 12
    for metric in ("fvd", "kvd"):
        assert list(same["metrics"][metric].values())[:3] == pytest.approx([0, 0, 0], abs=1e-9)
    assert "both sets hold the same clips" in same["notes"]


def test_clips_are_cut_every_stride_frames(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", 20)
    write_numbered(tmp_path / "b.mp4", 12, first=100)
    write_numbered(tmp_path / "c.mp4", 8, first=200)  # too short
    (tmp_path / "d.mp4").write_text("text")
    clips = CutClips(tmp_path, num_frames=4, frame_interval=3, stride=5, size=(48, 64))
    assert [clips.name(i) for i in range(len(clips))] == ["a.mp4:0", "a.mp4:5", "a.mp4:10", "b.mp4:0"]
    assert [shown(frame.numpy()) for frame in clips[1]] == [5, 8, 11, 14]
    assert [shown(frame.numpy()) for frame in clips[3]] == [100, 103, 106, 109]
    clips.choose(2, seed=0)
    assert len(clips) == 2
    with pytest.raises(ValueError, match=r"no video in .* has the 40 frames of a clip \(4 files\)"):
        CutClips(tmp_path, num_frames=40, frame_interval=1, stride=1, size=None)


def test_pairs_of_files(videos: Path, tmp_path: Path) -> None:
    options = ["--real", videos / "real", "--fake", videos / "fake", "--num_frames", FRAMES, "--stride", 20]
    found = run(tmp_path, *options, "--pairs", "--given", 0, 8, "--metrics", "ssim", "psnr", "--num_clips", 5)
    real = CutClips(videos / "real", num_frames=FRAMES, frame_interval=1, stride=20, size=(SIZE, SIZE))
    fake = CutClips(videos / "fake", num_frames=FRAMES, frame_interval=1, stride=20, size=(SIZE, SIZE))
    errors = torch.stack([((real[i] - fake[i]) * 127.5).double().square().mean((1, 2, 3)) for i in range(5)])
    psnr = 10 * np.log10(255**2 / errors.numpy())
    assert found["metrics"]["psnr"]["value"] == pytest.approx(psnr[:, 1:8].mean(), abs=1e-3)
    assert 0 < found["metrics"]["ssim"]["value"] < 1
    assert found["notes"][0].startswith("given frames, not counted: 0 of 10 equal bit by bit, lowest PSNR ")
    assert "are these the pairs" in found["notes"][1]  # the colours have nothing to do with each other


def test_a_checkpoint_is_drawn_from_once(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    options = ["--real", videos / "real", "--checkpoint", checkpoint, "--steps", 2, "--batch_size", 4]
    found = run(tmp_path, *options, "--num_clips", 6)
    assert found["protocol"]["clips_generated"] == 6
    assert found["protocol"]["frames"] == FRAMES
    files = sorted((tmp_path / "clips").glob("*.npy"))
    assert len({path.read_bytes() for path in files}) == 6
    times = [path.stat().st_mtime_ns for path in files]
    before = np.load(files[5]).astype(int)
    files[5].unlink()
    run(tmp_path, *options, "--num_clips", 6, "--batch_size", 2)
    assert [path.stat().st_mtime_ns for path in files[:4]] == times[:4]  # these were not drawn again
    assert abs(np.load(files[5]) - before).max() <= 1  # the same clip, whatever it is drawn beside
    with pytest.raises(SystemExit):
        run(tmp_path, *options, "--seed", 1)


def test_clips_are_kept_for_the_same_real_ones_only(
    checkpoint: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many other clips of the same videos are other first frames, which the kept clips do not have."""
    options = ["--real", videos / "real", "--checkpoint", checkpoint, "--steps", 2, "--task", "image-to-video"]
    options += ["--metrics", "psnr", "--num_clips", 6]
    run(tmp_path, *options)
    assert run(tmp_path, *options, "--batch_size", 5)["notes"] == ["given frames, not counted: 6 of 6 equal bit by bit"]
    with pytest.raises(SystemExit):
        run(tmp_path, *options, "--stride", 11)
    assert "has clips drawn in another way (source: 6 clips" in capsys.readouterr().err


@pytest.mark.parametrize("noise", [{"noise": "shared"}, {"noise": "mixed", "noise_base_weight": 0.5}])
def test_clips_are_drawn_as_by_sample(
    noise: dict[str, Any], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VideoFusion's middle frame is its base noise alone, in an evaluation too."""
    network = "videofusion" if noise["noise"] == "mixed" else "latte"
    values = {"network": network, "model": {**MODEL, "num_frames": FRAMES, "learn_sigma": False}, "diffusion": noise}
    config = from_dict(TrainConfig, values)
    weights = build_network(config).state_dict()
    path = checkpointing.save(tmp_path, 1, {"step": 1, "config": to_dict(config), "ema": weights}, keep=1)
    run(
        tmp_path / "a",
        "--real",
        videos / "real",
        "--checkpoint",
        path,
        "--steps",
        2,
        "--num_clips",
        2,
        "--metrics",
        "fvd",
    )
    written: list[torch.Tensor] = []
    monkeypatch.setattr(sample, "write_results", lambda _, clips, *rest: written.extend(clips))
    options = ["--checkpoint", path, "--steps", 2, "--num_clips", 2, "--out", tmp_path / "b", "--device", "cpu"]
    assert sample.main(list(map(str, options))) == 0
    for i, clip in enumerate(written):
        assert np.array_equal(np.load(tmp_path / f"a/clips/{i:06d}.npy"), to_uint8(clip).numpy())


def test_a_network_that_diverged_is_told(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    state = checkpointing.load(checkpoint / "checkpoints/step_00000001.pt")
    state["ema"]["final_layer.linear.bias"] = torch.full_like(state["ema"]["final_layer.linear.bias"], torch.nan)
    path = checkpointing.save(tmp_path, 2, state, keep=1)
    with pytest.raises(ValueError, match=r"2 of 2 clips hold NaN or infinity \(0, 1\)"):
        evaluate.draw_sets(
            evaluate.EvaluateConfig(
                str(videos / "real"), checkpoint=str(path), num_clips=2, steps=2, out=str(tmp_path)
            ),
            torch.device("cpu"),
        )
    assert not list(tmp_path.rglob("*.npy"))


def test_given_frames_of_drawn_clips_are_kept_bit_by_bit(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    options = ["--real", videos / "real", "--checkpoint", checkpoint, "--steps", 2, "--task", "interpolation"]
    found = run(tmp_path, *options, "--metrics", "psnr", "ssim", "fvd")
    assert found["notes"][-1] == "given frames, not counted: 24 of 24 equal bit by bit"
    assert found["protocol"]["given"] == [0, FRAMES - 1]
    assert 0 < found["metrics"]["psnr"]["value"] < 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fake", "x", "--checkpoint", "y"], "give --fake with generated videos or --checkpoint"),
        (["--fake", "x", "--metrics", "ssim"], "ssim compare pairs: give --pairs with --fake"),
        (["--fake", "x", "--given", "0"], "--given goes with --pairs or with --task given-frames"),
        (["--fake", "x", "--task", "interpolation"], "--task is for --checkpoint"),
        (["--fake", "x", "--steps", "20"], "--steps is for --checkpoint"),
        (["--fake", "x", "--vae", "y"], "--vae is for --checkpoint"),
        (["--checkpoint", "x", "--cfg_scale", "nan"], "--cfg_scale wants a finite number, got nan"),
        (["--fake", "x", "--num_frames", "8"], "--num_frames wants at least 9, got 8"),
        (["--fake", "x", "--size", "1", "2", "3"], "--size wants a side, or height and width, got 1 2 3"),
        (["--checkpoint", "x", "--size", "32"], "frames and size from the network"),
        (["--checkpoint", "x", "--task", "given-frames"], "--task given-frames wants --given"),
        (["--fake", "nowhere"], "no folder, manifest or file of videos at nowhere"),
        (["--fake", "FAKE", "--pairs", "--num_frames", "9"], "as many clips in both sets, got 12 real and 5 generated"),
        (["--checkpoint", "RUN", "--task", "image-to-video", "--num_clips", "13"], "--real has 12 clips to be rebuilt"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str],
    message: str,
    videos: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"FAKE": str(videos / "fake"), "RUN": str(checkpoint)}
    argv = ["--real", str(videos / "real"), *(places.get(option, option) for option in options), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_distortions_change_what_they_say() -> None:
    rng = np.random.default_rng(0)
    clip = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = {name: distort(clip, rng) for name, distort in sanity.DISTORTIONS.items()}
    assert all(other.shape == clip.shape and not torch.equal(other, clip) for other in changed.values())
    contrast = [changed[f"blurred, sigma {sigma} px"].std() for sigma in (1, 2, 4)]
    assert clip.std() > contrast[0] > contrast[1] > contrast[2] > 0
    for deviation in (0.05, 0.2):
        noise = changed[f"noise added, deviation {deviation}"] - clip
        assert noise.std().item() == pytest.approx(deviation, rel=0.05)
    order = [min(range(6), key=lambda i: (clip[i] - frame).abs().sum().item()) for frame in changed["frames shuffled"]]
    assert sorted(order) == list(range(6)) != order
    assert torch.equal(changed["still copy of frame 1"][5], clip[0])

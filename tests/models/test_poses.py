"""Pictures of poses from end to end: stored beside clips, given to S2DM in training, followed in sampling."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import flow as command
from models import sample, train
from models.command_line import UsageError
from models.data import MotionDataset
from models.data.decode import read_frames
from models.data.frames import to_clip, to_float, to_uint8
from models.data.motion import read_motion_index
from models.data.write import write_mp4
from models.flow import FlowConfig, extract, main
from models.networks import build_network
from models.sampling import motion_tasks, text
from models.sampling.given import read_clip
from models.sampling.motion_tasks import Rendered
from models.training.data import Batches
from models.training.distributed import World
from tests.models.clip_files import bars, shown, write_numbered
from tests.models.runs import config as training_config
from tests.models.runs import newest, options, read_metrics
from tests.models.test_flow import Brightness, contents
from tests.models.test_text_to_video import FRAMES, S2DM, SIZE, Stub, moving, save_run
from tests.models.test_two_processes import S2DM as TINY_S2DM


def write_bars(path: Path, numbers: list[int], height: int = 48, width: int = 64) -> Path:
    """A video without loss or prediction that shows these numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = 1
        for number in numbers:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bars(number, height, width))))
        container.mux(stream.encode())
    return path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowConfig:
    """Two videos of 10 and 13 frames of 64 x 48, whose poses show 100 + i and 200 + i at frame i, twice as large."""
    monkeypatch.setattr(command, "load_extractor", lambda *_: Brightness())
    write_numbered(tmp_path / "videos/a/0.mp4", 10)
    write_numbered(tmp_path / "videos/b/1.mp4", 13, first=40)
    write_bars(tmp_path / "poses/a/0.mkv", list(range(100, 110)), 96, 128)
    write_bars(tmp_path / "poses/b/1.avi", list(range(200, 213)), 96, 128)
    return FlowConfig(
        tmp_path / "videos",
        tmp_path / "out",
        poses=tmp_path / "poses",
        num_frames=4,
        frame_interval=2,
        stride=5,
        size=48,
        workers=0,
        shard_mib=0,
        device="cpu",
    )


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# storing


def test_poses_are_cut_like_their_clips(config: FlowConfig) -> None:
    assert extract(config).poses
    found = contents(config.out)
    assert list(found) == [("a/0.mp4", 0), ("b/1.mp4", 0), ("b/1.mp4", 5)]
    for (name, start), stored in found.items():
        source = config.poses / {"a/0.mp4": "a/0.mkv", "b/1.mp4": "b/1.avi"}[name]
        frames = read_frames(source, range(start, start + 7, 2))
        first = {"a": 100, "b": 200}[name[0]] + start
        assert [shown(frame[..., 0]) for frame in frames] == [first, first + 2, first + 4, first + 6]
        assert torch.equal(stored["pose"], to_uint8(to_clip(frames, (48, 48))))
        assert stored["pose"].shape == stored["video"].shape == (4, 3, 48, 48)
        # the crop leaves six of the eight bars of both, which stand in the same columns
        columns = np.asarray(stored["pose"][0].float().mean((0, 1))).reshape(6, 8)[:, 2:6].mean(1) > 127.5
        assert [int(c) for c in columns] == [first >> bit & 1 for bit in range(6, 0, -1)]


def test_workers_and_going_on_change_no_pose(config: FlowConfig, tmp_path: Path) -> None:
    whole = replace(config, out=tmp_path / "whole", workers=2)
    extract(whole)
    pose = config.poses / "b/1.avi"
    pose.rename(tmp_path / "kept.avi")
    extract(config)
    assert len(read_motion_index(config.out).entries) == 1
    (tmp_path / "kept.avi").rename(pose)
    extract(config)
    went_on, at_once = contents(config.out), contents(whole.out)
    assert went_on.keys() == at_once.keys()
    for key, stored in at_once.items():
        assert torch.equal(went_on[key]["pose"], stored["pose"])


@pytest.mark.parametrize("poses", [True, False])
def test_with_and_without_poses_are_different_folders(config: FlowConfig, poses: bool) -> None:
    extract(config if poses else replace(config, poses=None))
    assert ("pose" in contents(config.out)["a/0.mp4", 0]) == poses
    with pytest.raises(UsageError, match=f"holds motion of another poses: {poses}, now {not poses}; want another"):
        extract(replace(config, poses=None) if poses else config)


def test_folders_from_before_poses_go_on(config: FlowConfig) -> None:
    config = replace(config, poses=None)
    extract(config)
    index = config.out / "index.json"
    index.write_text(index.read_text().replace(' "poses": false,\n', ""))
    assert "poses" not in index.read_text()
    assert not extract(config).poses
    assert len(MotionDataset(config.out)) == 3


def test_videos_without_a_pose_that_fits_are_told(
    config: FlowConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, poses in (("c", 12), ("d", 13)):
        shutil.copy(config.videos / "b/1.mp4", config.videos / f"{name}.mp4")
        write_bars(config.poses / f"{name}.mkv", list(range(poses)), *((48, 64) if name == "c" else (64, 64)))
    shutil.copy(config.videos / "b/1.mp4", config.videos / "e.mp4")
    shutil.copy(config.videos / "b/1.mp4", config.videos / "f.mp4")
    (config.poses / "f.mp4").write_text("no video")
    extract(config)
    assert {name for name, _ in contents(config.out)} == {"a/0.mp4", "b/1.mp4"}
    told = reasons(caplog)
    assert told[:3] == [
        "c.mp4: skipped: its pose video: 12 frames, not 13",
        "d.mp4: skipped: its pose video: 64 x 64 pixels, not of the shape of 64 x 48",
        f"e.mp4: skipped: no pose video e in {config.poses}",
    ]
    assert told[3].startswith("f.mp4: skipped: its pose video: ")
    assert "skipped: 4 unreadable" in capsys.readouterr().out


def test_mistakes_of_the_folder_are_one_line(config: FlowConfig, capsys: pytest.CaptureFixture[str]) -> None:
    required = [f"--videos={config.videos}", f"--out={config.out}"]
    shutil.copy(config.poses / "a/0.mkv", config.poses / "a/0.avi")
    for poses, message in ((config.poses, "wants one video a/0, got 0.avi and 0.mkv"), ("/absent", "at /absent")):
        with pytest.raises(SystemExit) as stop:
            main([*required, f"--poses={poses}"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


# training


def test_the_dataset_gives_poses(config: FlowConfig, tmp_path: Path) -> None:
    extract(config)
    stored = list(contents(config.out).values())
    dataset = MotionDataset(config.out, poses=True, num_frames=3)
    for index in range(3):
        sample = dataset[index]
        assert torch.equal(sample["pose"], to_float(stored[index]["pose"])[:3])
        assert torch.equal(sample["video"], to_float(stored[index]["video"])[:3])
    assert "pose" not in MotionDataset(config.out)[0]
    with pytest.raises(ValueError, match="flip must be False for poses"):
        MotionDataset(config.out, poses=True, flip=True)
    extract(replace(config, poses=None, out=tmp_path / "plain"))
    with pytest.raises(ValueError, match=r"no poses in .*plain: python -m models\.flow --poses adds them"):
        MotionDataset(tmp_path / "plain", poses=True)


def with_poses(folder: Path) -> dict[str, Any]:
    return {
        **TINY_S2DM,
        "s2dm__in_channels": 3,
        "s2dm__input_size": 16,
        "s2dm__pose_channels": 3,
        "data__kind": "motion",
        "data__path": folder,
        "data__frame_interval": 2,
    }


def test_poses_reach_the_network_and_its_gradients(config: FlowConfig, tmp_path: Path) -> None:
    config = replace(config, size=16)
    extract(config)
    settings = training_config(tmp_path / "run", **with_poses(config.out))
    x0, conditions = Batches(settings, World(0, 1, torch.device("cpu"))).first(2)
    stored = list(contents(config.out).values())
    assert torch.equal(conditions["pose"], torch.stack([to_float(s["pose"])[:2] for s in stored[:2]]))
    torch.manual_seed(0)
    network = build_network(settings)
    out = network(x0, torch.tensor([300, 600]), dropped={}, **conditions)
    out.square().mean().backward()
    gradients = [value.grad for value in network.encoders["pose"].parameters()]
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients)


def test_an_s2dm_trains_on_clips_with_poses(
    config: FlowConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, size=16)
    extract(config)
    samples = {"log__sample_every": 6, "log__sample_steps": 2, "log__sample_clips": 2}
    assert train.main(options(tmp_path / "run", **with_poses(config.out), **samples)) == 0
    losses = [metrics["loss"] for metrics in read_metrics(tmp_path / "run")]
    assert 0 < losses[-1] < losses[0]
    assert any(name.startswith("encoders.pose.") for name in newest(tmp_path / "run")["ema"])
    assert (tmp_path / "run/samples/step_00000006.png").exists()

    extract(replace(config, poses=None, out=tmp_path / "plain"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main(options(tmp_path / "other", **with_poses(tmp_path / "plain")))
    error = capsys.readouterr().err
    assert error.startswith("models.train: error: no poses in ")
    assert error.count("\n") == 1


# sampling


@pytest.fixture(scope="module")
def posed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of S2DM with poses; a.mp4, which moves; x.mkv, and y.mkv with another picture at frame 2."""
    folder = tmp_path_factory.mktemp("posed")
    save_run(folder / "run", 7, network="s2dm", s2dm={**S2DM, "pose_channels": 3, "reference": True})
    write_mp4(folder / "a.mp4", moving(8))
    write_bars(folder / "x.mkv", [15, 15, 15, 15, 15, 15], 64, 64)
    write_bars(folder / "y.mkv", [15, 15, 240, 15, 15, 15], 64, 64)
    return folder


def draw(posed: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *argv: str) -> Rendered:
    """What motion-transfer draws."""
    drawn: list[Rendered] = []
    with monkeypatch.context() as patch:
        patch.chdir(posed)
        patch.setattr(text, "load_text_encoder", lambda spec: Stub())
        original = motion_tasks.draw_with_motion
        patch.setattr(motion_tasks, "draw_with_motion", lambda *args: drawn.append(original(*args)) or drawn[0])
        command = ["--task", "motion-transfer", "--checkpoint", "run", "--clip", "a.mp4", "--text", "up"]
        quick = ["--steps", "3", "--num_clips", "2", "--device", "cpu", "--out", str(out)]
        assert sample.main([*command, *quick, *argv]) == 0
    return drawn[0]


def difference(a: Tensor, b: Tensor) -> list[float]:
    """The largest difference of each frame of clips (count, F, C, H, W)."""
    return (a - b).abs().amax((0, 2, 3, 4)).tolist()


def test_each_frame_follows_its_own_pose(posed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(posed, tmp_path, monkeypatch, "--pose", "x.mkv")
    y = draw(posed, tmp_path, monkeypatch, "--pose", "y.mkv")
    assert x.clips.shape == (2, FRAMES, 3, SIZE, SIZE)
    assert x.pose is not None
    assert torch.equal(x.pose, read_clip(str(posed / "x.mkv"), FRAMES, 1, (SIZE, SIZE), 3))
    assert torch.equal(x.motion, y.motion)
    assert torch.equal(x.first, y.first)  # frame 0 has the same pose
    apart = difference(x.clips, y.clips)
    assert apart[2] > 0.02
    assert max(apart[0], apart[1], apart[3]) < 1e-5


def test_pose_guides_and_goes_with_a_given_first_frame(
    posed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = draw(posed, tmp_path, monkeypatch, "--pose", "y.mkv")
    assert (
        difference(draw(posed, tmp_path, monkeypatch, "--pose", "y.mkv", "--cfg_pose", "1").clips, plain.clips)
        == [pytest.approx(0, abs=1e-3)] * FRAMES
    )
    guided = draw(posed, tmp_path, monkeypatch, "--pose", "y.mkv", "--cfg_pose", "4")
    assert min(difference(guided.clips, plain.clips)) > 0.01
    still = tmp_path / "first.png"
    Image.fromarray(np.asarray(to_uint8(plain.first[0]).permute(1, 2, 0))).save(still)
    held = draw(posed, tmp_path, monkeypatch, "--pose", "y.mkv", "--image", str(still))
    assert torch.equal(held.clips[:, 0], held.first)
    assert torch.equal(held.first[0], to_float(to_uint8(plain.first[0])))

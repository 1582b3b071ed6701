"""Clips stored with their motion: values, the check, resume after a kill, bad input; and the dataset of them."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from torch import Tensor

from models import flow as command
from models import train
from models.autoencoder import load_autoencoder, posterior
from models.command_line import UsageError
from models.data import MotionDataset
from models.data.decode import read_frames
from models.data.frames import to_clip, to_float, to_uint8
from models.data.motion import Check, MotionEntry, read_motion_index
from models.flow import FlowConfig, extract, main, summary
from models.motion import from_network
from models.motion.extract import clip_motion, load_extractor
from models.training.checkpointing import StorageError
from tests.models.clip_files import write_numbered
from tests.models.runs import options, read_metrics
from tests.models.test_two_processes import S2DM as TINY_S2DM


class Brightness:
    """An extractor that is quick: dx is by how much the frames' means differ, dy twice that."""

    identity = "brightness"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        dx = (target.float() - source.float()).mean((1, 2, 3)) / 16
        return torch.stack([dx, 2 * dx], 1)[:, :, None, None].expand(-1, -1, *source.shape[-2:])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Brightness:
    extractor = Brightness()
    monkeypatch.setattr(command, "load_extractor", lambda *_: extractor)
    return extractor


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of 10, 13 and 16 frames in two classes, and a file that is none."""
    root = tmp_path_factory.mktemp("videos")
    for index in range(3):
        write_numbered(root / f"{'aab'[index]}/{index}.mp4", 10 + 3 * index, first=40 * index)
    (root / "a/text.mp4").write_text("no video\n")
    return root


@pytest.fixture
def config(videos: Path, tmp_path: Path) -> FlowConfig:
    """Clips over seven frames of the video, a shard for each."""
    return FlowConfig(
        videos,
        tmp_path / "out",
        num_frames=4,
        frame_interval=2,
        stride=5,
        size=16,
        workers=0,
        shard_mib=0,
        device="cpu",
    )


STARTS = {"a/0.mp4": [0], "a/1.mp4": [0, 5], "b/2.mp4": [0, 5]}


def contents(folder: Path) -> dict[tuple[str, int], dict[str, Tensor]]:
    """(name, start) -> tensors; fails for an entry that is there twice, a missing tensor, a file too many."""
    entries, found = read_motion_index(folder).entries, {}
    shards = {entry.shard: load_file(folder / entry.shard) for entry in entries}
    for number, entry in enumerate(entries):
        assert (entry.name, entry.start) not in found
        names = [name for name in shards[entry.shard] if name.startswith(f"{number}.")]
        found[entry.name, entry.start] = {n.split(".")[1]: shards[entry.shard].pop(n) for n in names}
    assert not any(shards.values())
    assert sorted(path.name for path in folder.iterdir()) == sorted(["check.png", "index.json", *shards])
    return found


def same(a: dict[tuple[str, int], dict[str, Tensor]], b: dict[tuple[str, int], dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].keys() == b[key].keys() and all(torch.equal(a[key][name], b[key][name]) for name in a[key]) for key in a
    )


def write_pan(path: Path, frames: int, dx: int, dy: int, size: int = 64, shrink: int = 2) -> Path:
    """A window that moves (dx, dy) / shrink pixels a frame over a photograph, nearly lossless."""
    photo, side = load_sample_image("flower.jpg"), size * shrink
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height = stream.width = size
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "4"}
        for i in range(frames):
            window = photo[150 + i * dy :, 250 + i * dx :][:side, :side]
            image = np.asarray(Image.fromarray(window).resize((size, size), Image.Resampling.LANCZOS))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    return path


# what is stored


def test_clips_are_stored_with_the_extractors_motion(
    config: FlowConfig, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    index = extract(config)
    assert (index.extractor, index.classes) == ("dis, medium", ["a", "b"])
    assert [(e.name, e.start, e.label) for e in index.entries] == [
        (name, start, int(name.startswith("b"))) for name, starts in STARTS.items() for start in starts
    ]
    found, dis = contents(config.out), load_extractor("dis")
    for (name, start), stored in found.items():
        frames = read_frames(config.videos / name, range(start, start + 7, 2))
        clip = to_uint8(to_clip(frames, (16, 16)))
        assert torch.equal(stored["video"], clip)
        flow, occlusion = clip_motion(clip, dis)
        assert torch.equal(stored["flow"], flow.half())
        assert torch.equal(stored["occlusion"], (255 * occlusion).to(torch.uint8))
    out = capsys.readouterr().out
    assert "5 clips of 3 videos" in out
    assert "skipped: 1 unreadable, 0 not videos" in out
    assert [record.getMessage().split(": ")[:2] for record in caplog.records] == [["a/text.mp4", "skipped"]]
    with Image.open(config.out / "check.png") as sheet:
        assert sheet.width == 4 * (16 + 4) + 4
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 10


def test_the_check_of_a_pan_is_what_warping_by_it_gives(tmp_path: Path) -> None:
    """The flow of a window that moves over a photograph is known, and so is what it leaves in view."""
    write_pan(tmp_path / "pan.mp4", 4, 4, -2)
    config = FlowConfig(tmp_path / "pan.mp4", tmp_path / "out", num_frames=4, size=64, workers=0, device="cpu")
    index = extract(config)
    [((_, _), stored)] = contents(config.out).items()
    for i in range(1, 4):
        inner = stored["flow"][i, :, 16:-16, 16:-16].float()
        torch.testing.assert_close(
            inner.flatten(1).median(1).values, torch.tensor([2.0 * i, -1.0 * i]), atol=0.1, rtol=0
        )
        # the last 2 i columns and the first i rows were not in view
        seen = torch.zeros(64, 64, dtype=torch.bool)
        seen[i:, : 64 - 2 * i] = True
        assert (stored["occlusion"][i, 0].bool() == seen).float().mean() > 0.98
    [entry] = index.entries
    video, shown = stored["video"].double(), stored["occlusion"][1:, 0].bool()
    still = (video[1:] - video[0]).abs().mean(1)
    assert entry.check.still == pytest.approx(float(still.mean()), rel=1e-5)
    assert entry.check.still_visible == pytest.approx(float(still[shown].mean()), rel=1e-5)
    assert entry.check.visible == pytest.approx(float(shown.double().mean()), rel=1e-5)
    assert entry.check.warped < 0.5 * entry.check.still
    assert entry.check.warped_visible < 0.2 * entry.check.still_visible


def test_the_table_names_the_worst_clips() -> None:
    def entry(name: str, *values: float) -> MotionEntry:
        return MotionEntry(name, 16, 0, "", "", Check(*values))

    text = summary(
        [entry("good", 10, 2, 8, 1, 0.75), entry("whole", 10, 11, 8, 2, 0.5), entry("shown", 4, 2, 2, 1.9, 0.25)]
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "| mean of 3 clips | 8.00 | 5.00 | 6.00 | 1.63 | 50% |",
        "| worst: whole, frame 16 | 10.00 | 11.00 | 8.00 | 2.00 | 50% |",
        "| worst where visible: shown, frame 16 | 4.00 | 2.00 | 2.00 | 1.90 | 25% |",
    ]
    assert text.endswith("warping is nearer in 2 of 3 clips, where visible in 3")
    assert "in 0 of 1 clips" in summary([entry("still", 0, 0, 0, 0, 1)])


def test_a_manifest_gives_starts_and_texts(config: FlowConfig, quick: Brightness, tmp_path: Path) -> None:
    manifest = tmp_path / "clips.csv"
    manifest.write_text(
        f"path,start,text\n{config.videos}/a/1.mp4,3,one\n{config.videos}/a/1.mp4,3,again\n"
        f'{config.videos}/b/2.mp4,,"two, or so"\n{config.videos}/b/2.mp4,5,\n{config.videos}/a/0.mp4,4,late\n'
    )
    entries = extract(replace(config, videos=manifest)).entries
    assert sorted((Path(e.name).name, e.start, e.text) for e in entries) == [
        ("1.mp4", 3, "again"),
        ("2.mp4", 0, "two, or so"),
        ("2.mp4", 5, "two, or so"),
    ]
    assert quick.calls == 2 * 3

    index = (config.out / "index.json").read_bytes()
    extract(replace(config, videos=manifest))
    assert (config.out / "index.json").read_bytes() == index
    manifest.write_text(manifest.read_text().replace("again", "corrected").replace("two, or so", "two, surely"))
    extract(replace(config, videos=manifest))
    assert sorted((e.start, e.text) for e in read_motion_index(config.out).entries) == [
        (0, "two, surely"),
        (3, "corrected"),
        (5, "two, surely"),
    ]
    assert quick.calls == 2 * 3


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder that halves the sides, with scaling and shift."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.1,
    ).save_pretrained(folder)
    return folder


def test_latents_are_the_posterior_of_the_clip(config: FlowConfig, quick: Brightness, vae: Path) -> None:
    extract(replace(config, vae=str(vae)))
    model = load_autoencoder(str(vae))
    for stored in contents(config.out).values():
        for name, wanted in zip(("mean", "std"), posterior(model, to_float(stored["video"])), strict=True):
            assert stored[name].shape == (4, 4, 8, 8)
            torch.testing.assert_close(stored[name], wanted, rtol=1e-5, atol=1e-5)


# going on


def test_workers_and_shards_change_no_clip(config: FlowConfig, quick: Brightness, tmp_path: Path) -> None:
    extract(config)
    extract(replace(config, out=tmp_path / "workers", workers=2, shard_mib=0.01))
    assert same(contents(config.out), contents(tmp_path / "workers"))
    assert 1 < len({entry.shard for entry in read_motion_index(tmp_path / "workers").entries}) < 5


class Killed(BaseException):
    """What no handler of the code under test catches, as nothing catches SIGKILL."""


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_a_kill_at_any_write_loses_and_repeats_nothing(
    config: FlowConfig, quick: Brightness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = replace(config, stride=16)
    extract(replace(config, out=tmp_path / "whole"))
    whole, rename = contents(tmp_path / "whole"), os.replace
    for last in range(7):  # each of three shards, then its index; check.png
        count = 0

        def dying(source: str, target: str, last: int = last) -> None:
            nonlocal count
            count += 1
            if moment == "after the rename" or count <= last:
                rename(source, target)
            if count > last:
                raise Killed

        shutil.rmtree(config.out, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with pytest.raises(Killed):
                extract(config)
        stored = len(read_motion_index(config.out).entries) if (config.out / "index.json").exists() else 0
        assert stored == (last // 2 if moment == "before the rename" else (last + 1) // 2)
        quick.calls = 0
        extract(config)
        assert quick.calls == 2 * (3 - stored)
        assert same(contents(config.out), whole)


def test_more_videos_are_added_and_nothing_is_done_twice(
    config: FlowConfig, quick: Brightness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = tmp_path / "some"
    shutil.copytree(config.videos, some)
    os.rename(some / "a/1.mp4", tmp_path / "1.mp4")
    config = replace(config, videos=some)
    extract(config)
    first = contents(config.out)
    os.rename(tmp_path / "1.mp4", some / "a/1.mp4")
    seen, quick.calls = [], 0
    monkeypatch.setattr(
        command, "read_frames", lambda path, numbers: seen.append(path.name) or read_frames(path, numbers)
    )
    extract(config)
    assert (seen, quick.calls) == (["1.mp4"] * 2, 2 * 2)
    second = contents(config.out)
    assert len(second) == len(first) + 2
    assert same(first, {key: second[key] for key in first})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_frames", 3, "num_frames: 4, now 3"),
        ("frame_interval", 1, "frame_interval: 2, now 1"),
        ("stride", 4, "stride: 5, now 4"),
        ("size", 24, r"size: \(16, 16\), now \(24, 24\)"),
        ("vae", "VAE", "vae_sha256: None, now "),
    ],
)
def test_another_setting_wants_another_folder(
    config: FlowConfig, quick: Brightness, vae: Path, name: str, value: int | str, message: str
) -> None:
    extract(config)
    with pytest.raises(UsageError, match=f"holds motion of another {message}.*; want another --out"):
        extract(replace(config, **{name: str(vae) if value == "VAE" else value}))


def test_another_extractor_wants_another_folder(config: FlowConfig, quick: Brightness) -> None:
    extract(config)
    quick.identity = "darkness"
    with pytest.raises(UsageError, match="another extractor: brightness, now darkness"):
        extract(config)


# bad input


def test_videos_that_give_no_clip_are_told(
    config: FlowConfig, quick: Brightness, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"none of the 1 videos in .* gives a clip of 4 frames"):
        extract(replace(config, videos=bad))
    shutil.copy(config.videos / "a/0.mp4", bad / "b.mp4")
    caplog.clear()
    with pytest.raises(ValueError, match=r"none of the 2 videos in .* gives a clip of 6 frames"):
        extract(replace(config, videos=bad, num_frames=6, out=tmp_path / "long"))
    assert [record.getMessage() for record in caplog.records][
        -1
    ] == "b.mp4: skipped: too short: 10 frames, a clip needs 11"


def test_the_command_answers_mistakes_in_one_line(
    config: FlowConfig, vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    required = [f"--videos={config.videos}", f"--out={config.out}"]
    for arguments, message in (
        ([*required, "--strid=16"], "unknown option --strid; the nearest is --stride"),
        ([*required, "--stride=0"], "--stride wants at least 1, got 0"),
        ([*required, "--shard_mib=nan"], "--shard_mib wants at least 0, got nan"),
        ([*required, "--workers=-1"], "--workers wants at least 0, got -1"),
        ([*required, "--device=tpu"], "invalid choice 'tpu' for argument '--device'"),
        ([f"--videos={config.videos}", f"--out={config.videos}/a/0.mp4"], "/a/0.mp4: File exists"),
        ([*required, "--num_frames=1"], "--num_frames wants at least 2, got 1"),
        ([*required, "--extractor=raft"], "--extractor raft wants --raft, the path of torchvision's RAFT weights"),
        ([*required, "--vae=./absent"], "no autoencoder at ./absent"),
        ([*required, f"--vae={vae}", "--size=17"], "--size wants a multiple of the autoencoder's 2, got 17"),
        (["--videos=/absent", *required[1:]], "no folder, manifest or file of videos at /absent"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


# the dataset


def mirrored_epochs(dataset: MotionDataset, plain: MotionDataset, index: int) -> Iterator[bool]:
    """Whether the sample is mirrored in each of some epochs; fails where it is neither this nor as it was."""
    as_it_is = plain[0, index]
    flow, occlusion = from_network(as_it_is["motion"])
    mirrored_flow = torch.stack([-flow[:, 0], flow[:, 1]], 1).flip(-1)
    for epoch in range(12):
        sample = dataset[epoch, index]
        mirrored = not torch.equal(sample["video"], as_it_is["video"])
        if mirrored:
            assert torch.equal(sample["video"], as_it_is["video"].flip(-1))
        wanted = (mirrored_flow, occlusion.flip(-1)) if mirrored else (flow, occlusion)
        torch.testing.assert_close(from_network(sample["motion"]), wanted)
        yield mirrored


def test_samples_are_the_stored_clips_and_their_mirrors(config: FlowConfig, quick: Brightness) -> None:
    extract(config)
    dataset, found = MotionDataset(config.out), contents(config.out)
    assert len(dataset) == 5
    assert dataset.classes == ["a", "b"]
    assert dataset.captions == ()
    for index, ((name, _), stored) in enumerate(found.items()):
        sample = dataset[index]
        assert sample.keys() == {"video", "motion", "label"}
        assert torch.equal(sample["video"], to_float(stored["video"]))
        assert int(sample["label"]) == int(name.startswith("b"))
        torch.testing.assert_close(sample["motion"][:, :2], stored["flow"].float())  # 8 times half the 16 pixels
        torch.testing.assert_close(sample["motion"][:, 2:], stored["occlusion"].float() / 127.5 - 1)
        short = MotionDataset(config.out, num_frames=2)[index]
        assert torch.equal(short["motion"], sample["motion"][:2])
    flipping = MotionDataset(config.out, flip=True, seed=1)
    for index in range(5):
        drawn = list(mirrored_epochs(flipping, dataset, index))
        assert 0 < sum(drawn) < 12
        assert drawn == list(mirrored_epochs(MotionDataset(config.out, flip=True, seed=1), dataset, index))


def test_captions_are_those_of_the_listing(config: FlowConfig, quick: Brightness, tmp_path: Path) -> None:
    manifest = tmp_path / "clips.csv"
    manifest.write_text(
        f"path,text\n{config.videos}/a/1.mp4,up\n{config.videos}/b/2.mp4,\n{config.videos}/a/0.mp4,up\n"
    )
    extract(replace(config, videos=manifest))
    dataset = MotionDataset(config.out)
    texts = [dataset.captions[int(dataset[i]["caption"])] for i in range(len(dataset))]
    assert texts == ["up", "up", "", "", "up"]
    assert sorted(dataset.captions) == ["", "up"]


def test_latents_are_drawn_from_the_scaled_posterior(config: FlowConfig, quick: Brightness, vae: Path) -> None:
    extract(replace(config, vae=str(vae)))
    dataset, found = MotionDataset(config.out, latents=True, num_frames=3), contents(config.out)
    drawn = []
    for index, stored in enumerate(found.values()):
        for epoch in range(4):
            sample = dataset[epoch, index]
            assert sample.keys() == {"latent", "motion", "label"}
            latent = sample["latent"].double() / 0.7 + 0.1
            drawn.append(((latent - stored["mean"][:3]) / stored["std"][:3]).flatten())
            assert torch.equal(
                sample["latent"], MotionDataset(config.out, latents=True, num_frames=3)[epoch, index]["latent"]
            )
    normal = torch.cat(drawn)
    assert abs(normal.mean()) < 0.04
    assert abs(normal.std() - 1) < 0.03
    assert torch.equal(MotionDataset(config.out)[0]["video"], to_float(found["a/0.mp4", 0]["video"]))


def test_clips_across_a_cut_can_be_left_out(config: FlowConfig, quick: Brightness) -> None:
    extract(config)
    dataset, entries = MotionDataset(config.out), read_motion_index(config.out).entries
    least = max(entry.check.visible for entry in entries)
    kept = [i for i, entry in enumerate(entries) if entry.check.visible >= least]
    clear = MotionDataset(config.out, least_visible=least)
    assert 0 < len(clear) == len(kept) < 5
    for number, index in enumerate(kept):
        assert torch.equal(clear[number]["video"], dataset[index]["video"])
        assert clear[number]["label"] == dataset[index]["label"]
    with pytest.raises(ValueError, match=r"no clip in .* shows 1\.1 in its first frame; most is [01]\.\d\d"):
        MotionDataset(config.out, least_visible=1.1)


def test_an_s2dm_trains_on_stored_clips(
    config: FlowConfig, quick: Brightness, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(config)
    overrides = {"s2dm__in_channels": 3, "s2dm__motion_adapter": True, "data__kind": "motion", "data__path": config.out}
    with pytest.raises(SystemExit):
        train.main(options(tmp_path / "run", **{**TINY_S2DM, **overrides}))
    assert "--data.frame_interval wants 2, that of the clips in" in capsys.readouterr().err
    overrides["data__frame_interval"] = 2
    assert train.main(options(tmp_path / "run", **{**TINY_S2DM, **overrides})) == 0
    losses = [metrics["loss"] for metrics in read_metrics(tmp_path / "run")]
    assert 0 < losses[-1] < losses[0]


def test_the_dataset_names_what_it_cannot_give(config: FlowConfig, quick: Brightness, tmp_path: Path) -> None:
    extract(config)
    for frames in (0, 5):
        with pytest.raises(ValueError, match=rf"num_frames must be from 1 to the 4 in .*, got {frames}"):
            MotionDataset(config.out, num_frames=frames)
    with pytest.raises(ValueError, match=r"no latents in .*: python -m models\.flow --vae adds them to a new folder"):
        MotionDataset(config.out, latents=True)
    with pytest.raises(FileNotFoundError, match=r"no motion at .*: python -m models\.flow makes it"):
        MotionDataset(tmp_path)
    dataset = MotionDataset(config.out)
    shard = config.out / dataset.index.entries[0].shard
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"cannot read the shard .*motion-00000\.safetensors: "):
        dataset[0, 0]
    shard.unlink()
    with pytest.raises(StorageError, match=r"cannot read the shard .*motion-00000\.safetensors: No such file"):
        dataset[0, 0]
    (tmp_path / "index.json").write_text('{"vae": 1}')
    with pytest.raises(ValueError, match=r"index\.json is not an index of motion"):
        MotionDataset(tmp_path)

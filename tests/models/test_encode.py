"""Encoding videos to latents: values, resume after a kill at any moment, bad input; and the dataset of latents."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file

from models.autoencoder import decode_latents, load_autoencoder, posterior
from models.command_line import UsageError
from models.data import LatentDataset
from models.data.decode import decode
from models.data.frames import to_clip
from models.data.latents import read_index
from models.encode import EncodeConfig, encode, main
from tests.models.clip_files import write_numbered


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


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos in two classes, and a file that is none."""
    root = tmp_path_factory.mktemp("videos")
    for index in range(5):
        write_numbered(root / f"{'ab'[index % 2]}/{index}.mp4", 10 + index, first=40 * index)
    (root / "a/text.mp4").write_text("no video\n")
    return root


@pytest.fixture
def config(videos: Path, vae: Path, tmp_path: Path) -> EncodeConfig:
    """A shard for each video."""
    return EncodeConfig(videos, tmp_path / "out", str(vae), size=16, batch_size=4, workers=0, shard_mib=0, device="cpu")


def contents(folder: Path) -> dict[tuple[str, bool], list[torch.Tensor]]:
    """(name, mirrored) -> mean and std; fails for an entry that is there twice, a missing tensor, a file too many."""
    entries, found = read_index(folder).entries, {}
    shards = {entry.shard: load_file(folder / entry.shard) for entry in entries}
    for number, entry in enumerate(entries):
        assert (entry.name, entry.mirrored) not in found
        found[entry.name, entry.mirrored] = [shards[entry.shard].pop(f"{number}.{part}") for part in ("mean", "std")]
        assert all(len(tensor) == entry.frames for tensor in found[entry.name, entry.mirrored])
    assert not any(shards.values())
    assert sorted(path.name for path in folder.iterdir()) == sorted(["index.json", *shards])
    return found


def same(a: dict[tuple[str, bool], list[torch.Tensor]], b: dict[tuple[str, bool], list[torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


def test_latents_are_the_posterior_of_every_frame(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    index = encode(replace(config, flip=True))
    assert (index.scaling_factor, index.shift_factor, index.classes) == (0.7, 0.1, ["a", "b"])
    assert [(e.label, e.frames) for e in index.entries if not e.mirrored] == [
        (0, 10),
        (0, 12),
        (0, 14),
        (1, 11),
        (1, 13),
    ]
    found, vae = contents(config.out), load_autoencoder(config.vae)
    assert len(found) == 10
    for (name, mirrored), latents in found.items():
        clip = to_clip(list(decode(config.videos / name)), (16, 16), mirror=mirrored)
        for got, wanted in zip(latents, posterior(vae, clip), strict=True):
            assert got.shape == (len(clip), 4, 8, 8)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert "10 encoded videos, 120 frames" in capsys.readouterr().out
    assert [record.getMessage().split(": ")[:2] for record in caplog.records] == [["a/text.mp4", "skipped"]]


def test_latents_carry_the_captions_of_their_videos(config: EncodeConfig, videos: Path, tmp_path: Path) -> None:
    lines = [f"{videos / name},{text}\n" for name, text in (("a/0.mp4", "bars"), ("b/1.mp4", ""), ("a/2.mp4", "bars"))]
    (tmp_path / "list.csv").write_text("path,text\n" + "".join(lines))
    encode(replace(config, videos=tmp_path / "list.csv"))
    dataset = LatentDataset(config.out, num_frames=4)
    assert dataset.captions == ("bars", "")
    assert [int(dataset[i]["caption"]) for i in range(3)] == [0, 1, 0]

    index = json.loads((config.out / "index.json").read_text())
    for entry in index["entries"]:
        del entry["text"]  # as in folders written before there were captions
    (config.out / "index.json").write_text(json.dumps(index))
    dataset = LatentDataset(config.out, num_frames=4)
    assert dataset.captions == ()
    assert "caption" not in dataset[0]
    encode(replace(config, videos=tmp_path / "list.csv"))  # which encodes nothing, and takes the texts of today
    assert LatentDataset(config.out, num_frames=4).captions == ("bars", "")


def test_workers_shards_and_dtype_change_no_entry(config: EncodeConfig, tmp_path: Path) -> None:
    encode(config)
    encode(replace(config, out=tmp_path / "workers", workers=2, shard_mib=0.02))
    assert same(contents(config.out), contents(tmp_path / "workers"))
    assert 1 < len({entry.shard for entry in read_index(tmp_path / "workers").entries}) < 5
    encode(replace(config, out=tmp_path / "half", dtype="bfloat16"))
    exact, rounded = contents(config.out), contents(tmp_path / "half")
    for key, tensors in rounded.items():
        assert tensors[0].dtype == torch.bfloat16
        torch.testing.assert_close(tensors[0].float(), exact[key][0], rtol=0.05, atol=0.05)


class Killed(BaseException):
    """What no handler of the code under test catches, as nothing catches SIGKILL."""


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_a_kill_at_any_write_loses_and_repeats_nothing(
    config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    encode(replace(config, out=tmp_path / "whole"))
    whole, rename = contents(tmp_path / "whole"), os.replace
    for last in range(10):  # each of five shards, then its index
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
                encode(config)
        encode(config)
        assert same(contents(config.out), whole)


def test_sigkill_and_the_same_command_again(config: EncodeConfig, tmp_path: Path) -> None:
    many = tmp_path / "many"
    for index in range(60):
        (many / f"{index}").mkdir(parents=True)
        os.link(config.videos / "a/0.mp4", many / f"{index}/0.mp4")
    config = replace(config, videos=many)
    command = [sys.executable, "-m", "models.encode", f"--videos={many}", f"--out={config.out}", f"--vae={config.vae}"]
    command += ["--size=16", "--batch_size=4", "--workers=1", "--shard_mib=0", "--device=cpu"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here, for the same bits
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    while not (config.out / "latents-00002.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {entry.name for entry in read_index(config.out).entries}
    assert 2 <= len(before) < 60
    encode(config)
    found = contents(config.out)
    assert len(found) == 60
    [(mean, std)] = {(m.numpy().tobytes(), s.numpy().tobytes()) for m, s in found.values()}
    assert mean != std


def test_more_videos_are_added_and_nothing_is_done_twice(
    config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = tmp_path / "some"
    shutil.copytree(config.videos, some)
    os.rename(some / "b/3.mp4", tmp_path / "3.mp4")
    config = replace(config, videos=some)
    encode(config)
    first = contents(config.out)
    os.rename(tmp_path / "3.mp4", some / "b/3.mp4")
    seen = []
    monkeypatch.setattr("models.encode.decode", lambda path: seen.append(path.name) or decode(path))
    encode(config)
    assert seen == ["3.mp4"]
    second = contents(config.out)
    assert len(second) == len(first) + 1
    assert same(first, {key: second[key] for key in first})


def test_a_full_disk_costs_only_the_shard(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, count = os.fsync, 0

    def filling(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 8:  # four a shard: two files and their folder
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        with pytest.raises(OSError, match=r"cannot write .*latents-00002.*: No space left on device"):
            encode(config)
    assert len(contents(config.out)) == 2
    encode(config)
    assert len(contents(config.out)) == 5


# bad input


def test_another_setting_wants_another_folder(config: EncodeConfig, tmp_path: Path) -> None:
    encode(config)
    with pytest.raises(
        UsageError, match=r"holds latents of another size: \(16, 16\), now \(32, 32\); want another --out"
    ):
        encode(replace(config, size=32))
    changed = AutoencoderKL.from_pretrained(config.vae)
    changed.encoder.conv_in.weight.data += 0.01
    changed.save_pretrained(tmp_path / "vae2")
    with pytest.raises(UsageError, match="holds latents of another vae_sha256"):
        encode(replace(config, vae=str(tmp_path / "vae2")))
    with pytest.raises(UsageError, match="--size wants a multiple of the autoencoder's 2, got 15"):
        encode(replace(config, size=15))


def test_no_readable_video_is_an_error(config: EncodeConfig, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"none of the 1 videos in .* could be read"):
        encode(replace(config, videos=tmp_path / "bad"))


def test_a_wrong_autoencoder_is_named(tmp_path: Path, vae: Path) -> None:
    with pytest.raises(ValueError, match=r"no autoencoder at .*absent: want a local folder, or owner/name on the hub"):
        load_autoencoder(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="cannot load an AutoencoderKL from "):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(ValueError, match="holds a AutoencoderKLWan, want an AutoencoderKL"):
        load_autoencoder(str(tmp_path))
    shutil.copytree(vae, tmp_path / "pipeline/vae")
    assert load_autoencoder(str(tmp_path / "pipeline"), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_command_answers_mistakes_in_one_line(config: EncodeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    required = [f"--videos={config.videos}", f"--out={config.out}", f"--vae={config.vae}"]
    for arguments, message in (
        ([*required, "--sise=16"], "unknown option --sise; the nearest is --size"),
        ([*required[:2], "--vae=./absent"], "no autoencoder at ./absent"),
        (["--videos=/absent", *required[1:]], "no folder, manifest or file of videos at /absent"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


# the dataset


def test_dataset_samples_the_scaled_posterior_of_a_window(config: EncodeConfig) -> None:
    encode(replace(config, flip=True))
    dataset, found = LatentDataset(config.out, num_frames=4, frame_interval=3, seed=1), contents(config.out)
    assert len(dataset) == 5
    assert dataset.too_short == []
    normal, seen = [], set()
    for epoch in range(40):
        for index, name in enumerate(["a/0.mp4", "a/2.mp4", "a/4.mp4", "b/1.mp4", "b/3.mp4"]):
            sample = dataset[epoch, index]
            assert sample["label"] == (index > 2)
            latent = sample["latent"].double() / 0.7 + 0.1
            fits = {}
            for mirrored in (False, True):
                mean, std = (tensor.double() for tensor in found[name, mirrored])
                for start in range(len(mean) - 9):
                    window = slice(start, start + 10, 3)
                    fits[mirrored, start] = (latent - mean[window]) / std[window]
            (mirrored, start), noise = min(fits.items(), key=lambda item: item[1].square().mean())
            normal.append(noise.flatten())
            seen.add((index, mirrored, start))
    assert {index for index, _, _ in seen} == set(range(5))
    assert {mirrored for _, mirrored, _ in seen} == {False, True}
    values = torch.cat(normal)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.05
    assert torch.equal(
        dataset[3, 1]["latent"], LatentDataset(config.out, num_frames=4, frame_interval=3, seed=1)[3, 1]["latent"]
    )


def test_dataset_names_what_it_leaves_out_or_misses(config: EncodeConfig, tmp_path: Path) -> None:
    encode(config)
    dataset = LatentDataset(config.out, num_frames=12)
    assert (len(dataset), dataset.too_short) == (3, ["a/0.mp4", "b/1.mp4"])
    with pytest.raises(ValueError, match=r"none of the 5 videos in .* has 15 frames"):
        LatentDataset(config.out, num_frames=15)
    with pytest.raises(FileNotFoundError, match=r"no latents at .*: python -m models\.encode makes them"):
        LatentDataset(tmp_path)
    (tmp_path / "index.json").write_text('{"vae": 1}')
    with pytest.raises(ValueError, match=r"index\.json is not an index of latents"):
        LatentDataset(tmp_path)


def test_decode_latents_undoes_the_scaling(vae: Path) -> None:
    model = load_autoencoder(str(vae))
    clip = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3, 3, 16, 16))).float()
    mean, _ = posterior(model, clip)
    pixels = decode_latents(model, ((mean - 0.1) * 0.7)[None], batch=2)
    assert pixels.shape == (1, 3, 3, 16, 16)
    torch.testing.assert_close(pixels[0], model.decode(mean).sample, rtol=1e-4, atol=1e-4)

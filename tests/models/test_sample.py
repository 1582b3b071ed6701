"""Sampling from a checkpoint: every task, exact given frames, any split into batches, and what is written."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models import sample
from models.command_line import from_dict, to_dict, to_yaml
from models.config import TrainConfig
from models.data.write import write_mp4
from models.latte import Latte
from models.sampling.codec import make_codec
from models.sampling.draw import draw_clips
from models.sampling.given import read_clip, read_images
from models.sampling.network import load_network
from models.training import checkpointing
from vidkern.diffusion import TASKS, graphs, make_schedule

FRAMES, SIZE = 8, 16
MODEL = {
    "input_size": SIZE,
    "patch_size": 8,
    "in_channels": 3,
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 2,
    "num_frames": FRAMES,
    "num_classes": 4,
}
QUICK = ["--steps", "3", "--num_clips", "2", "--device", "cpu"]


def settings(**model: Any) -> TrainConfig:
    return from_dict(TrainConfig, {"model": {**MODEL, **model}, "data": {"kind": "videos", "path": "videos"}})


def weights_of(config: TrainConfig, seed: int) -> dict[str, torch.Tensor]:
    """A network whose output is not 0, as a fresh one's is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = Latte(config.model).state_dict()
    return {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("run"), settings()
    state = {"step": 1, "config": to_dict(config), "model": weights_of(config, 1), "ema": weights_of(config, 2)}
    checkpointing.save(folder / "checkpoints", 1, state, keep=1)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.png, b.png, a.mp4, b.mp4, and files that are not what they are called."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
        write_mp4(folder / f"{name}.mp4", torch.rand(12, 3, SIZE, SIZE, generator=generator) * 2 - 1)
    (folder / "not.png").write_text("text")
    (folder / "not.mp4").write_text("text")
    (folder / "not.safetensors").write_text("text")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({"ema": {}, "config": {"modle": {}}}, folder / "other.pt")
    return folder


CASES: list[tuple[str, list[str], list[int]]] = [
    ("standard", [], []),
    ("image-to-video", ["--image", "a.png"], [0]),
    ("image-to-video", ["--clip", "a.mp4"], [0]),
    ("interpolation", ["--frames", "a.png", "b.png"], [0, 7]),
    ("interpolation", ["--clip", "a.mp4"], [0, 7]),
    ("given-frames", ["--given", "2", "5", "--frames", "a.png", "b.png"], [2, 5]),
    ("given-frames", ["--given", "1", "3", "4", "--clip", "a.mp4"], [1, 3, 4]),
    ("transition", ["--clip", "a.mp4", "b.mp4", "--ends", "3"], [0, 1, 2, 5, 6, 7]),
    ("next-frame", ["--clip", "a.mp4"], [0, 1, 2, 3, 4, 5, 6]),
    ("progressive", ["--image", "b.png"], [0]),
    ("long-video", ["--chunks", "3", "--overlap", "5"], []),
    ("long-video", ["--chunks", "3", "--overlap", "5", "--clip", "a.mp4"], [0, 1, 2, 3, 4, 5, 6, 7]),
]


@pytest.mark.parametrize(("task", "argv", "given"), CASES)
def test_each_task_writes_clips_with_the_given_frames_exactly(
    task: str,
    argv: list[str],
    given: list[int],
    run_dir: Path,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    write = sample.write_results
    monkeypatch.setattr(sample, "write_results", lambda *args: drawn.append(args) or write(*args))
    monkeypatch.chdir(files)
    out = tmp_path / "out"
    assert sample.main(["--checkpoint", str(run_dir), "--task", task, "--out", str(out), *QUICK, *argv]) == 0

    _, clips, hold, labels = drawn[0]
    frames = FRAMES + 2 * (FRAMES - 5) if task == "long-video" else FRAMES
    assert [clip.shape for clip in clips] == [(frames, 3, SIZE, SIZE)] * 2
    assert hold.nonzero()[:, 0].tolist() == given
    assert labels.tolist() == [0, 1]
    if given:
        options = sample.parse(sample.SampleConfig, ["--checkpoint", "x", "--task", task, *argv], "")
        known = sample.given_clip(options, hold, 1, (SIZE, SIZE), 3)
        for clip in clips:
            assert torch.equal(clip[: len(hold)][hold], known[hold])
    free = torch.ones(frames, dtype=torch.bool)
    free[given] = False
    assert clips[0][free].std() > 0.1
    assert not torch.allclose(clips[0][free], clips[1][free], atol=1e-2)

    names = ["clip_000.gif", "clip_000.mp4", "clip_001.gif", "clip_001.mp4", "sheet.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    with av.open(str(out / "clip_001.mp4")) as container:
        assert len(list(container.decode(video=0))) == frames
    with Image.open(out / "clip_000.gif") as gif:
        assert (gif.n_frames, gif.size) == (frames, (SIZE, SIZE))


def test_given_frames_are_those_of_the_files(files: Path) -> None:
    image = read_images([str(files / "a.png")], (20, 20), 3)
    pixels = torch.from_numpy(np.array(Image.open(files / "a.png").crop((2, 0, 22, 20))))
    torch.testing.assert_close(image[0].permute(1, 2, 0), pixels / 127.5 - 1, rtol=0, atol=1e-6)
    grey = read_images([str(files / "a.png")], (20, 20), 1)
    torch.testing.assert_close(grey[0, 0], image[0, 0] * 0.299 + image[0, 1] * 0.587 + image[0, 2] * 0.114)

    whole = read_clip(str(files / "a.mp4"), 12, 1, (SIZE, SIZE), 3)
    assert torch.equal(read_clip(str(files / "a.mp4"), 4, 3, (SIZE, SIZE), 3), whole[[0, 3, 6, 9]])
    assert torch.equal(read_clip(str(files / "a.mp4"), 4, 3, (SIZE, SIZE), 3, from_end=True), whole[[2, 5, 8, 11]])


@pytest.mark.parametrize("task", ["standard", "image-to-video"])
def test_a_clip_does_not_depend_on_the_batch_split(task: str, run_dir: Path) -> None:
    network, config = load_network(run_dir)
    schedule = make_schedule("linear", config.diffusion.num_steps, "cpu")
    known = (
        torch.rand(FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)) if task != "standard" else None
    )

    def draw(batch_size: int, seed: int = 7) -> torch.Tensor:
        return draw_clips(
            network,
            schedule,
            5,
            batch_size=batch_size,
            seed=seed,
            num_steps=6,
            task=TASKS[task],
            known=known,
            labels=torch.arange(5) % 4,
            cfg_scale=2.0,
            eta=0.5,
        )

    whole = draw(5)
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(draw(batch_size), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(5), whole)
    assert not torch.allclose(draw(5, seed=8), whole, atol=0.1)
    assert not torch.allclose(whole[0], whole[4], atol=0.1)  # both of class 0


def test_graph_says_why_there_is_none_and_draws_the_same(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graphs._tell.cache_clear()
    for name, argv in (("plain", []), ("graph", ["--graph"])):
        assert sample.main(["--checkpoint", str(run_dir), "--out", str(tmp_path / name), *QUICK, *argv]) == 0
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "graph" / path.name).read_bytes()
    assert [message for message in caplog.messages if "CUDA graph" in message] == [
        "graph=True, but no CUDA graph is used: the device is cpu, not cuda"
    ]


def test_the_networks_step_compiles_once_without_a_graph_break(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --graph captures on a GPU holds nothing that the host does from step to step."""
    network, _ = load_network(run_dir)
    options = {
        "batch_size": 2,
        "seed": 7,
        "num_steps": 5,
        "labels": torch.arange(2),
        "cfg_scale": 2.0,
        "precision": "bfloat16",
        "sampler": "ddpm",
    }
    compiled = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(
        graphs, "replayed", lambda step, _: graphs.repeated(torch.compile(step, fullgraph=True, backend=backend))
    )
    schedule = make_schedule("linear")
    drawn = draw_clips(network, schedule, 2, graph=True, **options)
    assert torch.equal(drawn, draw_clips(network, schedule, 2, **options))
    assert len(compiled) == 1


def test_ema_or_model_weights_from_a_run_a_file_or_an_export(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = checkpointing.paths(run_dir / "checkpoints")[0]
    config = settings()
    for source, weights, seed in ((run_dir, None, 2), (checkpoint, "ema", 2), (checkpoint, "model", 1)):
        network, loaded = load_network(source, weights)
        assert loaded == config
        assert not network.training
        for name, value in weights_of(config, seed).items():
            assert torch.equal(network.state_dict()[name], value), name

    export = tmp_path / "model.safetensors"
    save_file(weights_of(config, 5), export, metadata={"config": json.dumps(to_dict(config))})
    network, loaded = load_network(export)
    assert loaded == config
    assert torch.equal(network.final_layer.linear.weight, weights_of(config, 5)["final_layer.linear.weight"])


def test_the_classes_and_guidance_change_the_clip(run_dir: Path) -> None:
    network, _ = load_network(run_dir)
    schedule = make_schedule("linear", 1000, "cpu")

    def draw(label: int, scale: float | None) -> torch.Tensor:
        labels = torch.tensor([label])
        return draw_clips(network, schedule, 1, batch_size=1, seed=0, num_steps=4, labels=labels, cfg_scale=scale)

    assert not torch.allclose(draw(0, None), draw(1, None), atol=1e-3)
    assert not torch.allclose(draw(0, None), draw(0, 4.0), atol=1e-3)
    torch.testing.assert_close(draw(0, None), draw(0, 1.0), rtol=1e-3, atol=1e-3)


def test_images_are_upright_and_keep_their_16_bits_of_grey(tmp_path: Path) -> None:
    pixels = torch.randint(256, (16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    upright = np.stack([np.rot90(pixels, -1), pixels])
    got = read_images([str(tmp_path / "turned.png"), str(tmp_path / "deep.png")], (16, 16), 1)
    torch.testing.assert_close(got[:, 0], torch.from_numpy(upright / 127.5 - 1).float(), rtol=0, atol=1e-5)


def test_ddpm_draws_from_a_network_without_a_variance(tmp_path: Path) -> None:
    config = settings(learn_sigma=False)
    state = {"step": 1, "config": to_dict(config), "model": weights_of(config, 1)}
    checkpointing.save(tmp_path / "checkpoints", 1, state, keep=1)
    out = tmp_path / "out"
    assert sample.main(["--checkpoint", str(tmp_path), "--out", str(out), *QUICK, "--sampler", "ddpm"]) == 0
    assert (out / "clip_001.mp4").exists()


def test_an_interrupt_is_one_line(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "draw_clips", interrupted)
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), *QUICK])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "models.sample: stopped\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--checkpoint", "not.png"], "cannot read the checkpoint not.png: not a whole file of torch.save"),
        (["--checkpoint", "not.safetensors"], "cannot read the checkpoint not.safetensors: Error while deserializing"),
        (["--checkpoint", "tensor.pt"], "tensor.pt is no checkpoint: it must hold a dictionary, got Tensor"),
        (["--checkpoint", "other.pt"], "other.pt: unknown key modle"),
        (["--checkpoint", "."], "no checkpoint in .: wanted checkpoints/step_*.pt or export/model.safetensors"),
        (["--task", "image-to-video"], "--task image-to-video is given 1 of 8 frames: give --image"),
        (["--task", "image-to-video", "--image", "nowhere.png"], "cannot read the image nowhere.png: No such file"),
        (["--task", "image-to-video", "--image", "not.png"], "not.png is not an image"),
        (["--task", "image-to-video", "--clip", "not.mp4"], "not.mp4: "),
        (["--task", "image-to-video", "--clip", "nowhere.mp4"], "nowhere.mp4: cannot be"),
        (["--task", "interpolation", "--image", "a.png"], "--task interpolation is given 2 of 8 frames, got 1 image"),
        (["--image", "a.png"], "--task standard is given 0 of 8 frames: it takes no --image"),
        (["--task", "given-frames", "--image", "a.png"], "--task given-frames wants --given"),
        (["--task", "given-frames", "--given", "8", "--image", "a.png"], "index must"),
        (["--task", "transition", "--clip", "a.mp4"], "--task transition is given"),
        (["--class", "4"], "--class wants a number from 0 to 3, got 4"),
        (["--steps", "2000"], "--steps wants from 1 to 1000, got 2000"),
        (["--overlap", "4"], "--overlap is for --task long-video, got --task standard"),
        (["--given", "1"], "--given is for --task given-frames, got --task standard"),
        (["--task", "long-video", "--overlap", "8"], "--overlap wants from 1 to 7, got 8"),
        (["--cfg_scale", "inf"], "--cfg_scale wants a finite number, got inf"),
        (["--eta", "2"], "--eta wants from 0 to 1, got 2.0"),
        (["--seed", str(2**63)], f"--seed wants from 0 to {2**63 - 1}, got {2**63}"),
        (["--out", "not.png"], "--out not.png: File exists"),
        (["--num-clips", "0"], "--num_clips wants at least 1, got 0"),
        (["--chekpoint", "x"], "unknown option --chekpoint; the nearest is --checkpoint"),
        (["--task", "standrad"], "invalid choice 'standrad' for argument '--task'"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str],
    message: str,
    run_dir: Path,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), *QUICK, *argv])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"models.sample: error: {message}")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_clips_of_two_runs_do_not_mix(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """models.evaluate would take the leftovers of the longer run for clips of the shorter one."""
    argv = ["--checkpoint", str(run_dir), "--out", str(tmp_path), *QUICK]
    assert sample.main([*argv, "--num_clips", "3"]) == 0
    assert sample.main([*argv, "--num_clips", "3", "--seed", "1"]) == 0
    with pytest.raises(SystemExit):
        sample.main([*argv, "--num_clips", "2"])
    assert "holds 1 clips of another run (clip_002.mp4), which would stand among the 2" in capsys.readouterr().err
    assert sample.clip_names(1001)[::1000] == ["clip_0000", "clip_1000"]  # in the order of their names


def test_what_cannot_be_written_is_named_and_not_left(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sample, "write_gif", full)
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--checkpoint", str(run_dir), "--out", str(tmp_path), *QUICK])
    assert stopped.value.code == 2
    assert f"cannot write {tmp_path}/clip_000.gif: No space left on device\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["clip_000.mp4"]


def test_a_network_that_diverged_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"step": 1, "config": to_dict(settings()), "ema": weights_of(settings(), 1)}
    state["ema"]["final_layer.linear.bias"][0] = torch.nan
    path = checkpointing.save(tmp_path, 1, state, keep=1)
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--checkpoint", str(path), "--out", str(tmp_path / "out"), *QUICK])
    assert stopped.value.code == 2
    assert "clips hold NaN or infinity (0" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_checkpoint_of_another_size_names_keys_and_shapes(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.yaml").write_text(to_yaml(settings(hidden_size=128)))
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--checkpoint", str(run_dir), "--config", str(tmp_path / "other.yaml"), *QUICK])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("x_embedder.proj.weight", "(64, 3, 8, 8)", "(128, 3, 8, 8)"):
        assert part in said


def test_weights_of_other_code_want_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ema": weights_of(settings(), 1)}, tmp_path / "theirs.pt")
    with pytest.raises(SystemExit):
        sample.main(["--checkpoint", str(tmp_path / "theirs.pt"), *QUICK])
    assert "does not say how its network is made: give --config FILE.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(to_yaml(settings()))
    network, _ = load_network(tmp_path / "theirs.pt", config_file=str(tmp_path / "config.yaml"))
    assert torch.equal(network.final_layer.linear.bias, weights_of(settings(), 1)["final_layer.linear.bias"])


def test_a_latent_network_decodes_and_encodes_by_its_autoencoder(files: Path, tmp_path: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.5,
    )
    vae.save_pretrained(tmp_path / "vae")
    data = {"kind": "latents", "path": "latents", "vae": str(tmp_path / "vae")}
    config = from_dict(TrainConfig, {"model": {**MODEL, "in_channels": 4}, "data": data})
    codec = make_codec(config, None, torch.device("cpu"))
    assert (codec.frame_size, codec.channels) == ((2 * SIZE, 2 * SIZE), 3)

    pixels = read_clip(str(files / "a.mp4"), 2, 1, (2 * SIZE, 2 * SIZE), 3)
    latents = codec.encode(pixels)
    with torch.no_grad():
        torch.testing.assert_close(latents, vae.eval().encode(pixels).latent_dist.mean * 0.5)
        torch.testing.assert_close(codec.decode(latents), vae.decode(latents / 0.5).sample)

    state = {"step": 1, "config": to_dict(config), "model": weights_of(config, 1), "ema": weights_of(config, 2)}
    path, out = checkpointing.save(tmp_path / "checkpoints", 1, state, keep=1), tmp_path / "out"
    argv = ["--checkpoint", str(path), "--task", "image-to-video", "--image", str(files / "a.png")]
    assert sample.main([*argv, "--out", str(out), *QUICK]) == 0
    with av.open(str(out / "clip_000.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [image.shape for image in shown] == [(2 * SIZE, 2 * SIZE, 3)] * FRAMES

    other = from_dict(TrainConfig, {"model": MODEL, "data": data})
    with pytest.raises(ValueError, match="has 4 latent channels, the network 3"):
        make_codec(other, None, torch.device("cpu"))

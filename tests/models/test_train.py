"""The training step and what a run writes: values, not only files."""

import contextlib
import errno
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import train
from models.data.latents import INDEX, Entry, Index
from models.data.write import write_mp4
from models.latte import Latte
from models.training import checkpointing, draws, step
from models.training.data import Batches, on_device
from models.training.distributed import World
from models.training.ema import decay_at
from models.training.export import read_config
from models.training.optimizer import learning_rate, make_optimizer, rates_at, take_step
from tests.models.runs import config, newest, options, read_metrics
from vidkern.diffusion import sample_timesteps
from vidkern.ops import philox_normal

WORLD = World(0, 1, torch.device("cpu"))


def steps_of(run_dir: Path, count: int, **overrides: Any) -> tuple[step.Run, torch.Tensor]:
    """A run after `count` steps in this process, and the values that the steps returned, (count, 4)."""
    settings = config(run_dir, **overrides)
    run = step.make_run(settings, WORLD)
    batches = Batches(settings, WORLD).after(0)
    return run, torch.stack([step.train_step(run, *next(batches)) for _ in range(count)])


def plain_step(run: step.Run, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The mean squared error of an epsilon model, written independently."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
    a, s = (v.float().view(-1, 1, 1, 1, 1) for v in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    return ((run.model(a * x0 + s * noise, t) - noise) ** 2).mean()


def test_a_step_is_adamw_on_the_batch_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's unfused AdamW, a loss of our own, and clipping by hand, in three parts of unequal size."""
    overrides = {
        "model__learn_sigma": False,
        "batch_size": 7,
        "micro_batch_size": 3,
        "optim__max_grad_norm": 0.05,
        "optim__weight_decay": 0.1,
    }
    settings = config(tmp_path, **overrides)
    run = step.make_run(settings, WORLD)
    with torch.no_grad():  # a fresh model's output is 0 and most of its gradients too
        for i, parameter in enumerate(run.model.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    other = step.make_run(settings, WORLD)
    other.model.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.AdamW(
        [p for p in other.model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1, fused=False
    )
    drawn: list[torch.Tensor] = []

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(sample_timesteps(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(draws, "sample_timesteps", draw)
    batches = Batches(settings, WORLD).after(0)
    for _ in range(3):
        x0, conditions = next(batches)
        key = run.keys.state_dict()["key"]
        values = step.train_step(run, x0, conditions)
        loss = plain_step(other, x0, drawn[-1], philox_normal(x0.shape, key))
        loss.backward()
        trained = [p for p in other.model.parameters() if p.requires_grad]
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in trained))
        for p in trained:
            p.grad.mul_(0.05 / norm)
        optimizer.step()
        optimizer.zero_grad()
        assert values[0].item() == pytest.approx(loss.item(), rel=1e-5)
        assert norm > 0.05
        assert values[3].item() == pytest.approx(norm, rel=1e-4)
    for (name, a), b in zip(run.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=name)


def test_the_loss_does_not_depend_on_how_a_share_is_split(tmp_path: Path) -> None:
    _, whole = steps_of(tmp_path, 3)
    for size in (1, 3):
        _, parts = steps_of(tmp_path, 3, micro_batch_size=size)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [({"activation_checkpointing": True}, 1e-6), ({"precision": "bfloat16"}, 2e-2)],
    ids=["activation_checkpointing", "bfloat16"],
)
def test_options_of_speed_and_memory_keep_the_losses(
    overrides: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    _, plain = steps_of(tmp_path, 3)
    run, fast = steps_of(tmp_path, 3, **overrides)
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_compile_keeps_the_losses_and_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = steps_of(tmp_path, 2)
    quick = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(Latte, "compile", quick, raising=False)
    run, compiled = steps_of(tmp_path, 2, compile=True)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    assert not any("_orig_mod" in name for name in run.model.state_dict())


def test_ptss_gives_frames_steps_of_their_own(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    run, _ = steps_of(tmp_path, 1, diffusion__timesteps="ptss", diffusion__ptss_probability=1.0)
    run.model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    step.train_step(run, *next(Batches(run.config, WORLD).after(1)))
    assert seen[0].shape == (4, 4)
    assert len(set(seen[0].flatten().tolist())) > 8


@pytest.mark.parametrize(
    ("overrides", "noise_weight", "clip_weight"),
    [
        ({"diffusion__prediction": "epsilon", "diffusion__noise": "shared"}, 1, 0),
        ({"diffusion__prediction": "x0", "diffusion__schedule": "cosine"}, 0, 1),
        ({"diffusion__prediction": "flow", "diffusion__schedule": "flow", "model__learn_sigma": False}, 1, 1),
    ],
    ids=["epsilon", "x0", "flow"],
)
def test_a_fresh_network_misses_the_whole_target(
    overrides: dict[str, Any], noise_weight: int, clip_weight: int, tmp_path: Path
) -> None:
    """Its output is 0, so that the mean squared error is the target's mean square."""
    run = step.make_run(config(tmp_path, batch_size=16, **overrides), WORLD)
    x0, conditions = next(Batches(run.config, WORLD).after(0))
    mse = step.train_step(run, x0, conditions)[1].item()
    assert mse == pytest.approx(noise_weight + clip_weight * x0.square().mean().item(), rel=0.1)


class NoSynchronisation(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("timesteps", ["clip", "ptss"])
def test_a_step_never_waits_for_the_device(timesteps: str, tmp_path: Path) -> None:
    settings = config(tmp_path, model__num_classes=10, diffusion__timesteps=timesteps, optim__max_grad_norm=1.0)
    run = step.make_run(settings, WORLD)
    batches = Batches(settings, WORLD).after(0)
    step.train_step(run, *next(batches))
    batch = next(batches)
    with NoSynchronisation():
        values = step.train_step(run, *batch)
    assert torch.isfinite(values).all()


def test_the_next_batch_is_on_its_way_while_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose streams are written down here: batch i + 1 is copied before step i, and waited for after it."""
    done: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            done.append("wait")

    class Value:
        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: torch.device, non_blocking: bool) -> "Value":
            assert non_blocking
            done.append(f"copy {self.number}")
            return self

        def record_stream(self, stream: Stream) -> None:
            done.append(f"keep {self.number}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    loader: Any = ({"video": Value(i)} for i in range(3))
    batches: Any = on_device(loader, torch.device("cuda"))
    for batch in batches:
        done.append(f"step {batch['video'].number}")
    arrives = [
        ["copy 0", "wait", "keep 0"],
        ["copy 1", "step 0", "wait", "keep 1"],
        ["copy 2", "step 1", "wait", "keep 2"],
    ]
    assert done == [*itertools.chain(*arrives), "step 2"]


def test_ema_follows_its_equation(tmp_path: Path) -> None:
    """After three steps, with a decay that is still warming up at 2/11, 3/12 and 4/13."""
    run = step.make_run(config(tmp_path), WORLD)
    expected = {n: p.double() for n, p in run.ema.state_dict().items()}
    batches = Batches(run.config, WORLD).after(0)
    for decay in (2 / 11, 3 / 12, 4 / 13):
        step.train_step(run, *next(batches))
        weights = run.model.state_dict()
        expected = {n: decay * e + (1 - decay) * weights[n].double() for n, e in expected.items()}
    moved = [n for n, value in run.ema.state_dict().items() if not torch.equal(value, run.model.state_dict()[n])]
    assert len(moved) > 10
    for name, value in run.ema.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-8)
    assert torch.equal(run.ema.pos_embed, run.model.pos_embed)


def test_the_decay_warms_up_unless_it_is_told_not_to(tmp_path: Path) -> None:
    optim = config(tmp_path, optim__ema_decay=0.9999).optim
    assert [decay_at(optim, number) for number in (8, 89_990, 90_000)] == [0.5, 89_991 / 90_000, 0.9999]
    assert decay_at(config(tmp_path, optim__ema_decay=0.9999, optim__ema_warmup=False).optim, 1) == 0.9999


def test_the_learning_rate_warms_up_and_settings_reach_the_optimiser(tmp_path: Path) -> None:
    optim = config(tmp_path, optim__lr=2e-3, optim__warmup_steps=4, optim__weight_decay=0.5).optim
    assert [learning_rate(optim, number) for number in (1, 2, 4, 5)] == [5e-4, 1e-3, 2e-3, 2e-3]
    layer, ema = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    optimizer = make_optimizer(layer, ema, optim)
    layer(torch.ones(1, 2)).sum().backward()
    take_step(optimizer, optim, rates_at(optim, 2))
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["ema_decay"] == 3 / 12
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert layer.weight.grad is None


def test_clipping_begins_where_it_is_told(tmp_path: Path) -> None:
    optim = config(tmp_path, optim__max_grad_norm=1.0, optim__clip_from_step=5).optim
    for number, clipped in ((4, 3.0), (5, 1.0)):
        layer, ema = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False).requires_grad_(False)
        layer.weight.grad = torch.full((1, 1), 3.0)
        optimizer = make_optimizer(layer, ema, optim)
        assert take_step(optimizer, optim, rates_at(optim, number)).item() == 3.0
        mean = optimizer.state[layer.weight]["exp_avg"].item()
        assert mean == pytest.approx(0.1 * clipped, rel=1e-5)


def test_a_run_learns_and_leaves_what_its_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"steps": 150, "batch_size": 16, "log__every": 25, "log__checkpoint_every": 60, "log__keep": 2}
    samples = {"log__sample_every": 150, "log__sample_steps": 3, "log__sample_clips": 2}
    assert train.main(options(tmp_path, **settings, **samples, optim__lr=3e-3, model__num_classes=10)) == 0
    rows = read_metrics(tmp_path)
    mse = torch.tensor([row["mse"] for row in rows])
    assert mse[-30:].mean() < 0.8 * mse[:10].mean()

    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "export",
        "metrics.jsonl",
        "samples",
        "tensorboard",
    }
    names = [path.name for path in checkpointing.paths(tmp_path / "checkpoints")]
    assert names == ["step_00000120.pt", "step_00000150.pt"]
    state = newest(tmp_path)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == state["ema"].keys()
    assert all(torch.equal(exported[name], state["ema"][name]) for name in exported)
    assert read_config(tmp_path / "export" / "model.safetensors") == state["config"]

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == {row["step"]: pytest.approx(row["loss"]) for row in rows}
    assert {"train/grad_norm", "train/lr", "speed/clips_per_second", "speed/memory_GiB"} < set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]
    bar = capsys.readouterr().err
    assert "clips/s" in bar
    assert "GiB" in bar


def test_a_finished_run_says_so_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(options(tmp_path, steps=2)) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train.main(options(tmp_path, steps=2)) == 0
    assert "all 2 steps are done" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_diverging_run_stops_before_it_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(options(tmp_path, steps=9, optim__lr=1e30)) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1
    assert "nan" in said[0]
    assert "at step" in said[0]
    assert not list((tmp_path / "checkpoints").glob("*")) if (tmp_path / "checkpoints").exists() else True


def test_latents_are_scaled_windows_of_what_was_encoded(tmp_path: Path) -> None:
    mean = torch.randn(7, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "latents"
    folder.mkdir()
    save_file({"0.mean": mean, "0.std": torch.zeros_like(mean)}, folder / "shard.safetensors")
    index = Index(
        "vae", "", 0.5, 0.0, "float32", (32, 32), False, ["a"], [Entry("v", 0, 7, False, "shard.safetensors")]
    )
    (folder / INDEX).write_text(index.to_json())
    settings = config(tmp_path / "run", data__kind="latents", data__path=folder, model__in_channels=4)
    run = step.make_run(settings, WORLD)
    x0, conditions = next(Batches(settings, WORLD).after(0))
    for clip in x0:
        assert any(torch.equal(clip, 0.5 * mean[start : start + 4]) for start in range(4))
    assert step.train_step(run, x0, conditions)[1].item() == pytest.approx(1, rel=0.1)


def test_images_join_the_clips_of_videos(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(3):
        clip = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1
        write_mp4(videos / f"{i}.mp4", clip)
    argv = {"data__kind": "videos", "data__path": videos, "data__images": 2, "model__in_channels": 3, "steps": 2}
    seen: list[Any] = []
    run, values = steps_of(tmp_path / "run", 1, **argv)
    run.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].shape, kwargs)), with_kwargs=True
    )
    step.train_step(run, *next(Batches(run.config, WORLD).after(1)))
    assert seen == [((4, 6, 3, 16, 16), {"num_images": 2, "dropped": {}})]
    assert torch.isfinite(values).all()


def test_unreadable_files_are_counted_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_mp4(videos / "good.mp4", torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    (videos / "cut.mp4").write_bytes((videos / "good.mp4").read_bytes()[:400])
    (videos / "notes.txt").write_text("text")
    argv = options(tmp_path / "run", data__kind="videos", data__path=videos, model__in_channels=3, steps=2)
    assert train.main(argv) == 0
    assert "models.train: 2 video files, skipped: 1 unreadable, 1 not videos" in capsys.readouterr().err

    (videos / "good.mp4").unlink()
    with pytest.raises(SystemExit) as stopped:
        train.main([*argv, "--run_dir", str(tmp_path / "other")])
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith(f"models.train: error: {videos}: none of the 1 video files")
    )


def test_a_new_beginning_never_mixes_with_an_older_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(options(tmp_path, steps=3)) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train.main(options(tmp_path, resume="never"))
    assert stopped.value.code == 2
    assert "step_00000003.pt is further than step 0, where --resume never begins" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_takes_sample_clips_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train, "write_samples", full)
    assert train.main(options(tmp_path, steps=2, log__sample_every=1)) == 0
    assert "warning: no sample clips of step 1: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"device": "cuda"}, "--device cuda, but torch sees no CUDA device here"),
        ({"strategy": "fsdp"}, "--strategy fsdp shares the work of several processes: start it with torchrun"),
        ({"model__num_classes": 3}, "--model.num_classes 3, but the data has 10 classes"),
        ({"resume": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
        ({"data__kind": "videos", "data__path": "nowhere"}, "no folder, manifest or file of videos at nowhere"),
        ({"data__kind": "latents", "data__path": "nowhere"}, "no latents at nowhere"),
        ({"model__num_heads": 4}, "qkv must have a head size d of"),
        ({"model__in_channels": 2}, "channels must be 1 or 3, got 2"),
        ({"run_dir": "/dev/null/run"}, "cannot write /dev/null/run/config.yaml"),
    ],
)
def test_mistakes_are_one_line(
    overrides: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        train.main(options(**{"run_dir": tmp_path, **overrides}))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"models.train: error: {message}")
    assert said.count("\n") == 1


def test_more_processes_than_cores_work_and_are_warned_of(tmp_path: Path) -> None:
    """The documented command itself, held to one core."""

    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [*launcher, "-m", "models.train", *options(tmp_path, steps=2)],
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "warning" in line and "models.train" in line]
    assert warnings == ["models.train: warning: 2 processes share 1 CPU cores; more than 1 is slower"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["lr"] == 1e-3

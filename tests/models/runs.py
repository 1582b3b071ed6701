"""Tiny training runs, in this process or in children that can be killed at a chosen moment."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from models import train
from models.config import TrainConfig, parse_train_config
from models.training import checkpointing, metrics, step
from models.training.rng import seed_step

FILE_LIMIT = 60_000  # bytes: less than a checkpoint of a tiny run, more than its logs

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(  # what a run imports later
    [__name__, "sklearn.datasets", "torch._dynamo", "diffusers.models.unets.unet_2d_condition"]
)

#: Label dropout, PTSS, parts of unequal size, clipping and the rate's warm-up all take part.
EVERYTHING: dict[str, Any] = {
    "micro_batch_size": 3,
    "model__num_classes": 10,
    "model__class_dropout": 0.4,
    "diffusion__timesteps": "ptss",
    "diffusion__ptss_probability": 0.5,
    "optim__max_grad_norm": 0.1,
    "optim__warmup_steps": 5,
}


def options(run_dir: Path, **overrides: Any) -> list[str]:
    """The command line of a tiny run on digits; `a__b=c` is --a.b c, True and False are flags, a tuple its items."""
    values = {
        "run_dir": run_dir,
        "steps": 6,
        "batch_size": 4,
        "device": "cpu",
        "model__input_size": 16,
        "model__patch_size": 8,
        "model__in_channels": 1,
        "model__hidden_size": 64,
        "model__depth": 2,
        "model__num_heads": 2,
        "model__num_frames": 4,
        "data__workers": 0,
        "data__length": 10,
        "optim__lr": 1e-3,
        "optim__ema_decay": 0.9,
        "log__every": 2,
        "log__checkpoint_every": 3,
        **overrides,
    }
    argv = []
    for name, value in values.items():
        option = name.replace("__", ".")
        if isinstance(value, bool):
            parent, _, last = option.rpartition(".")
            argv.append(f"--{parent + '.' if parent else ''}{'' if value else 'no_'}{last}")
        else:
            argv += [f"--{option}", *map(str, value if isinstance(value, tuple) else [value])]
    return argv


def config(run_dir: Path, **overrides: Any) -> TrainConfig:
    return parse_train_config(options(run_dir, **overrides))


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def newest(run_dir: Path) -> dict[str, Any]:
    return torch.load(checkpointing.paths(run_dir / "checkpoints")[-1], weights_only=True)


def assert_same_state(a: Any, b: Any, path: str = "") -> None:
    """Two checkpoints are the same bit for bit, but for their run_dir."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"run_dir"}:
            assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


class Child:
    """A run in a process of its own."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        kill: tuple[str, int] | None = None,
        file_limit: int | None = None,
        env: dict[str, str] | None = None,
        own_draws: bool = False,
    ) -> None:
        """`kill`: an event of MOMENTS and which of its occurrences ends the process with SIGKILL.

        `own_draws` plants a fault: each process draws the whole batch's timesteps and drops from a seed of its own.
        """
        self.log = log
        self.process = _context.Process(
            target=_run, args=(list(argv), str(log), kill, file_limit, env or {}, own_draws)
        )
        self.process.start()

    def kill_after(self, seconds: float) -> None:
        """SIGKILL the process when it has run for so long, if it still does."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()

    def wait(self) -> int:
        """The exit status; -9 after SIGKILL."""
        self.process.join(240)
        assert self.process.exitcode is not None, "the run hangs"
        return self.process.exitcode

    @property
    def lines(self) -> list[str]:
        """What the run said, without the progress bar."""
        return [line for line in self.log.read_text().replace("\r", "\n").splitlines() if line.startswith("models.")]


def run_world(size: int, argv: Sequence[str], log: Path, **faults: Any) -> list[Child]:
    """Start `size` processes with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    ranks = [{**shared, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [Child(argv, log.with_suffix(f".{rank}"), env=env, **faults) for rank, env in enumerate(ranks)]


def _run(
    argv: list[str],
    log: str,
    kill: tuple[str, int] | None,
    file_limit: int | None,
    env: dict[str, str],
    own_draws: bool,
) -> None:
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    multiprocessing.set_start_method("fork", force=True)  # of loading workers, which then end with the run
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        if kill is not None:
            stack.enter_context(MOMENTS[kill[0]](kill[1]))
        if own_draws:
            stack.enter_context(mock.patch.object(step, "seed_step", _seed_by_rank))
        if file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
        sys.exit(train.main(argv))


def _seed_by_rank(generator: torch.Generator, seed: int, number: int, rank: int) -> None:
    seed_step(generator, seed + rank, number, rank)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(target: Any, name: str) -> Callable[[int], Any]:
    """Die instead of the n-th call of `target.name`."""

    def patch(n: int) -> Any:
        calls, original = iter(range(1, n + 1)), getattr(target, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == n:
                _die()
            return original(*args, **kwargs)

        return mock.patch.object(target, name, counted)

    return patch


def _in_the_middle_of_saving(n: int) -> Any:
    calls, original = iter(range(1, n + 1)), torch.save

    def save(state: Any, file: Any) -> None:
        if next(calls) < n:
            return original(state, file)
        whole = io.BytesIO()
        original(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        _die()

    return mock.patch.object(checkpointing.torch, "save", save)


def _in_the_middle_of_a_line(n: int) -> Any:
    calls, original = iter(range(1, n + 1)), metrics.JsonLines.sync

    def sync(self: metrics.JsonLines) -> None:
        if next(calls) < n:
            return original(self)
        data = "".join(self.waiting).encode()
        self.file.write(data[: len(data) // 2])
        _die()

    return mock.patch.object(metrics.JsonLines, "sync", sync)


MOMENTS: dict[str, Callable[[int], Any]] = {
    "in a step": _before(step, "take_step"),
    "while a checkpoint is written": _in_the_middle_of_saving,
    "before a checkpoint is renamed": _before(checkpointing.os, "replace"),
    "after a checkpoint is renamed": _before(checkpointing, "_sync_directory"),
    "while old checkpoints are deleted": _before(Path, "unlink"),
    "while metrics are written": _in_the_middle_of_a_line,
}

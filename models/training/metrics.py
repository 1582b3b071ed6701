"""What a run reports: metrics.jsonl, TensorBoard and the progress bar, read from the device now and then."""

import contextlib
import errno
import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.training.distributed import World, mean_over_world

NAMES = ("loss", "mse", "vb", "grad_norm")


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is NaN or infinite."""


class Metrics:
    """Collects the metrics of steps on the device and writes them out at `flush`.

    metrics.jsonl holds one object a step: {"step", "loss", "mse", "vb", "grad_norm", "lr"}. A run that goes on at
    step s keeps the lines up to s and writes on from there. Only the main process writes.
    """

    def __init__(self, run_dir: Path, world: World, start: int, steps: int, clips_per_step: int, every: int) -> None:
        """Go on after step `start` of `steps`; `every` is the most steps between two calls of `flush`."""
        self.world, self.step, self.clips_per_step = world, start, clips_per_step
        self.pending = torch.zeros(every, len(NAMES), device=world.device)
        self.rates: list[float] = []
        self.since = time.perf_counter()
        self.file = JsonLines(run_dir / "metrics.jsonl", start) if world.is_main else None
        self.board = Board(run_dir / "tensorboard", start) if world.is_main else None
        self.bar = tqdm(
            total=steps, initial=start, unit="step", disable=not world.is_main, mininterval=1, dynamic_ncols=True
        )

    def record(self, values: Tensor, lr: float) -> None:
        """Keep the metrics of the next step, a device tensor in the order of NAMES, without waiting for the device."""
        self.pending[len(self.rates)] = values
        self.rates.append(lr)
        self.step += 1
        self.bar.update()

    def flush(self) -> None:
        """Read the collected steps from the device and write them. Raises NonFiniteError at a NaN or infinite one."""
        count = len(self.rates)
        if not count:
            return
        rows = mean_over_world(self.pending[:count].clone()).tolist()
        first, now = self.step - count + 1, time.perf_counter()
        self._write(first, rows, clips_per_second=count * self.clips_per_step / (now - self.since))
        self.rates, self.since = [], now
        for step, row in enumerate(rows, first):
            if not all(map(math.isfinite, row)):
                values = ", ".join(f"{name} {value:g}" for name, value in zip(NAMES, row, strict=True))
                raise NonFiniteError(f"{values} at step {step}")

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave the time of this block out of the throughput."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def close(self) -> None:
        """Close the files and the bar."""
        self.bar.close()
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()

    def _write(self, first: int, rows: list[list[float]], clips_per_second: float) -> None:
        if self.file is None or self.board is None:
            return
        for step, (row, lr) in enumerate(zip(rows, self.rates, strict=True), first):
            values = dict(zip(NAMES, row, strict=True)) | {"lr": lr}
            self.file.write({"step": step} | values)
            self.board.scalars({f"train/{name}": value for name, value in values.items()}, step)
        self.file.sync()
        memory = memory_in_use(self.world.device)
        self.board.scalars({"speed/clips_per_second": clips_per_second, "speed/memory_GiB": memory}, self.step)
        self.bar.set_postfix_str(f"loss {rows[-1][0]:.4f}, {clips_per_second:.3g} clips/s, {memory:.2f} GiB")


class JsonLines:
    """An append-only file of JSON objects with a "step"; lines that a full disk refuses wait in memory."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open `path` and cut it after the line of `last_step`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.waiting: list[str] = []
        self.file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by close)
        self.file.seek(0)
        self.end = 0
        for line in self.file.read().splitlines(keepends=True):
            if not _is_up_to(line, last_step):
                break
            self.end += len(line)
        self.file.truncate(self.end)

    def write(self, values: dict[str, float]) -> None:
        """Append one object; `sync` puts it on the disk."""
        self.waiting.append(json.dumps(values) + "\n")

    def sync(self) -> None:
        """Put all lines on the disk, or keep them for the next time if they do not fit, and say so."""
        data = "".join(self.waiting).encode()
        try:
            if self.file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.file.fileno())
        except OSError as error:
            self.file.truncate(self.end)
            warn(f"cannot write {self.file.name}: {error.strerror}; the lines wait in memory")
        else:
            self.end += len(data)
            self.waiting = []

    def close(self) -> None:
        """Write what waits and close the file."""
        self.sync()
        self.file.close()


def _is_up_to(line: bytes, last_step: int) -> bool:
    """Whether a line is whole and of a step up to `last_step`."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last_step
    except (ValueError, TypeError, KeyError):
        return False


class Board:
    """TensorBoard's event file; a disk that is full ends it with a warning, not the run."""

    def __init__(self, directory: Path, start: int) -> None:
        """Go on after step `start`: later events of an earlier run disappear from view."""
        threading.excepthook = _leave_write_errors_to_the_caller
        self.writer: SummaryWriter | None = SummaryWriter(str(directory), purge_step=start + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add numbers under their names."""

        def add(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._until_full(add)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Add a uint8 image (H, W, 3)."""
        self._until_full(lambda writer: writer.add_image(name, image, step, dataformats="HWC"))

    def close(self) -> None:
        """Write what waits and close the file."""
        self._until_full(SummaryWriter.close)

    def _until_full(self, action: Callable[[SummaryWriter], None]) -> None:
        if self.writer is None:
            return
        try:
            action(self.writer)
        except OSError as error:
            warn(f"TensorBoard's log ends here: {error.strerror}")
            self.writer = None


def _leave_write_errors_to_the_caller(error: threading.ExceptHookArgs) -> None:
    """The writer's thread passes its OSError on to the next call of the writer: no traceback of the thread's own."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def say(message: str) -> None:
    """Print one line without disturbing the progress bar."""
    tqdm.write(f"models.train: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """Say that something went wrong that the run survives."""
    say(f"warning: {message}")


def memory_in_use(device: torch.device) -> float:
    """The peak memory of this process in GiB: the GPU's where it trains on one, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

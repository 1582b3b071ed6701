"""How a call is timed: on the host's clock, between CUDA events, or inside a replayed CUDA graph."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import vidkern

Call = Callable[[], object]
#: Times one call and returns a function that reads the seconds, to be called when every sample has been taken.
Clock = Callable[[Call], Callable[[], float]]

#: How long the GPU waits before each sample, so that the host has queued the whole call when it begins.
HEAD_START_CYCLES = 2_000_000


@dataclass(frozen=True)
class Timed:
    """One variant: its call on each of the rotating sets of buffers, and the backend it is forced to."""

    calls: Sequence[Call]
    backend: str | None = None


def host_clock(device: torch.device, repeat: int = 1) -> Clock:
    """Return a clock of the host's seconds for each of ``repeat`` calls: on a GPU, what queueing them costs."""

    def sample(call: Call) -> Callable[[], float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter_ns()
        for _ in range(repeat):
            call()
        seconds = (time.perf_counter_ns() - start) / 1e9 / repeat
        return lambda: seconds

    return sample


def event_clock(calls_in_one: int = 1) -> Clock:
    """Return a clock of the GPU's seconds, for calls that each do the work of ``calls_in_one``."""

    def sample(call: Call) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call()
        end.record()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / calls_in_one

        return read

    return sample


def captured(variant: Timed) -> Timed:
    """Return a variant whose one call replays the calls on every set of buffers from a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with vidkern.backend(variant.backend), torch.cuda.graph(graph):
        for call in variant.calls:
            call()
    return Timed([graph.replay])


def interleaved(variants: Mapping[str, Timed], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Return ``rounds`` samples of every variant, taken in turn, each on the next set of buffers.

    The order of a round is the last one's turned by one, so that no variant always follows the same other.
    """
    names = list(variants)
    readers: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    count = itertools.count()
    with _no_collection():
        for start in range(rounds):
            for i in range(len(names)):
                name = names[(start + i) % len(names)]
                calls = variants[name].calls
                with vidkern.backend(variants[name].backend):
                    readers[name].append(clock(calls[next(count) % len(calls)]))
        return {name: [read() for read in samples] for name, samples in readers.items()}


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

"""CUDA graphs: a step captured once and replayed, or run as it is with the reason logged."""

import functools
import warnings
from collections.abc import Callable, Iterator

import torch

from vidkern._dispatch import log

Step = Callable[[], None]

#: Graphs whose capture failed: torch's allocator still asks them which streams they capture.
_failed: list[torch.cuda.CUDAGraph] = []


def repeated(step: Step) -> Iterator[None]:
    """Take a step each time that one is asked for."""
    while True:
        step()
        yield


def replayed(step: Step, device: torch.device) -> Iterator[None]:
    """Take a step each time that one is asked for: two on a side stream, then replays of a CUDA graph of it.

    The first step compiles, tunes and allocates. The second is watched, since a capture that fails leaves torch's
    generator and allocator waiting for its end. Where there can be no graph, the reason is logged once and the steps
    are those of :func:`repeated`.

    Args:
        step: works on tensors of its own, in place, and asks the host for nothing: each call goes one step on.
        device: where those tensors lie.
    """
    reason = _obstacle(device)
    if reason is None:
        stream = torch.cuda.Stream(device)
        _beside(stream, step)
        yield
        reason = _watched(stream, step)
        yield
        if reason is None:
            graph = torch.cuda.CUDAGraph()
            reason = _capture(graph, stream, step)
            while reason is None:
                graph.replay()
                yield
    _tell(reason)
    yield from repeated(step)


def _obstacle(device: torch.device) -> str | None:
    """Return why there can be no graph on a device, or None."""
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if torch.cuda.is_current_stream_capturing():
        return "the stream is being captured already"
    return None


def _beside(stream: torch.cuda.Stream, step: Step) -> None:
    """Take a step on another stream, in its turn among the work of the current one."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        step()
    here.wait_stream(stream)


def _watched(stream: torch.cuda.Stream, step: Step) -> str | None:
    """Take a step, and return what in it waits for the device, which no graph can hold."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _beside(stream, step)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [w for w in caught if "a synchronizing CUDA operation" in str(w.message)]
    return f"the model waits for the device at {waits[0].filename}:{waits[0].lineno}" if waits else None


def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, step: Step) -> str | None:
    """Capture a step, which does not run; return why that failed, or None."""
    try:
        # a failed capture leaves its stream current: the outer block gives the caller's back
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            step()
    except Exception as error:
        _failed.append(graph)
        cause = error.__context__ or error  # the end of a broken capture raises on top of what broke it
        return f"the step cannot be captured: {type(cause).__name__}: {_first_line(cause)}"
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


@functools.cache
def _tell(reason: str) -> None:
    log.warning("graph=True, but no CUDA graph is used: %s", reason)

"""The most memory that a call holds at once, beyond what was held before it."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timers import Call


def peak_bytes(call: Call, device: torch.device) -> int:
    """Return the peak of torch's allocator on a CUDA device or the CPU during one call."""
    return _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)


def _cuda_peak(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(call: Call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    return noted_peak(profiled)


def noted_peak(profiled: profile) -> int:
    """Add up what a profiler with ``profile_memory`` noted: the CPU's allocator keeps no statistics."""
    recorded: Any = profiled.profiler
    events = (event for event in recorded.kineto_results.events() if event.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

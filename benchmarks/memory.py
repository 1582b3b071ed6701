"""The most memory that a call holds at once, beyond what was held before it."""

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
    """Add up what the profiler notes: the CPU's allocator keeps no statistics."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

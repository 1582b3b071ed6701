"""What the device can do at best, measured at the start of every run: a large copy and a large matrix product."""

import statistics
import time
from typing import Any

import torch

from benchmarks.timers import Clock, Timed, event_clock, host_clock, interleaved

ROUNDS = 30
#: For how long products run before the first sample, until the clocks have settled.
SETTLING_SECONDS = {"cuda": 1.5, "cpu": 0.1}


def measure_ceilings(device: torch.device) -> dict[str, Any]:
    """Return the copy's gigabytes per second (read + written) and the product's teraflops.

    A GPU copies 2 GiB and multiplies 8192^3 in bfloat16; a CPU copies 256 MiB and multiplies 1024^3 in float32.
    """
    on_gpu = device.type == "cuda"
    copied_bytes = 2**31 if on_gpu else 2**28
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    clock = event_clock() if on_gpu else host_clock(device)
    product = product_seconds(size, dtype, device, clock)
    copy = _copy_seconds(copied_bytes, device, clock)
    return {
        "copy_gigabytes_per_second": 2 * copied_bytes / copy / 1e9,
        "copied_bytes": copied_bytes,
        "product_teraflops": 2 * size**3 / product / 1e12,
        "product_size": size,
        "product_dtype": str(dtype).removeprefix("torch."),
    }


def product_seconds(size: int, dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    """Return the median time of a square product, once the clocks have settled."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    start = time.monotonic()
    while time.monotonic() - start < SETTLING_SECONDS[device.type]:
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return _median(lambda: torch.mm(a, b, out=out), clock)


def _copy_seconds(nbytes: int, device: torch.device, clock: Clock) -> float:
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return _median(lambda: target.copy_(source), clock)


def _median(call: Any, clock: Clock) -> float:
    return statistics.median(interleaved({"": Timed([call])}, clock, ROUNDS)[""])

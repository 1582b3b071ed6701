"""What a run was measured on: device, versions, clocks, power, commit and date."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def default_device() -> torch.device:
    """Return the GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the name that results are filed under, e.g. "nvidia-h200" or "cpu-amd-epyc"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {_cpu_model()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory: a GPU's L2, a CPU's L3 (32 MiB if unknown)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 32 * 2**20


def environment(device: torch.device) -> dict[str, Any]:
    """Return the record of the machine, the software and the moment, as it goes into a run's JSON."""
    record: dict[str, Any] = {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # of the minute before: what else ran here
        "cache_bytes": cache_bytes(device),
    }
    record |= {package: _version(package) for package in ("torch", "triton", "flash-attn")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "threads_a_multiprocessor": properties.max_threads_per_multi_processor,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": nvml(device, lambda pynvml, _: pynvml.nvmlSystemGetDriverVersion()),
        }
    return record | gpu_state(device)


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Return a GPU's clocks (MHz), power (W) and temperature (degrees C) now; nothing for a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "sm_mhz": nvml(device, lambda pynvml, gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)),
        "memory_mhz": nvml(device, lambda pynvml, gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM)),
        "watts": nvml(device, lambda pynvml, gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
        "celsius": nvml(device, lambda pynvml, gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
    }


def joules_used(device: torch.device) -> float | None:
    """Return the energy that the GPU has used since its driver was loaded, where it counts it."""
    return nvml(device, lambda pynvml, gpu: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000)


def nvml(device: torch.device, query: Callable[[Any, Any], Any]) -> Any:
    """Return ``query(pynvml, handle)`` for torch's device, or None where NVML does not answer."""
    import pynvml

    try:
        return query(pynvml, _nvml_handle(device))
    except pynvml.NVMLError:
        return None


@cache
def _nvml_handle(device: torch.device) -> Any:
    import pynvml

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(device).uuid
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def commit() -> str:
    """Return the short commit, with "-dirty" when tracked files differ from it, or "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty", "--abbrev=10"]
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()

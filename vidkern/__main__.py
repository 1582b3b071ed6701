"""`python -m vidkern doctor`: what is installed, which backend serves each operator here, and why not the others.

It also tells what each compiled CUDA kernel needs: registers, shared memory, and stack and spills.
"""

import argparse
import importlib.metadata
import platform
import sys

import torch

import vidkern
from vidkern import _dispatch, _extension, _library, _resources


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    lines = [f"cpu: {platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()},"
             f" {torch.get_num_threads()} threads"]  # fmt: skip
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"cuda:{i}: {properties.name}, sm_{properties.major}{properties.minor},"
            f" {properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )
    return lines if len(lines) > 1 else [*lines, "cuda: torch sees no CUDA device"]


def _environment() -> list[str]:
    versions = "  ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "flash-attn"))
    lines = [f"vidkern {vidkern.__version__}  python {platform.python_version()}  {versions}", *_devices()]
    lines += [reason or f"_C_{name}.so is loaded" for name, reason in _extension.missing.items()]
    if _extension.missing["cuda"] is None:
        lines.append(_resources.launched()[1] or "_C_info is loaded")
    forced = _dispatch.forced_backend()
    lines.append(f"backend: {forced} is forced by VIDKERN_BACKEND" if forced else "backend: automatic")
    return lines


def _table(device: str) -> list[str]:
    """Return one row an operator: who serves it on the device, and a numbered reason for each who cannot."""
    reasons: dict[str, int] = {}

    def cell(dispatcher: _dispatch.Dispatcher, backend: str) -> str:
        reason = dispatcher.why_not(backend, device)
        return "yes" if reason is None else f"[{reasons.setdefault(reason, len(reasons) + 1)}]"

    width = max(map(len, _library.operators)) + 2
    columns = "".join(f"{backend:<11}" for backend in _dispatch.BACKENDS)
    lines = [f"{f'on {device}':<{width}}{'served by':<11}{columns}".rstrip()]
    for name, dispatcher in sorted(_library.operators.items()):
        forced = _dispatch.forced_backend()
        order = (forced,) if forced else dispatcher.order(device)
        serving = next((backend for backend in order if dispatcher.why_not(backend, device) is None), "nothing")
        cells = "".join(f"{cell(dispatcher, backend):<11}" for backend in _dispatch.BACKENDS)
        lines.append(f"{name:<{width}}{serving:<11}{cells}".rstrip())
    return lines + [f"[{number}] {reason}" for reason, number in reasons.items()]


def _kernels() -> list[str]:
    """Return one row a CUDA kernel, over its instances: those for this GPU, or for every target where there is none."""
    kernels, reason = _resources.compiled()
    if reason is not None:
        return [f"CUDA kernels: {reason}"]
    if torch.cuda.is_available():
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
        kernels = [kernel for kernel in kernels if kernel.target.rstrip("af") == capability]
        if not kernels:
            return [f"CUDA kernels: none compiled for {capability}, so its driver compiles them from PTX"]
    rows = [("CUDA kernel", "target", "instances", "registers", "shared", "stack and spills")]
    for k in kernels:
        low, high = k.registers
        registers = str(high) if low == high else f"{low} to {high}"
        name = f"{k.source} {k.kernel}".strip()
        shared, local = f"{k.shared_bytes} B", f"{k.local_bytes} B"
        rows.append((name, k.target, str(k.instances), registers, shared, local))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return ["".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def doctor() -> str:
    """Return the report: versions, devices, compiled libraries, the operators on each device here, CUDA's kernels."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    sections = [_environment(), *(_table(device) for device in devices)]
    note = [
        "float64 tensors and shapes that a kernel does not take go to the next backend in turn;"
        " VIDKERN_LOG=dispatch tells for every call."
    ]
    return "\n\n".join("\n".join(section) for section in [*sections, note, _kernels()])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m vidkern", description=__doc__)
    parser.add_argument("command", choices=["doctor"])
    parser.parse_args()
    print(doctor())
    return 0


if __name__ == "__main__":
    sys.exit(main())

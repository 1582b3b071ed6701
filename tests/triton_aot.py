"""Compiles Triton kernels for GPUs that are not here, and reads what became of them.

Run as ``python -m tests.triton_aot MODULE FUNCTION TARGET...`` in a process without TRITON_INTERPRET: FUNCTION of
MODULE launches kernels as users would, on CPU tensors; what Triton would compile for a launch is compiled for every
target instead of run, once for all launches that it serves. Prints one JSON list.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """What one multiprocessor of a compute capability holds, and a block's share of its shared memory."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536
    shared_bytes_a_block: int = 1024  # the system's


TARGETS = {80: Gpu(64, 32, 164 * 1024), 86: Gpu(48, 16, 100 * 1024), 90: Gpu(64, 32, 228 * 1024)}


def report(module: str, function: str, targets: Iterable[int] = TARGETS) -> list[dict[str, Any]]:
    """Compile in a fresh process; return a dict for each specialisation and target: kernel, target, launches, ..."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_aot", module, function, *map(str, targets)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def resident_warps(target: int, registers: int, shared_bytes: int, warps: int) -> int:
    """Return how many warps a multiprocessor holds; each of its quarters gives out registers in eights a thread."""
    gpu = TARGETS[target]
    by_registers = 4 * (gpu.registers // 4 // (-(-registers // 8) * 8 * 32)) // warps
    by_shared = gpu.shared_bytes // (shared_bytes + gpu.shared_bytes_a_block)
    return warps * min(by_registers, by_shared, gpu.blocks, gpu.warps // warps)


class Launches:
    """What Triton would compile for one target, each specialisation once, by Triton's own rules."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend

        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.found: dict[Any, tuple[Any, dict[str, Any]]] = {}  # (source, options) by Triton's cache key
        self.count: Counter[Any] = Counter()

    def add(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from triton.compiler import ASTSource
        from triton.runtime.jit import compute_cache_key, create_function_from_signature

        binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = binder(*args, **kwargs)
        key = kernel, compute_cache_key({}, specialization, options)
        self.count[key] += 1
        if key not in self.found:
            parsed, *source = kernel._pack_args(self.backend, kwargs, bound, specialization, options)
            self.found[key] = ASTSource(kernel, *source), parsed.__dict__

    def facts(self) -> list[dict[str, Any]]:
        return [
            {
                "kernel": source.fn.__name__,
                "target": self.target.arch,
                "launches": self.count[key],
                "constants": _named_constants(source),
                "types": source.signature,
                **self._compile(source, options),
            }
            for key, (source, options) in self.found.items()
        ]

    def _compile(self, source: Any, options: dict[str, Any]) -> dict[str, Any]:
        import triton

        compiled = triton.compile(source, target=self.target, options=options)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            Path(cubin.name).write_bytes(compiled.asm["cubin"])
            usage = subprocess.run(
                [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack, local = (int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
        ptx = compiled.asm["ptx"]
        copies = re.findall(r"cp\.async\.c[ag]\..*, (0x\w+)", ptx)  # bytes a thread
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        return {
            "warps": warps,
            "registers": registers,
            "local_bytes": stack + local,
            "shared_bytes": shared,
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
            "half_wide_loads": len(re.findall(r"ld\.global\S*\.v2\.b32", ptx)),
            "wide_copies": copies.count("0x10"),
            "narrow_copies": len(copies) - copies.count("0x10"),
            "fused": len(re.findall(r"\bfma\.", ptx)),  # multiply-adds
            "products": sorted(set(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\S*", ptx))),
            "resident_warps": resident_warps(self.target.arch, registers, shared, warps),
        }


def _named_constants(source: Any) -> dict[str, Any]:
    names = [parameter.name for parameter in source.fn.params]
    return {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1 and value is not None}


def _main(module: str, function: str, *targets: str) -> None:
    from triton.runtime.jit import JITFunction

    launches = [Launches(int(target)) for target in targets]

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for target in launches:
            target.add(kernel, args, kwargs)

    JITFunction.run = compile_instead
    getattr(importlib.import_module(module), function)()
    print(json.dumps([fact for target in launches for fact in target.facts()]))


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Compiles Triton kernels for GPUs that are not here, and reads what became of them.

Run as ``python -m tests.triton_aot MODULE FUNCTION`` in a process without TRITON_INTERPRET: FUNCTION of MODULE launches
kernels as users would, on CPU tensors; every launch is compiled for every target instead of run. Prints one JSON list.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

TARGETS = (80, 86, 90)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


def report(module: str, function: str) -> list[dict[str, Any]]:
    """Compile in a fresh process; return a dict for each launch and target: kernel, target, registers, ..."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_aot", module, function]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _source(kernel: Any, arguments: dict[str, Any]) -> Any:
    """Return the source that Triton would compile for these arguments, with its own specialisation rules."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = "*" + DTYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        else:
            signature[parameter.name], aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if aligned and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _facts(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], capability: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(_source(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    return {
        "kernel": kernel.__name__,
        "target": capability,
        "constants": {key: value for key, value in arguments.items() if key.isupper()} | options,
        "registers": registers,
        "local_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])),
    }


def _main(module: str, function: str) -> None:
    from triton.runtime.jit import JITFunction

    facts = []

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        options = {key: value for key, value in kwargs.items() if key not in names}
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        facts.extend(_facts(kernel, arguments, options, capability) for capability in TARGETS)

    JITFunction.run = compile_instead
    getattr(importlib.import_module(module), function)()
    print(json.dumps(facts))


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Finds and loads the compiled libraries (_C_cpu.so, _C_cuda.so) beside this file."""

import os
from pathlib import Path

import torch

_HERE = Path(__file__).parent


def _load(name: str, needs_cuda: bool) -> str | None:
    """Load one library of operators; return None, or in one sentence why it is not loaded."""
    path = _HERE / f"_C_{name}.so"
    if not path.exists():
        return f"{path.name} is not built (python setup.py build_ext --inplace builds it)"
    if needs_cuda and not torch.cuda.is_available():
        return f"{path.name} is not loaded: torch sees no CUDA device"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    return None


#: For each compiled library, None when it is loaded, else the reason why it is not.
missing: dict[str, str | None] = {
    "cpu": _load("cpu", needs_cuda=False),
    "cuda": _load("cuda", needs_cuda=True),
}


def find(library: str, operator: str) -> tuple[torch._ops.OpOverload | None, str | None]:
    """Return (operator, None) from a compiled library, or (None, reason) when it is not to be had."""
    reason = missing[library]
    if reason is not None:
        return None, reason
    packet = getattr(getattr(torch.ops, f"vidkern_{library}"), operator, None)
    if packet is None:
        return None, f"not in _C_{library}.so"
    return packet.default, None


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"

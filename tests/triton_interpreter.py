"""Runs Triton kernels on the CPU, and quickly enough for tests."""

import os
from typing import Any

import torch


def enable() -> None:
    """Choose the interpreter, before the first kernel is defined."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    prepare_and_call = InterpretedFunction.__call__
    prepared = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a device function; the launch has prepared triton.language for all but Triton's own, which keep it."""
        module = function.fn.__module__
        if module.startswith("triton.") and module not in prepared:
            prepared.add(module)
            return prepare_and_call(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
    InterpreterBuilder.create_fp_trunc = _round


def _round(builder: Any, source: Any, to: Any) -> Any:
    """Round to nearest even: the interpreter cuts bfloat16's last bits off."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
        return builder.cast_impl(source, to)
    rounded = torch.tensor(source.data).to(torch.bfloat16).view(torch.uint16)
    return TensorHandle(rounded.numpy(), tl.bfloat16)

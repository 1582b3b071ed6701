"""Which backend serves a call: the automatic choice, forcing one, and the log that tells."""

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vidkern import _extension

#: Every backend by name, and what it is.
BACKENDS = {
    "reference": "the definition in plain PyTorch, any device and dtype",
    "cpu": "compiled C++ (or the best CPU library)",
    "triton": "Triton kernels",
    "cuda": "compiled CUDA C++ (or the best CUDA library)",
}

#: The automatic choice for a device: the first of these that can take the call.
AUTOMATIC: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

NOT_WRITTEN = "not written for this operator"

log = logging.getLogger("vidkern")


class BackendError(RuntimeError):
    """A forced backend cannot serve the call; the message says why."""


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of an operator.

    ``supports`` gets the operator's arguments and returns None, or in one sentence why it cannot take them.
    ``unavailable`` is the reason why the implementation cannot run on this machine at all; ``run`` is then not called.
    """

    run: Callable[..., Any]
    supports: Callable[..., str | None]
    unavailable: str | None = None


def _unreachable(*_: Any) -> Any:
    raise BackendError("this kernel is not available here")


def compiled(library: str, operator: str, supports: Callable[..., str | None]) -> Kernel:
    """Return the kernel that a compiled library ("cpu" or "cuda") holds under the operator's own name."""
    run, reason = _extension.find(library, operator)
    return Kernel(run or _unreachable, supports, reason)


def triton_kernel(module: str, operator: str, supports: Callable[..., str | None]) -> Kernel:
    """Return the kernel that a family's triton_kernels module holds under the operator's own name."""
    reason = _triton_unavailable()
    if reason is not None:
        return Kernel(_unreachable, supports, reason)
    run = getattr(importlib.import_module(module), operator, None)
    return Kernel(run or _unreachable, supports, None if run else NOT_WRITTEN)


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or _extension.interpreting():
        return None
    return "torch sees no CUDA device (TRITON_INTERPRET=1 runs Triton kernels on the CPU, slowly)"


def _runs_on(backend: str, device: str) -> bool:
    if backend == "reference":
        return True
    if backend == "triton":
        return device == "cuda" or (device == "cpu" and _extension.interpreting())
    return backend == device


_forced: str | None = None


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Serve every operator called inside the block by one backend; None gives back the automatic choice.

    The setting is the process's, not the thread's, so that the backward pass (which runs on autograd's own
    threads) obeys it too. A call which that backend cannot take raises :class:`BackendError` and says why.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: no such backend.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> str | None:
    """Return the backend that is forced now, or None."""
    return _forced


class Dispatcher:
    """An operator's implementation: hands each call to the backend that serves it."""

    def __init__(
        self,
        name: str,
        kernels: Mapping[str, Kernel],
        device_argument: int,
        order: Mapping[str, tuple[str, ...]] | None = None,
        prefer: Callable[..., str | None] | None = None,
    ) -> None:
        """``device_argument`` is the position of the tensor whose device decides; ``order`` replaces AUTOMATIC.

        ``prefer`` names, for the operator's arguments, the backend that is asked before the others, or None.
        """
        self.name = name
        self.kernels = dict(kernels)
        self._device_argument = device_argument
        self._prefer = prefer
        self._order = {**AUTOMATIC, **(order or {})}
        self._candidates = {
            device: [(candidate, self.kernels[candidate]) for candidate in candidates if candidate in self.kernels]
            for device, candidates in self._order.items()
        }
        self._reference = [("reference", self.kernels["reference"])] if "reference" in self.kernels else []

    def __call__(self, *args: Any) -> Any:
        tensor = args[self._device_argument]
        device = "cpu" if tensor.is_cpu else tensor.device.type  # `device.type` alone takes 0.3 us
        if _forced is not None:
            return self._serve_forced(_forced, device, args)
        candidates = self._candidates.get(device, self._reference)
        if self._prefer is not None:
            first = self._prefer(*args)
            candidates = sorted(candidates, key=lambda candidate: candidate[0] != first)
        for candidate, kernel in candidates:
            reason = kernel.unavailable or kernel.supports(*args)
            if _log_dispatch:
                tell(f"{self.name} on {device}: " + (f"not {candidate}: {reason}" if reason else candidate))
            if reason is None:
                return kernel.run(*args)
        raise BackendError(f"no backend serves {self.name} on {device}")

    def order(self, device: str) -> tuple[str, ...]:
        """Return the backends in the order in which they are asked for a device."""
        return self._order.get(device, ("reference",))

    def why_not(self, candidate: str, device: str) -> str | None:
        """Return None when the backend can run on the device, else the reason (before any argument is seen)."""
        kernel = self.kernels.get(candidate)
        if kernel is None:
            return NOT_WRITTEN
        if kernel.unavailable is not None:
            return kernel.unavailable
        return None if _runs_on(candidate, device) else f"does not run on {device} tensors"

    def _serve_forced(self, name: str, device: str, args: tuple[Any, ...]) -> Any:
        reason = self.why_not(name, device) or self.kernels[name].supports(*args)
        if reason is not None:
            raise BackendError(f"backend {name!r} is forced, but cannot serve {self.name} on {device}: {reason}")
        if _log_dispatch:
            tell(f"{self.name} on {device}: {name} (forced)")
        return self.kernels[name].run(*args)


_told: set[str] = set()


def tell(message: str) -> None:
    """Write a line about how a call is served to the dispatch log (VIDKERN_LOG=dispatch), once."""
    if _log_dispatch and message not in _told:
        _told.add(message)
        log.info(message)


def _setting(variable: str) -> str | None:
    return os.environ.get(variable) or None


def _start_log() -> bool:
    """Obey VIDKERN_LOG: a comma-separated list of subjects; "dispatch" is the one there is."""
    subjects = [s.strip() for s in (_setting("VIDKERN_LOG") or "").split(",") if s.strip()]
    unknown = [s for s in subjects if s != "dispatch"]
    if unknown:
        raise ValueError(f"VIDKERN_LOG must be 'dispatch' or unset, got {unknown[0]!r}")
    if subjects and not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("vidkern: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    return bool(subjects)


try:
    _forced = _checked(_setting("VIDKERN_BACKEND"))
except ValueError as error:
    raise ValueError(f"VIDKERN_BACKEND: {error}") from None
_log_dispatch = _start_log()

"""Fused operators that make video diffusion transformers train and sample faster."""

from vidkern import diffusion, integrations, nn, ops, optim, rng
from vidkern._dispatch import BackendError, backend
from vidkern.integrations import patch, unpatch
from vidkern.version import __version__

__all__ = [
    "BackendError",
    "__version__",
    "backend",
    "diffusion",
    "integrations",
    "nn",
    "ops",
    "optim",
    "patch",
    "rng",
    "unpatch",
]

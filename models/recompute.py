"""Activation checkpointing: a part of a network that the backward pass computes again, whole or where it is cheap."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

#: "all": a part's inputs are kept. "cheap": so are the results of matrix products, convolutions and attention.
Recompute = Literal["all", "cheap"]

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


def checkpointed(part: Callable[..., Any], *inputs: Any, recompute: Recompute, **options: Any) -> Any:
    """Call a part of a network, which has no random numbers, so that the backward pass computes it again.

    With "cheap" norms, modulations, gates, activations and casts are what is computed again: memory for bytes, not for
    FLOPs (selective checkpointing, Korthikanti et al. 2022).
    """
    if recompute == "cheap":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_dear)
    return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_dear(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    """Keep what an operator returns if it is dear to compute."""
    name = operator.name().partition("::")[2].partition(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
    dear = name in _PRODUCTS or "conv" in name or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE

"""A name for weights: what was made with them is known by it."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def sha256_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of a state dict's names and of its values' bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

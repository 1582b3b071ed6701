"""A training step captured into a CUDA graph and replayed on inputs that are copied to where it reads them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from models.training.draws import Draws
from models.training.optimizer import Rates
from vidkern.diffusion import graphs

for _kind in (Draws, Rates):
    pytree.register_dataclass(_kind)


class GraphedStep:
    """A function of tensors and numbers that is captured once for each shape of its tensors.

    Its first two calls for a shape run as they are; see `vidkern.diffusion.graphs.replayed`. What it changes (weights,
    the optimiser's state, the noise key) must lie on the device and change in place.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        """`function` takes a tree of tensors and of numbers, these as float64 () tensors, and waits for nothing."""
        self.function, self.device = function, device
        self._of_shape: dict[Any, _Static] = {}

    def __call__(self, *inputs: Any) -> Tensor:
        """What the function returns for these inputs; the next call writes over it."""
        leaves, tree = pytree.tree_flatten(inputs)
        shapes = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves)
        if shapes not in self._of_shape:
            self._of_shape[shapes] = _Static(self.function, leaves, tree, self.device)
        return self._of_shape[shapes](leaves)


class _Static:
    """The inputs of one shape where the graph reads them, and the graph."""

    def __init__(
        self, function: Callable[..., Tensor], leaves: list[Any], tree: pytree.TreeSpec, device: torch.device
    ) -> None:
        self.function, self.tree = function, tree
        self.inputs = [
            torch.empty_like(leaf) if isinstance(leaf, Tensor) else torch.empty((), dtype=torch.float64, device=device)
            for leaf in leaves
        ]
        self.result = torch.empty(0)
        self.turns: Iterator[None] = graphs.replayed(self._step, device)

    def __call__(self, leaves: list[Any]) -> Tensor:
        for static, leaf in zip(self.inputs, leaves, strict=True):
            if isinstance(leaf, Tensor):
                static.copy_(leaf)
            else:
                static.fill_(leaf)
        next(self.turns)
        return self.result

    def _step(self) -> None:
        self.result = self.function(*pytree.tree_unflatten(self.inputs, self.tree))

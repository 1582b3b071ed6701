"""Optical flow by RAFT (Teed and Deng 2020) as torchvision implements it, with weights from a file."""

from pathlib import Path

import torch
from torch import Tensor

from models.data.frames import to_float
from models.digest import sha256_of
from models.training.checkpointing import load

_PAIRS = 8  # frames in one call of the network


class Raft:
    """torchvision's raft_large or raft_small, whichever the weights are of."""

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        """`weights`: a state dict such as raft_large_C_T_SKHT_V2-ff5fadd5.pth of torchvision's model zoo.

        Raises ValueError or OSError, in one line, where torchvision cannot be imported or the file holds no RAFT.
        """
        try:
            from torchvision.models.optical_flow import raft_large, raft_small
        except (ImportError, RuntimeError) as error:  # its operators may not fit this torch
            raise ValueError(f"the extractor raft needs torchvision, which cannot be imported: {error}") from error
        state = load(Path(weights))
        large = any(name.startswith("mask_predictor.") for name in state)
        network = (raft_large if large else raft_small)(weights=None)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{weights} does not hold the weights of torchvision's RAFT") from error
        self.identity = f"raft_{'large' if large else 'small'} {sha256_of(state)}"
        self._network, self._device = network.to(device).eval().requires_grad_(False), device

    @torch.inference_mode()
    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        """See models.motion.extract.Extractor."""
        pairs = zip(source.split(_PAIRS), target.split(_PAIRS), strict=True)
        flows = [self._network(to_float(a.to(self._device)), to_float(b.to(self._device)))[-1].cpu() for a, b in pairs]
        return torch.cat(flows)

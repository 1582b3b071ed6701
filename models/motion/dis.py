"""Optical flow on the CPU by OpenCV's dense inverse search (Kroeger et al. 2016)."""

import cv2
import numpy as np
import torch
from torch import Tensor


class DenseInverseSearch:
    """OpenCV's DIS at its medium preset, which ends at half the frames' size and interpolates the rest."""

    identity = "dis, medium"

    def __init__(self) -> None:
        """Without arguments: OpenCV carries all there is."""
        self._search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        """See models.motion.extract.Extractor."""
        pairs = zip(_grey(source), _grey(target), strict=True)
        flows = [
            self._search.calc(a, b, np.zeros((*a.shape, 2), np.float32)) for a, b in pairs
        ]  # starts from rest, whatever came before
        return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)


def _grey(frames: Tensor) -> list[np.ndarray]:
    return [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()]

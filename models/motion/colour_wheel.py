"""Flow as a picture: the direction is a hue of Middlebury's colour wheel, the length its saturation."""

import math

import numpy as np
import torch
from torch import Tensor

# The wheel of Baker et al. 2007, "A database and evaluation methodology for optical flow": 55 hues, unevenly spaced
# since the eye tells more of them apart between some of the six corners than between others.
_CORNERS = (0, 15, 21, 25, 36, 49, 55)  # red, yellow, green, cyan, blue, magenta, and red again
_RED = (1, 1, 0, 0, 0, 1, 1)
_GREEN = (0, 1, 1, 1, 0, 0, 0)
_BLUE = (0, 0, 0, 1, 1, 1, 0)
_LAST_HUE = 54
_BEYOND = 0.75  # brightness of what is longer than the unit


def colour_wheel(flow: Tensor, unit: float | None = None) -> Tensor:
    """RGB float32 (..., 3, H, W) in [-1, 1], as a video, of flow (..., 2, H, W) in pixels.

    Red points right, yellow down, blue-green left, violet up; white is rest, and full colour a flow of `unit` pixels:
    by default the longest flow there is. Longer ones are darker. Raises ValueError for another shape or a unit that is
    not positive.
    """
    if flow.ndim < 3 or flow.shape[-3] != 2:
        raise ValueError(f"flow must be (..., 2, H, W), got {tuple(flow.shape)}")
    if unit is not None and not unit > 0:
        raise ValueError(f"unit must be positive, got {unit}")
    dx, dy = flow.detach().cpu().double().unbind(-3)
    length = torch.hypot(dx, dy)
    length = length / (unit or length.max().clamp_min(torch.finfo(length.dtype).tiny))
    turn = torch.atan2(dy, dx).remainder(2 * math.pi) / (2 * math.pi)  # clockwise from the right, [0, 1)
    hue = turn.numpy() * _LAST_HUE
    wheel = torch.stack([torch.from_numpy(np.interp(hue, _CORNERS, c)) for c in (_RED, _GREEN, _BLUE)], dim=-3)
    length = length.unsqueeze(-3)
    colour = torch.where(length <= 1, 1 - length * (1 - wheel), _BEYOND * wheel)
    return (2 * colour - 1).float()

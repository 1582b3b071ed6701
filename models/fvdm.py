"""FVDM (Liu et al. 2024): Latte's network with one timestep for each frame."""

import re
from typing import Any

from models.latte import Latte, published_config

_BLOCK = re.compile(r"^blocks_(spatial|temp)\.(\d+)\.")


def fvdm(name: str, **overrides: Any) -> Latte:
    """Build a published size, e.g. ``fvdm("FVDM-XL/2")``; call it with t of shape (B, F).

    Args:
        name: "FVDM-<S, B, L or XL>/<patch size 2, 4 or 8>".
        overrides: other fields of :class:`models.latte.LatteConfig`.
    """
    return Latte(published_config("FVDM", name, **overrides))


def latte_name(key: str) -> str:
    """Return the name here of a parameter of the public FVDM, which keeps spatial and temporal blocks apart.

    ``blocks_spatial.{i}`` is ``blocks.{2i}``, ``blocks_temp.{i}`` is ``blocks.{2i + 1}``.
    """
    return _BLOCK.sub(lambda block: f"blocks.{2 * int(block[2]) + (block[1] == 'temp')}.", key)

"""Patches for models that users already have: found by `patch`, or one class at a time."""

from vidkern.integrations.cogvideox import apply_vidkern_to_cogvideox
from vidkern.integrations.cogvideox_vae import apply_vidkern_to_cogvideox_vae
from vidkern.integrations.known import patch
from vidkern.integrations.latte import apply_vidkern_to_latte
from vidkern.integrations.official_latte import apply_vidkern_to_official_latte
from vidkern.integrations.patching import Report, unpatch
from vidkern.integrations.skyreels_v2 import apply_vidkern_to_skyreels_v2
from vidkern.integrations.wan import apply_vidkern_to_wan
from vidkern.integrations.wan_vae import apply_vidkern_to_wan_vae

__all__ = [
    "Report",
    "apply_vidkern_to_cogvideox",
    "apply_vidkern_to_cogvideox_vae",
    "apply_vidkern_to_latte",
    "apply_vidkern_to_official_latte",
    "apply_vidkern_to_skyreels_v2",
    "apply_vidkern_to_wan",
    "apply_vidkern_to_wan_vae",
    "patch",
    "unpatch",
]

"""Patches for models that users already have: found by `patch`, or one class at a time."""

from vidkern.integrations.known import patch
from vidkern.integrations.patching import Report, unpatch
from vidkern.integrations.wan_vae import apply_vidkern_to_wan_vae

__all__ = ["Report", "apply_vidkern_to_wan_vae", "patch", "unpatch"]

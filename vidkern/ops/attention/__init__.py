"""Attention over a clip's frames, the tokens of a frame, both, or parts of them."""

from vidkern.ops.attention.composed import axial_attention, local_global_attention
from vidkern.ops.attention.op import joint_attention, spatial_attention, temporal_attention

__all__ = [
    "axial_attention",
    "joint_attention",
    "local_global_attention",
    "spatial_attention",
    "temporal_attention",
]

"""The operators, one sub-package per family."""

from vidkern.ops.attention import (
    axial_attention,
    joint_attention,
    local_global_attention,
    spatial_attention,
    temporal_attention,
)
from vidkern.ops.modulation import (
    gate_residual,
    gate_residual_modulate,
    gate_residual_rms_modulate,
    layer_norm_modulate,
    rms_norm_modulate,
)

__all__ = [
    "axial_attention",
    "gate_residual",
    "gate_residual_modulate",
    "gate_residual_rms_modulate",
    "joint_attention",
    "layer_norm_modulate",
    "local_global_attention",
    "rms_norm_modulate",
    "spatial_attention",
    "temporal_attention",
]

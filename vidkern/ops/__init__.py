"""The operators, one sub-package per family."""

from vidkern.ops.modulation import (
    gate_residual,
    gate_residual_modulate,
    gate_residual_rms_modulate,
    layer_norm_modulate,
    rms_norm_modulate,
)

__all__ = [
    "gate_residual",
    "gate_residual_modulate",
    "gate_residual_rms_modulate",
    "layer_norm_modulate",
    "rms_norm_modulate",
]

"""Fused norm, per-frame modulation, gate and residual (adaLN-Zero)."""

from vidkern.ops.modulation.op import (
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

"""The operators, one sub-package per family."""

from vidkern.ops.activation import gelu_mlp, gelu_tanh
from vidkern.ops.attention import (
    axial_attention,
    joint_attention,
    local_global_attention,
    spatial_attention,
    temporal_attention,
)
from vidkern.ops.conv3d import causal_conv3d, causal_conv3d_stream, norm_silu_pad, upsample_conv, upsample_phases
from vidkern.ops.embedding import timestep_embedding
from vidkern.ops.modulation import (
    gate_residual,
    gate_residual_modulate,
    gate_residual_rms_modulate,
    layer_norm_modulate,
    rms_norm_modulate,
)
from vidkern.ops.noise import add_noise, diffusion_mse, hybrid_loss, philox_normal
from vidkern.ops.optimizer import adamw_ema_
from vidkern.ops.sampling import ddim_step, ddpm_step, flow_step

__all__ = [
    "adamw_ema_",
    "add_noise",
    "axial_attention",
    "causal_conv3d",
    "causal_conv3d_stream",
    "ddim_step",
    "ddpm_step",
    "diffusion_mse",
    "flow_step",
    "gate_residual",
    "gate_residual_modulate",
    "gate_residual_rms_modulate",
    "gelu_mlp",
    "gelu_tanh",
    "hybrid_loss",
    "joint_attention",
    "layer_norm_modulate",
    "local_global_attention",
    "norm_silu_pad",
    "philox_normal",
    "rms_norm_modulate",
    "spatial_attention",
    "temporal_attention",
    "timestep_embedding",
    "upsample_conv",
    "upsample_phases",
]

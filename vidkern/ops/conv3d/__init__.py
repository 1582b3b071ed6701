"""Causal 3D convolution, whole or in a stream, the norm and SiLU before it, and the one after an upsampling."""

from vidkern.ops.conv3d.op import causal_conv3d, causal_conv3d_stream, norm_silu_pad
from vidkern.ops.conv3d.upsample import upsample_conv, upsample_phases

__all__ = ["causal_conv3d", "causal_conv3d_stream", "norm_silu_pad", "upsample_conv", "upsample_phases"]

"""Causal 3D convolution, whole or in a stream, and the norm and SiLU before it."""

from vidkern.ops.conv3d.op import causal_conv3d, causal_conv3d_stream, norm_silu_pad

__all__ = ["causal_conv3d", "causal_conv3d_stream", "norm_silu_pad"]

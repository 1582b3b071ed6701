"""The activation family: GELU (tanh form), and the MLP around it that keeps only what it was given and GELU's input."""

from vidkern.ops.activation.op import gelu_mlp, gelu_tanh

__all__ = ["gelu_mlp", "gelu_tanh"]

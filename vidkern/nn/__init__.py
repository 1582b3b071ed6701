"""Modules over the operators, with the parameter names that users of Latte, FVDM and DiT know."""

from vidkern.nn.attention import (
    Rope,
    SpaceThenTimeAttention,
    SpatialAttention,
    SplitHeadAttention,
    TemporalAttention,
)
from vidkern.nn.block import DividedSpaceTimeBlock, FinalLayer, Mlp
from vidkern.nn.conv3d import CausalConv3d, UpsampleConv
from vidkern.nn.embedding import LabelEmbedder, PatchEmbed, TimestepEmbedder, unpatchify
from vidkern.nn.linear import xavier_linear, zero_linear
from vidkern.nn.modulation import Branch, PerFrameModulation, residual_modulate
from vidkern.nn.position import RelativePositionBias, rotary_tables, sincos_1d, sincos_2d

__all__ = [
    "Branch",
    "CausalConv3d",
    "DividedSpaceTimeBlock",
    "FinalLayer",
    "LabelEmbedder",
    "Mlp",
    "PatchEmbed",
    "PerFrameModulation",
    "RelativePositionBias",
    "Rope",
    "SpaceThenTimeAttention",
    "SpatialAttention",
    "SplitHeadAttention",
    "TemporalAttention",
    "TimestepEmbedder",
    "UpsampleConv",
    "residual_modulate",
    "rotary_tables",
    "sincos_1d",
    "sincos_2d",
    "unpatchify",
    "xavier_linear",
    "zero_linear",
]

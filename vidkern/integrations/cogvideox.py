"""diffusers' CogVideoXTransformer3DModel with fused modulation of text and video."""

from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidkern import ops
from vidkern.integrations import feed_forward, tokens
from vidkern.integrations.patching import Plan, Report, check_class, check_source, check_unhooked, is_a

MODEL = "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel"
BLOCK = "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXBlock"
NORM_ZERO = "diffusers.models.normalization.CogVideoXLayerNormZero"
NORM_OUT = "diffusers.models.normalization.AdaLayerNorm"
LAYER_NORM = "torch.nn.modules.normalization.LayerNorm"

#: The code that the replacements were written for: diffusers 0.42.
SOURCES = MappingProxyType({BLOCK: "f27caf0be5d9", NORM_ZERO: "8e8e6c80a6b8", NORM_OUT: "89c29c0e0e59"})


def recognises(module: nn.Module) -> bool:
    """Return whether a module is a CogVideoXTransformer3DModel or a subclass."""
    return is_a(module, MODEL)


def apply_vidkern_to_cogvideox(model: nn.Module, *, mlp: bool = True) -> Report:
    """Speed up diffusers' CogVideoXTransformer3DModel in place; results stay the same.

    In each block, and before the output, norm with its weights, shift, scale, gate and residual of the text and of the
    video run in vidkern's fused operators.

    Args:
        model: a CogVideoXTransformer3DModel of diffusers 0.42, not of a subclass.
        mlp: the feed-forward by ``vidkern.ops.gelu_mlp``, which keeps one activation less for the backward pass. False
            keeps the model's own; so do another activation, a projection without bias, an adapter or a hook inside it,
            and dropout in training.

    Returns:
        What was changed.

    Raises:
        ValueError: the model is of a subclass or of another version, or somebody else has replaced one of its forwards.
    """
    _check(model)
    plan = Plan(model)
    for block in model.get_submodule("transformer_blocks").children():
        own = feed_forward.replace_diffusers(plan, block.ff) if mlp else ""
        what = f"block: fused norm, modulation, gate and residual, text and video{own}"
        plan.replace(block, "forward", block_forward, what)
    plan.replace(model.get_submodule("norm_out"), "forward", norm_out_forward, "output norm: fused modulation")
    return plan.apply()


def _check(model: Any) -> None:
    check_class(model, MODEL)
    tokens.check_width(model.proj_out.in_features)
    _check_part(model.norm_out, NORM_OUT, "norm_out")
    if model.norm_out.chunk_dim != 1 or model.norm_out.emb is not None:
        raise ValueError("norm_out must take its condition as temb, with chunk_dim 1")
    for i, block in enumerate(model.transformer_blocks):
        check_class(block, BLOCK, f"transformer_blocks.{i}")
        check_source(type(block), {"forward": SOURCES[BLOCK]})
        for name in ("norm1", "norm2"):
            where = f"transformer_blocks.{i}.{name}"
            _check_part(getattr(block, name), NORM_ZERO, where)
            check_unhooked(getattr(block, name), where)


def _check_part(module: Any, path: str, where: str) -> None:
    check_class(module, path, where)
    check_source(type(module), {"forward": SOURCES[path]})
    check_class(module.norm, LAYER_NORM, f"{where}.norm")
    check_unhooked(module.norm, f"{where}.norm")


def block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a CogVideoXBlock: video (B, L, D) and text (B, T, D), each one frame of tokens to the operators."""
    of_video, of_text = _vectors(self.norm1, temb)
    video, text = hidden_states.unsqueeze(1), encoder_hidden_states.unsqueeze(1)
    eps = self.norm1.norm.eps
    y, text_y = self.attn1(
        hidden_states=ops.layer_norm_modulate(video, of_video.shift, of_video.scale, eps).squeeze(1),
        encoder_hidden_states=ops.layer_norm_modulate(text, of_text.shift, of_text.scale, eps).squeeze(1),
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    then_of_video, then_of_text = _vectors(self.norm2, temb)
    eps = self.norm2.norm.eps
    video, h = _next(video, y.unsqueeze(1), of_video.gate, then_of_video, eps)
    text, text_h = _next(text, text_y.unsqueeze(1), of_text.gate, then_of_text, eps)
    h = torch.cat([text_h, h], dim=2)
    del y, text_y, text_h  # not to be held through the feed-forward, the block's peak
    text_y, y = self.ff(h).split([text.shape[2], video.shape[2]], dim=2)
    video = tokens.gate_residual(video, y, then_of_video.gate)
    text = tokens.gate_residual(text, text_y, then_of_text.gate)
    return video.squeeze(1), text.squeeze(1)


class Vectors(NamedTuple):
    """What modulates the tokens of one kind, the norm's weights in it: (B, 1, D) each, of one dtype."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def _vectors(norm: Any, temb: Tensor) -> tuple[Vectors, Vectors]:
    """Return the vectors of the video and of the text: the norm's weights are folded into both at once."""
    vectors = norm.linear(norm.silu(temb))
    shift, scale, gate = vectors.view(len(vectors), 2, 3, 1, -1).unbind(2)  # (B, 2, 1, D) each
    shift, scale = tokens.with_weights(norm.norm, shift, scale)
    both = zip(shift.unbind(1), scale.unbind(1), gate.to(scale.dtype).unbind(1), strict=True)
    of_video, of_text = (Vectors(*each) for each in both)
    return of_video, of_text


def _next(x: Tensor, y: Tensor, gate: Tensor, vectors: Vectors, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + gate * y, and its norm modulated by vectors: (B, 1, L, D) both."""
    return ops.gate_residual_modulate(x, y.to(x.dtype), gate, vectors.shift, vectors.scale, eps)


def norm_out_forward(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
    """Run an AdaLayerNorm with its condition in temb: (B, L, D) -> (B, L, D)."""
    shift, scale = self.linear(self.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
    return tokens.modulate(x.unsqueeze(1), self.norm, shift, scale).squeeze(1)

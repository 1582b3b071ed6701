"""diffusers' LatteTransformer3DModel on tokens that stay (B, F, N, D)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vidkern import ops
from vidkern.integrations import feed_forward, tokens
from vidkern.integrations.patching import Plan, Report, check_class, check_source, check_unhooked, is_a
from vidkern.nn import unpatchify
from vidkern.ops.attention.op import MAX_FRAMES, TEMPORAL_HEAD_SIZES

MODEL = "diffusers.models.transformers.latte_transformer_3d.LatteTransformer3DModel"
BLOCK = "diffusers.models.attention.BasicTransformerBlock"
ATTENTION = "diffusers.models.attention_processor.Attention"
PROCESSOR = "diffusers.models.attention_processor.AttnProcessor2_0"

#: The code that the replacements were written for: diffusers 0.42.
MODEL_SOURCE = MappingProxyType({"forward": "3af3ffe0c53f"})
BLOCK_SOURCE = MappingProxyType({"forward": "440071576ac5"})
PROCESSOR_SOURCE = MappingProxyType({"__call__": "bf23ea5ae404"})

Attend = Callable[[nn.Module, Tensor], Tensor]


def recognises(module: nn.Module) -> bool:
    """Return whether a module is a LatteTransformer3DModel or a subclass."""
    return is_a(module, MODEL)


def apply_vidkern_to_latte(
    model: nn.Module, *, modulation: bool = True, temporal_attention: bool = True, mlp: bool = True
) -> Report:
    """Speed up diffusers' LatteTransformer3DModel in place; results stay the same.

    Tokens stay (B, F, N, D) from the patch embedding to the output: the copies that turn space into time and back, two
    for each pair of blocks and two for their gradient, are gone, and cross-attention projects a clip's text once, not
    once for each frame. Dropout draws other numbers than before (the published models have none).

    Args:
        model: a LatteTransformer3DModel of diffusers 0.42, not of a subclass.
        modulation: adaLN-single's norm, shift, scale, gate and residual in vidkern's fused operators.
        temporal_attention: attention over frames by ``vidkern.ops.temporal_attention``; False keeps the model's own
            processor, on rearranged copies. So do other processors than AttnProcessor2_0, head sizes that
            the operator has no kernel for, and clips longer than its 256 frames.
        mlp: the feed-forward by ``vidkern.ops.gelu_mlp``, which keeps one activation less for the backward pass. False
            keeps the model's own; so do another activation, a projection without bias, an adapter or a hook inside it,
            and dropout in training.

    Returns:
        What was changed.

    Raises:
        ValueError: the model is of a subclass or of another version, somebody else has replaced one of its forwards, or
            it is configured without adaLN-single.
    """
    _check(model)
    plan = Plan(model)
    plan.replace(model, "forward", _model_forward(modulation), "transformer on tokens (B, F, N, D), without permutes")
    by = "fused adaLN-single" if modulation else "adaLN-single as it was"
    for block in model.get_submodule("transformer_blocks").children():
        own = feed_forward.replace_diffusers(plan, block.ff) if mlp else ""
        plan.replace(block, "forward", _block_forward(modulation, _attend_in_space), f"spatial block: {by}{own}")
    for i, block in enumerate(model.get_submodule("temporal_transformer_blocks").children()):
        reason = (
            _why_rearranged(block.attn1, f"temporal_transformer_blocks.{i}.attn1") if temporal_attention else "asked"
        )
        over_frames = _attend_in_time() if reason is None else tokens.attend_rearranged
        how = "vidkern's temporal attention" if reason is None else f"attention on rearranged copies ({reason})"
        own = feed_forward.replace_diffusers(plan, block.ff) if mlp else ""
        plan.replace(block, "forward", _block_forward(modulation, over_frames), f"temporal block: {by}, {how}{own}")
    return plan.apply()


def _check(model: Any) -> None:
    check_class(model, MODEL)
    check_source(type(model), MODEL_SOURCE)
    tokens.check_width(model.proj_out.in_features)
    check_unhooked(model.norm_out, "norm_out")
    for name in ("transformer_blocks", "temporal_transformer_blocks"):
        for i, block in enumerate(getattr(model, name)):
            where = f"{name}.{i}"
            check_class(block, BLOCK, where)
            check_source(type(block), BLOCK_SOURCE)
            _check_block(block, where)


def _check_block(block: Any, where: str) -> None:
    if block.norm_type != "ada_norm_single":
        raise ValueError(f"{where} must have norm_type 'ada_norm_single', got {block.norm_type!r}")
    for name, wanted in (("pos_embed", None), ("_chunk_size", None), ("only_cross_attention", False)):
        got = getattr(block, name)
        if got != wanted:
            raise ValueError(f"{where} must have {name} = {wanted}, got {got}")
    for norm in ("norm1", "norm2"):
        check_class(getattr(block, norm), "torch.nn.modules.normalization.LayerNorm", f"{where}.{norm}")
        check_unhooked(getattr(block, norm), f"{where}.{norm}")


def _model_forward(fused: bool) -> Callable[..., Any]:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    modulation = tokens.FUSED if fused else tokens.PLAIN

    def forward(
        self: Any,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Any:
        batch, _, frames, height, width = hidden_states.shape
        patch = self.config.patch_size
        x = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1))
        x = x.contiguous().unflatten(0, (batch, frames))  # (B, F, N, D)
        x = x.to(torch.promote_types(x.dtype, self.scale_shift_table.dtype))  # as the first gate does under autocast
        added = {"resolution": None, "aspect_ratio": None}
        vectors, embedded = self.adaln_single(
            timestep, added_cond_kwargs=added, batch_size=batch, hidden_dtype=x.dtype
        )  # (B, 6 * D), (B, D)
        text = self.caption_projection(encoder_hidden_states)  # (B, T, D)
        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        for i, (space, time) in enumerate(pairs):
            x = _run(self, space, x, text, encoder_attention_mask, vectors)
            if not enable_temporal_attentions:
                continue
            if i == 0 and frames > 1:
                x = x + self.temp_pos_embed.to(x.dtype).unsqueeze(2)
            x = _run(self, time, x, None, None, vectors)
        shift, scale = (self.scale_shift_table + embedded.unsqueeze(1)).chunk(2, dim=1)  # (B, 1, D) each
        x = self.proj_out(modulation.modulate(x, self.norm_out, shift, scale))
        video = unpatchify(x, (height // patch, width // patch), patch).transpose(1, 2)
        return Transformer2DModelOutput(sample=video) if return_dict else (video,)

    return forward


def _run(model: Any, block: nn.Module, x: Tensor, text: Tensor | None, mask: Tensor | None, vectors: Tensor) -> Tensor:
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        return model._gradient_checkpointing_func(block, x, None, text, mask, vectors)
    return block(x, None, text, mask, vectors)


def _block_forward(fused: bool, attend: Attend) -> Callable[..., Tensor]:
    modulation = tokens.FUSED if fused else tokens.PLAIN

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if hidden_states.ndim == 3 or timestep is None:  # a call of the block alone, as it was written
            return type(self).forward(
                self,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                *args,
                **kwargs,
            )
        vectors = self.scale_shift_table + timestep.unflatten(-1, (6, -1))  # (B, 6, D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors.chunk(6, dim=1)  # (B, 1, D) each
        x = hidden_states
        h = modulation.modulate(x, self.norm1, shift_a, scale_a)
        if self.attn2 is None:
            x, h = modulation.gate_residual_modulate(x, attend(self.attn1, h), gate_a, self.norm2, shift_m, scale_m)
        else:
            x = modulation.gate_residual(x, attend(self.attn1, h), gate_a)
            x = x + _attend_to_text(self.attn2, x, encoder_hidden_states, encoder_attention_mask)
            h = modulation.modulate(x, self.norm2, shift_m, scale_m)
        return modulation.gate_residual(x, self.ff(h), gate_m)

    return forward


def _attend_in_space(attn: nn.Module, x: Tensor) -> Tensor:
    return attn(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _why_rearranged(attn: Any, where: str) -> str | None:
    """Say why attention over frames keeps the layer's own code, or None where vidkern's operator takes its place."""
    check_class(attn, ATTENTION, where)
    check_unhooked(attn, where)
    head_size = attn.inner_dim // attn.heads
    if head_size not in TEMPORAL_HEAD_SIZES:
        return f"no kernel for heads of {head_size}"
    if not is_a(attn.processor, PROCESSOR):
        return f"its processor is {type(attn.processor).__name__}"
    check_source(type(attn.processor), PROCESSOR_SOURCE)
    return None


def _attend_in_time() -> Attend:
    from diffusers.models.attention_processor import AttnProcessor2_0

    def attend(attn: Any, x: Tensor) -> Tensor:
        if x.shape[1] > MAX_FRAMES or type(attn.processor) is not AttnProcessor2_0:
            return tokens.attend_rearranged(attn, x)
        heads = attn.heads
        q, k, v = (project(x).unflatten(-1, (heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v))
        o = ops.temporal_attention((q, k, v)).flatten(-2)
        return attn.to_out[1](attn.to_out[0](o))

    return attend


def _attend_to_text(attn: nn.Module, x: Tensor, text: Any, mask: Tensor | None) -> Tensor:
    if mask is None:
        return attn(x.flatten(1, 2), encoder_hidden_states=text).unflatten(1, x.shape[1:3])
    repeated = text.repeat_interleave(x.shape[1], dim=0)  # a mask has rows for (B * F)
    return attn(x.flatten(0, 1), encoder_hidden_states=repeated, attention_mask=mask).unflatten(0, x.shape[:2])

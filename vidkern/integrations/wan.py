"""diffusers' WanTransformer3DModel with modulation per frame, not per token."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vidkern.integrations import feed_forward, tokens
from vidkern.integrations.patching import Plan, Report, check_class, check_source, check_unhooked, is_a

MODEL = "diffusers.models.transformers.transformer_wan.WanTransformer3DModel"
BLOCK = "diffusers.models.transformers.transformer_wan.WanTransformerBlock"
NORM = "diffusers.models.normalization.FP32LayerNorm"
IDENTITY = "torch.nn.modules.linear.Identity"

#: The code that the replacements were written for: diffusers 0.42.
MODEL_SOURCE = MappingProxyType({"forward": "9f81a7225288"})
BLOCK_SOURCE = MappingProxyType({"forward": "21c15441b009"})
CONDITION_SOURCE = MappingProxyType({"forward": "228fe8b75f1d"})


def recognises(module: nn.Module) -> bool:
    """Return whether a module is a WanTransformer3DModel or a subclass."""
    return is_a(module, MODEL)


def apply_vidkern_to_wan(model: nn.Module, *, frame_timesteps: bool | None = None, mlp: bool = True) -> Report:
    """Speed up diffusers' WanTransformer3DModel in place; results stay the same.

    Norm, shift, scale, gate and residual run in vidkern's fused operators. With a timestep for each token (B, L), as
    pipelines of Wan 2.2 TI2V 5B give (``expand_timesteps``), the time embedding and the modulation of each block are
    computed once for each latent frame, (B, F, 6, D), where all tokens of every frame have the same timestep, and not
    as (B, L, 6, D) in float32. Timesteps of shape (B, F) are taken too.

    Args:
        model: a WanTransformer3DModel of diffusers 0.42, not of a subclass.
        frame_timesteps: where there is a timestep for each token, whether all tokens of a latent frame share theirs.
            None looks at each call: one comparison, and the host waits for its result; under torch.compile and in the
            capture of a CUDA graph nobody can look, and the modulation is per token. True promises it, so that nobody
            looks: the first token's timestep is then the frame's. False keeps it per token.
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
    plan.replace(model, "forward", _model_forward(frame_timesteps), "transformer with modulation per frame")
    replace_blocks(plan, block_forward, mlp)
    return plan.apply()


def replace_blocks(plan: Plan, forward: Callable[..., Tensor], mlp: bool) -> None:
    """Plan to replace every block's forward and, where it may be, its feed-forward."""
    for block in plan.model.get_submodule("blocks").children():
        own = feed_forward.replace_diffusers(plan, block.ffn) if mlp else ""
        plan.replace(block, "forward", forward, f"block: fused norm, modulation, gate and residual{own}")


def _check(model: Any) -> None:
    check_class(model, MODEL)
    check_source(type(model), MODEL_SOURCE)
    check_source(type(model.condition_embedder), CONDITION_SOURCE)
    check_blocks(model, BLOCK, BLOCK_SOURCE)


def check_blocks(model: Any, block_class: str, source: MappingProxyType[str, str]) -> None:
    """Require the structure that the blocks' replacement was written for.

    Raises:
        ValueError: it is another.
    """
    tokens.check_width(model.proj_out.in_features)
    _check_norm(model.norm_out, "norm_out")
    for i, block in enumerate(model.blocks):
        check_class(block, block_class, f"blocks.{i}")
        check_source(type(block), source)
        for name in ("norm1", "norm2", "norm3"):
            _check_norm(getattr(block, name), f"blocks.{i}.{name}")


def _check_norm(norm: nn.Module, where: str) -> None:
    if not (where.endswith("norm2") and is_a(norm, IDENTITY)):
        check_class(norm, NORM, where)
    check_unhooked(norm, where)


def _model_forward(promised: bool | None) -> Callable[..., Any]:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.utils import apply_lora_scale

    @apply_lora_scale("attention_kwargs")
    def forward(
        self: Any,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rotary_emb = self.rope(hidden_states)
        latent = self.patch_embedding(hidden_states)
        grid = latent.shape[2:]  # (F, H, W)
        x = latent.flatten(2).transpose(1, 2).contiguous()  # (B, L = F * H * W, D)
        each = None
        if timestep.ndim == 2:
            timestep = frames_or_tokens(timestep, grid[0], grid[1] * grid[2], promised)
            each = timestep.shape[1]
        temb, vectors, text, image = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, encoder_hidden_states_image, timestep_seq_len=each
        )
        vectors = vectors.unflatten(-1, (6, -1))  # (B, 6, D), or (B, F or L, 6, D)
        if image is not None:
            text = torch.cat([image, text], dim=1)
        x = run_blocks(self, x, text, vectors, rotary_emb)
        temb = temb if temb.ndim == 3 else temb.unsqueeze(1)
        video = project_out(self, x, temb, grid)
        return Transformer2DModelOutput(sample=video) if return_dict else (video,)

    return forward


def frames_or_tokens(timestep: Tensor, frames: int, places: int, promised: bool | None) -> Tensor:
    """Return timesteps (B, L) as (B, F) where all tokens of every frame share one, and others as they are.

    Args:
        timestep: (B, L = frames * places), or of another length, which is returned as it is.
        frames: F.
        places: tokens of a frame.
        promised: as ``frame_timesteps`` of :func:`apply_vidkern_to_wan`.
    """
    if promised is False or timestep.shape[1] != frames * places:
        return timestep
    by_frame = timestep.unflatten(1, (frames, places))
    first = by_frame[..., :1]
    if promised or (_may_look(timestep) and bool((by_frame == first).all())):
        return first.squeeze(-1)
    return timestep


def _may_look(x: Tensor) -> bool:
    """Whether the host may read a value now."""
    if torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def run_blocks(model: Any, x: Tensor, text: Tensor, *others: Any) -> Tensor:
    """Run the blocks one after the other, with activation checkpointing where the model asks for it."""
    checkpointing = torch.is_grad_enabled() and model.gradient_checkpointing
    for block in model.blocks:
        x = model._gradient_checkpointing_func(block, x, text, *others) if checkpointing else block(x, text, *others)
    return x


def project_out(model: Any, x: Tensor, temb: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Norm, modulate by temb (B, 1, F or L, D), project and unpatchify (B, L, D) -> (B, C, F * p, H * p, W * p)."""
    shift, scale = (model.scale_shift_table.to(temb.device).unsqueeze(1) + temb.unsqueeze(2)).to(x.device).unbind(2)
    h = model.proj_out(tokens.modulate(in_groups(x, scale), model.norm_out, shift, scale).flatten(1, 2))
    patch = h.unflatten(2, (*model.config.patch_size, -1)).unflatten(1, grid)  # (B, F, H, W, p, p, p, C)
    return patch.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def in_groups(x: Tensor, vector: Tensor) -> Tensor:
    """View (B, L, D) as (B, G, L / G, D) beside vectors (B, G, D)."""
    return x.unflatten(1, (vector.shape[1], -1))


def block_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Tensor:
    """Run a WanTransformerBlock: temb (B, 6, D), or (B, G, 6, D) with G a divisor of the L tokens."""
    vectors = temb if temb.ndim == 4 else temb.unsqueeze(1)
    return modulated_block(self, hidden_states, encoder_hidden_states, vectors, rotary_emb)


def modulated_block(
    block: Any, x: Tensor, text: Tensor, vectors: Tensor, rotary_emb: Any, mask: Tensor | None = None
) -> Tensor:
    """Run self-attention, cross-attention and feed-forward of x (B, L, D), modulated by vectors (B, G, 6, D)."""
    vectors = block.scale_shift_table.unsqueeze(1) + vectors.float()
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors.unbind(2)  # (B, G, D) each
    x = in_groups(x, gate_a)
    h = tokens.modulate(x, block.norm1, shift_a, scale_a).flatten(1, 2)
    x, h = tokens.gate_residual_norm(x, in_groups(block.attn1(h, None, mask, rotary_emb), gate_a), gate_a, block.norm2)
    x = x + in_groups(block.attn2(h.flatten(1, 2), text, None, None), gate_a)
    h = tokens.modulate(x, block.norm3, shift_m, scale_m).flatten(1, 2)
    return tokens.gate_residual(x, in_groups(block.ffn(h), gate_m), gate_m).flatten(1, 2)

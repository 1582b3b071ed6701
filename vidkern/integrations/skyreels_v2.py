"""diffusers' SkyReelsV2Transformer3DModel with modulation per frame, not per token."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vidkern.integrations import wan
from vidkern.integrations.patching import Plan, Report, check_class, check_source, is_a

MODEL = "diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2Transformer3DModel"
BLOCK = "diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2TransformerBlock"

#: The code that the replacements were written for: diffusers 0.42.
MODEL_SOURCE = MappingProxyType({"forward": "0d0c3ea7163b"})
BLOCK_SOURCE = MappingProxyType({"forward": "3f34de9e2b0b"})
CONDITION_SOURCE = MappingProxyType({"forward": "45e6d47f4dc5"})


def recognises(module: nn.Module) -> bool:
    """Return whether a module is a SkyReelsV2Transformer3DModel or a subclass."""
    return is_a(module, MODEL)


def apply_vidkern_to_skyreels_v2(model: nn.Module, *, mlp: bool = True) -> Report:
    """Speed up diffusers' SkyReelsV2Transformer3DModel in place; results stay the same.

    Norm, shift, scale, gate and residual run in vidkern's fused operators. With diffusion forcing, a timestep for each
    latent frame, the modulation of each block stays (B, F, 6, D) and is not repeated to (B, 6, L, D) in float32.

    Args:
        model: a SkyReelsV2Transformer3DModel of diffusers 0.42, not of a subclass.
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
    plan.replace(model, "forward", _model_forward(), "transformer with modulation per frame")
    wan.replace_blocks(plan, block_forward, mlp)
    return plan.apply()


def _check(model: Any) -> None:
    check_class(model, MODEL)
    check_source(type(model), MODEL_SOURCE)
    check_source(type(model.condition_embedder), CONDITION_SOURCE)
    wan.check_blocks(model, BLOCK, BLOCK_SOURCE)


def _model_forward() -> Callable[..., Any]:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.utils import apply_lora_scale

    @apply_lora_scale("attention_kwargs")
    def forward(
        self: Any,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        enable_diffusion_forcing: bool = False,
        fps: Any = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rotary_emb = self.rope(hidden_states)
        latent = self.patch_embedding(hidden_states)
        grid = latent.shape[2:]  # (F, H, W)
        x = latent.flatten(2).transpose(1, 2).contiguous()  # (B, L = F * H * W, D)
        temb, vectors, text, image = self.condition_embedder(
            timestep, encoder_hidden_states, encoder_hidden_states_image
        )
        frames = timestep.shape[1] if enable_diffusion_forcing else 1
        temb = temb.unflatten(0, (-1, 1)) if temb.ndim == 2 else temb  # (B, 1 or F, D)
        vectors = vectors.reshape(x.shape[0], frames, 6, -1)
        if image is not None:
            text = torch.cat([image, text], dim=1)
        if self.config.inject_sample_info:
            speed = self.fps_embedding(torch.tensor(fps, dtype=torch.long, device=x.device))
            vectors = vectors + self.fps_projection(speed).unflatten(1, (1, 6, -1))
        x = wan.run_blocks(self, x, text, vectors.transpose(1, 2), rotary_emb, _causal_mask(self, grid, x.device))
        video = wan.project_out(self, x, temb, grid)
        return Transformer2DModelOutput(sample=video) if return_dict else (video,)

    return forward


def _causal_mask(model: Any, grid: tuple[int, ...], device: torch.device) -> Tensor | None:
    """(1, 1, L, L), where a token sees the blocks of frames up to its own; None where all see all."""
    in_block = model.config.num_frame_per_block
    if in_block == 1:
        return None
    frames, height, width = grid
    block = torch.arange(frames // in_block, device=device).repeat_interleave(in_block * height * width)
    return (block <= block.unsqueeze(1))[None, None]


def block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Tensor | None,
) -> Tensor:
    """Run a SkyReelsV2TransformerBlock: temb (B, 6, D), or (B, 6, G, D) with G a divisor of the L tokens."""
    vectors = temb.transpose(1, 2) if temb.ndim == 4 else temb.unsqueeze(1)
    return wan.modulated_block(self, hidden_states, encoder_hidden_states, vectors, rotary_emb, attention_mask)

"""The public Latte and FVDM networks, found by their structure, on tokens that stay (B, F, N, D)."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidkern import ops
from vidkern.integrations import feed_forward, tokens
from vidkern.integrations.patching import Plan, Report, check_unhooked
from vidkern.nn import Branch
from vidkern.ops.attention.op import MAX_FRAMES, TEMPORAL_HEAD_SIZES

#: Arguments of the networks' forwards, after self.
MODEL_ARGUMENTS = ["x", "t", "y", "text_embedding", "use_fp16"]

#: What ``extras`` means: no condition but time, a class label, a text of 77 tokens.
NO_CONDITION, LABEL, TEXT = 1, 2, 78

Attend = Callable[[nn.Module, Tensor], Tensor]


def recognises(module: nn.Module) -> bool:
    """Return whether a module looks like a Latte or FVDM network of the authors' code, in any version."""
    if not hasattr(module, "temp_embed") or not (hasattr(module, "blocks") or hasattr(module, "blocks_spatial")):
        return False
    return "use_fp16" in inspect.signature(type(module).forward).parameters


def apply_vidkern_to_official_latte(
    model: nn.Module,
    *,
    modulation: bool = True,
    spatial_attention: bool = True,
    temporal_attention: bool = True,
    mlp: bool = True,
) -> Report:
    """Speed up ``Latte`` of Vchitect/Latte or ``LatteVIDEO`` of Yaofang-Liu/FVDM in place; results stay the same.

    Tokens stay (B, F, N, D): nothing is rearranged between space and time, and adaLN's Linear runs once for each clip,
    or for each frame in FVDM, where the authors' code repeats it for each frame and for each token.

    Args:
        model: the network itself, with ``attention_mode`` "math". ("flash" there mixes up the heads, and FVDM's
            "xformers" attends over them; what was trained that way must stay as it is.)
        modulation: norm, shift, scale, gate and residual in vidkern's fused operators.
        spatial_attention: attention in space by ``vidkern.ops.spatial_attention``, which stores no scores.
        temporal_attention: attention over frames by ``vidkern.ops.temporal_attention``, where it has a kernel for the
            head size and the number of frames; else the block's own, on rearranged copies.
        mlp: timm's Mlp by ``vidkern.ops.gelu_mlp``, which keeps one activation less for the backward pass. False
            keeps the model's own; so do another activation, a projection without bias, an adapter or a hook inside it,
            and dropout in training.

    Returns:
        What was changed.

    Raises:
        ValueError: the network's structure is not that of the public code, or somebody else has replaced its forward.
    """
    _check(model)
    why_not = _why_rearranged(model) if temporal_attention else "asked"
    space = _attend_in_space if spatial_attention else _own_attention_in_space
    time: Attend = _attend_in_time if why_not is None else tokens.attend_rearranged
    ours = {True: "vidkern's", False: "its own"}
    what = (
        f"transformer on tokens (B, F, N, D) without rearranging; modulation: {ours[modulation]}; attention in space:"
        f" {ours[spatial_attention]}; over frames: {f'its own ({why_not})' if why_not else ours[True]}"
    )
    plan = Plan(model)
    blocks = itertools.chain.from_iterable(_pairs(model)) if mlp else ()
    own = sorted({feed_forward.replace_timm(plan, block.mlp) for block in blocks} - {""})
    plan.replace(model, "forward", _model_forward(modulation, space, time), what + "".join(own))
    return plan.apply()


def _check(model: Any) -> None:
    _check_class(model, MODEL_ARGUMENTS, "the network")
    if model.extras not in (NO_CONDITION, LABEL, TEXT):
        raise ValueError(f"the network's extras must be {NO_CONDITION}, {LABEL} or {TEXT}, got {model.extras!r}")
    children = {"x_embedder", "t_embedder", "final_layer"}
    children |= {"y_embedder"} if model.extras == LABEL else set()
    children |= {"text_embedding_projection"} if model.extras == TEXT else set()
    children |= {"blocks_spatial", "blocks_temp"} if hasattr(model, "blocks_temp") else {"blocks"}
    _check_children(model, children, "the network")
    tokens.check_width(model.pos_embed.shape[-1])
    for i, pair in enumerate(_pairs(model)):
        for kind, block in zip(("spatial", "temporal"), pair, strict=True):
            _check_block(block, f"{kind} block {i}")
    final = model.final_layer
    _check_class(final, ["x", "c"], "final_layer")
    _check_children(final, {"norm_final", "linear", "adaLN_modulation"}, "final_layer")
    _check_norm(final.norm_final, "final_layer.norm_final")


def _check_block(block: Any, where: str) -> None:
    _check_class(block, ["x", "c"], where)
    _check_children(block, {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}, where)
    _check_class(block.attn, ["x"], f"{where}'s attn")
    _check_children(block.attn, {"qkv", "attn_drop", "proj", "proj_drop"}, f"{where}'s attn")
    _check_norm(block.norm1, f"{where}'s norm1")
    _check_norm(block.norm2, f"{where}'s norm2")
    if block.attn.attention_mode != "math":
        raise ValueError(f"{where}'s attention_mode must be 'math', got {block.attn.attention_mode!r}")
    if block.attn.attn_drop.p:
        raise ValueError(f"{where}'s attn_drop must be 0, got {block.attn.attn_drop.p}")


def _check_class(module: Any, arguments: list[str], where: str) -> None:
    """Require a class of its own, not derived from another network's, with the public code's arguments."""
    if type(module).__bases__ != (nn.Module,):
        raise ValueError(f"{where} must be of a class derived from nn.Module itself, got {type(module).__mro__[1]}")
    found = list(inspect.signature(type(module).forward).parameters)[1:]
    if found != arguments:
        raise ValueError(f"{where}'s forward must take {', '.join(arguments)}, got {', '.join(found)}")
    check_unhooked(module, where)


def _check_children(module: nn.Module, wanted: set[str], where: str) -> None:
    found = {name for name, _ in module.named_children()}
    if found != wanted:
        raise ValueError(f"{where} must consist of {', '.join(sorted(wanted))}, got {', '.join(sorted(found))}")


def _check_norm(norm: nn.Module, where: str) -> None:
    if type(norm) is not nn.LayerNorm or norm.elementwise_affine:
        raise ValueError(f"{where} must be a LayerNorm without weights, got {norm}")
    check_unhooked(norm, where)


def _pairs(model: Any) -> Iterator[tuple[Any, Any]]:
    """Return the blocks, spatial and temporal in turn, as pairs: Latte's one list, or FVDM's two."""
    if hasattr(model, "blocks_temp"):
        return zip(model.blocks_spatial, model.blocks_temp, strict=True)
    return zip(model.blocks[::2], model.blocks[1::2], strict=True)


def _why_rearranged(model: Any) -> str | None:
    """Say why temporal attention has no kernel for the network's heads or frames, or None where it has."""
    _, block = next(_pairs(model))
    head_size, frames = block.attn.qkv.in_features // block.attn.num_heads, model.temp_embed.shape[1]
    if head_size not in TEMPORAL_HEAD_SIZES:
        return f"no kernel for heads of {head_size}"
    return f"no kernel for {frames} frames" if frames > MAX_FRAMES else None


def _model_forward(fused: bool, attend_in_space: Attend, attend_in_time: Attend) -> Callable[..., Tensor]:
    modulation = tokens.FUSED if fused else tokens.PLAIN

    def forward(
        self: Any,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        text_embedding: Tensor | None = None,
        use_fp16: bool = False,
    ) -> Tensor:
        batch, frames = x.shape[:2]
        if frames != self.temp_embed.shape[1]:
            raise ValueError(f"x must have the network's {self.temp_embed.shape[1]} frames, got {frames}")
        images = (x.to(torch.float16) if use_fp16 else x).flatten(0, 1)
        z = (self.x_embedder(images) + self.pos_embed).contiguous().unflatten(0, (batch, frames))  # (B, F, N, D)
        condition, last = _conditions(self, self.t_embedder(t, use_fp16=use_fp16), y, text_embedding)
        branch = None
        for i, (space, time) in enumerate(_pairs(self)):
            z, branch = _run(space, attend_in_space, modulation, z, branch, condition)
            if i == 0:
                z = z + self.temp_embed.unsqueeze(2)
            z, branch = _run(time, attend_in_time, modulation, z, branch, condition)
        shift, scale = self.final_layer.adaLN_modulation(last).chunk(2, dim=-1)
        _, h = _enter(modulation, z, branch, self.final_layer.norm_final, shift, scale)
        return self.unpatchify(self.final_layer.linear(h).flatten(0, 1)).unflatten(0, (batch, frames))

    return forward


def _conditions(model: Any, time: Tensor, y: Tensor | None, text: Any) -> tuple[Tensor, Tensor]:
    """Return the conditions of the blocks and of the final layer, which never sees the text: (B, 1 or F, D) each."""
    time = time if time.ndim == 3 else time.unsqueeze(1)
    if model.extras == LABEL:
        labelled = time + model.y_embedder(y, model.training).unsqueeze(1)
        return labelled, labelled
    if model.extras == TEXT:
        return time + model.text_embedding_projection(text.flatten(1)).unsqueeze(1), time
    return time, time


def _run(
    block: Any, attend: Attend, modulation: tokens.Modulation, x: Tensor, branch: Branch | None, condition: Tensor
) -> tuple[Tensor, Branch]:
    """Run a block, which begins by adding the branch that the one before has left."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(condition).chunk(6, dim=-1)
    x, h = _enter(modulation, x, branch, block.norm1, shift_a, scale_a)
    x, h = _enter(modulation, x, (attend(block.attn, h), gate_a), block.norm2, shift_m, scale_m)
    return x, (block.mlp(h), gate_m)


def _enter(
    modulation: tokens.Modulation, x: Tensor, branch: Branch | None, norm: nn.LayerNorm, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the pending branch, if any, and return the residual stream and the next branch's input."""
    if branch is None:
        return x, modulation.modulate(x, norm, shift, scale)
    return modulation.gate_residual_modulate(x, *branch, norm, shift, scale)


def _attend_in_space(attn: Any, x: Tensor) -> Tensor:
    return _project_out(attn, ops.spatial_attention(_qkv(attn, x), scale=attn.scale))


def _attend_in_time(attn: Any, x: Tensor) -> Tensor:
    return _project_out(attn, ops.temporal_attention(_qkv(attn, x), scale=attn.scale))


def _own_attention_in_space(attn: nn.Module, x: Tensor) -> Tensor:
    return attn(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _qkv(attn: Any, x: Tensor) -> Tensor:
    return attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))


def _project_out(attn: Any, o: Tensor) -> Tensor:
    return attn.proj_drop(attn.proj(o.flatten(-2)))

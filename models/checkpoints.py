"""Loads weights saved here, by the public Latte and FVDM code, or by diffusers, into a Latte."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.fvdm import latte_name
from models.latte import Latte

StateDict = Mapping[str, Tensor]

#: Parts of a key that wrappers (DDP, torch.compile) put there.
WRAPPERS = ("module", "_orig_mod")

#: Entries of a training checkpoint that hold weights, the preferred one first.
WEIGHT_ENTRIES = ("ema", "model")

#: Tables that follow from the configuration: of another length, or absent, they are computed and not loaded.
POSITIONS = ("pos_embed", "temp_embed")

#: Keys named in an error before the rest is only counted.
NAMED_KEYS = 6


class CheckpointError(ValueError):
    """Weights that cannot be read, or do not fit the model; the message names every key and shape."""


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_weights` did.

    Attributes:
        entry: the checkpoint's entry that was loaded: "ema", "model", or "" for a bare state dict.
        naming: "latte", "fvdm" or "diffusers"; "own" for a model that is no Latte.
        loaded: keys of the model that were loaded.
        computed: position tables that were computed for this model and not loaded.
        widened: keys that got zeros for input channels that the checkpoint lacks: the patch embedding of a network that
            is told given frames by more channels, which so begins as the network that the checkpoint holds.
        cast: keys whose values were converted to the model's dtype, with both dtypes.
        missing: keys of the model that the checkpoint lacks (``strict=False`` only).
        unexpected: keys of the checkpoint that the model lacks (``strict=False`` only).
        mismatched: keys with another shape, with both shapes (``strict=False`` only).
    """

    entry: str
    naming: str
    loaded: tuple[str, ...]
    computed: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line."""
        source = f"entry '{self.entry}'" if self.entry else "a bare state dict"
        parts = [f"{len(self.loaded)} tensors loaded from {source} in {self.naming} naming"]
        for what in ("computed", "widened", "cast", "missing", "unexpected", "mismatched"):
            keys = getattr(self, what)
            parts += [f"{what}: {_listed(keys)}"] if keys else []
        return "; ".join(parts)


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Any], *, entry: str | None = None, strict: bool = True
) -> LoadReport:
    """Load weights into a model, whatever training code saved them.

    Understood are {'ema'}, {'model', 'ema', ...}, {'model', 'ema', 'opt', 'args'} and bare state dicts, as a .pt file,
    a .safetensors file or a mapping; the prefixes of DDP and torch.compile; the names of Latte and FVDM; and, as far as
    it is the same network, diffusers' LatteTransformer3DModel. Files are read with ``weights_only=True``: nothing in
    them is executed, and what is neither tensor nor plain data (training arguments, say) becomes an empty placeholder.

    Position tables of another length, or absent, are computed and not loaded.

    Args:
        model: where the weights go; left as it was when an error is raised.
        source: a file, or what is in one.
        entry: "ema" or "model" to insist on one; by default the averaged weights if there are any.
        strict: raise if anything is missing, unexpected or of another shape. If False, load what fits and report the
            rest.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file cannot be read, or its weights do not fit; the keys and both shapes are named.
    """
    where = str(source) if isinstance(source, str | Path) else "the state dict"
    content = read_checkpoint(source) if isinstance(source, str | Path) else source
    found, weights = _select_entry(content, entry, where)
    naming, weights, notes = _in_latte_naming(_without_wrappers(weights), model)
    widened = _widen_patch_embedding(weights, model) if isinstance(model, Latte) else ()
    own = model.state_dict()
    computed = [key for key in POSITIONS if key in own and not _same_shape(key, weights, own)]
    dropped = {*computed, *(key for key in POSITIONS if key not in own)}
    weights = {key: value for key, value in weights.items() if key not in dropped}
    wanted = [key for key in own if key not in computed]
    mismatched = [key for key in wanted if key in weights and weights[key].shape != own[key].shape]
    report = LoadReport(
        entry=found,
        naming=naming,
        loaded=tuple(key for key in wanted if key in weights and key not in mismatched),
        computed=tuple(computed),
        widened=widened,
        cast=tuple(
            f"{key} ({_dtype(weights[key])} to {_dtype(own[key])})"
            for key in wanted
            if key in weights and key not in mismatched and weights[key].dtype != own[key].dtype
        ),
        missing=tuple(key for key in wanted if key not in weights),
        unexpected=tuple(key for key in weights if key not in own),
        mismatched=tuple(
            f"{key} (checkpoint {tuple(weights[key].shape)}, model {tuple(own[key].shape)})" for key in mismatched
        ),
    )
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise CheckpointError(_misfit(where, report, weights, notes))
    model.load_state_dict({key: weights[key] for key in report.loaded}, strict=False)
    return report


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Read a .safetensors or PyTorch file onto the CPU, without executing anything that is in it.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not such a file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with _placeholders_for_classes(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return content


@contextlib.contextmanager
def _placeholders_for_classes(path: Path) -> Iterator[None]:
    """Let the restricted unpickler read objects of foreign classes, as empty placeholders that run no code."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    placeholders: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (type("Placeholder", (_Placeholder,), {}), name) for name in names
    ]
    with torch.serialization.safe_globals(placeholders):
        yield


class _Placeholder:
    """Stands for an object whose class is not ours to run."""

    def __new__(cls, *_: Any, **__: Any) -> "_Placeholder":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _select_entry(content: Mapping[str, Any], entry: str | None, where: str) -> tuple[str, StateDict]:
    present = [name for name in WEIGHT_ENTRIES if isinstance(content.get(name), Mapping)]
    if entry is not None and entry not in present:
        raise CheckpointError(f"{where} must hold weights under {entry!r}, got the entries {_listed(tuple(content))}")
    chosen = entry or (present[0] if present else "")
    weights = content[chosen] if chosen else content
    foreign = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if foreign or not weights:
        raise CheckpointError(
            f"{where} must hold tensors, bare or under {' or '.join(map(repr, WEIGHT_ENTRIES))},"
            f" got {_listed(tuple(map(str, foreign))) or 'nothing'}"
        )
    return chosen, weights


def _without_wrappers(weights: StateDict) -> dict[str, Tensor]:
    return {".".join(p for p in key.split(".") if p not in WRAPPERS): value for key, value in weights.items()}


def _in_latte_naming(weights: dict[str, Tensor], model: nn.Module) -> tuple[str, dict[str, Tensor], str]:
    """Return (naming found, weights by our names, what an error should add)."""
    if not isinstance(model, Latte):
        return "own", weights, ""
    if any(key.startswith(("transformer_blocks.", "temporal_transformer_blocks.")) for key in weights):
        return "diffusers", from_diffusers(weights), DIFFUSERS_DIFFERENCES
    if any(key.startswith(("blocks_spatial.", "blocks_temp.")) for key in weights):
        if model.config.variant != 1:
            raise CheckpointError(f"FVDM's weights need variant 1, got a model of variant {model.config.variant}")
        return "fvdm", {latte_name(key): value for key, value in weights.items()}, ""
    return "latte", weights, ""


def _widen_patch_embedding(weights: dict[str, Tensor], model: nn.Module) -> tuple[str, ...]:
    """Append zeros for the channels of given frames to the patch embedding of a network without them."""
    key = "x_embedder.proj.weight"
    if not isinstance(model, Latte) or key not in weights:
        return ()
    weight, config = weights[key], model.config
    if config.image_condition != "concat" or weight.shape[1] != config.in_channels:
        return ()
    lacking = config.embedded_channels - config.in_channels
    weights[key] = torch.cat([weight, weight.new_zeros(weight.shape[0], lacking, *weight.shape[2:])], dim=1)
    return (key,)


DIFFUSERS_DIFFERENCES = (
    "diffusers' LatteTransformer3DModel is the text-to-video Latte: its cross-attention (attn2), its caption_projection"
    " and its last scale_shift_table, which adds the time embedding itself where Latte has a Linear, have no place"
    " here; strict=False loads the rest"
)

_DIFFUSERS_NAMES = {
    "pos_embed.proj.": "x_embedder.proj.",
    "adaln_single.emb.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "adaln_single.emb.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "proj_out.": "final_layer.linear.",
}
_DIFFUSERS_BLOCK_NAMES = {
    "attn1.to_out.0.": "attn.proj.",
    "ff.net.0.proj.": "mlp.fc1.",
    "ff.net.2.": "mlp.fc2.",
}
_DIFFUSERS_BLOCK = re.compile(r"^(temporal_)?transformer_blocks\.(\d+)\.(.+)$")


def from_diffusers(weights: StateDict) -> dict[str, Tensor]:
    """Rename the weights of diffusers' LatteTransformer3DModel; what has no place in a Latte keeps its name.

    Its blocks share one modulation Linear and add a table of their own (PixArt's adaLN-single): the Linear's weight,
    and its bias plus the table, are exactly a block's own adaLN_modulation. q, k and v are joined.
    """
    renamed: dict[str, Tensor] = {}
    shared = {kind: weights.get(f"adaln_single.linear.{kind}") for kind in ("weight", "bias")}
    for key, value in weights.items():
        block = _DIFFUSERS_BLOCK.match(key)
        if key.startswith("adaln_single.linear.") or key in ("pos_embed.pos_embed", "temp_pos_embed"):
            continue
        if block is None:
            renamed[_replace_prefix(key, _DIFFUSERS_NAMES)] = value
            continue
        temporal, index, rest = block.groups()
        prefix = f"blocks.{2 * int(index) + (temporal is not None)}."
        qkv = re.match(r"attn1\.to_q\.(weight|bias)$", rest)
        if qkv:
            names = [key.replace("to_q", f"to_{part}") for part in "qkv"]
            renamed[f"{prefix}attn.qkv.{qkv[1]}"] = torch.cat([weights[name] for name in names])
        elif rest == "scale_shift_table" and shared["weight"] is not None and shared["bias"] is not None:
            renamed[f"{prefix}adaLN_modulation.1.weight"] = shared["weight"]
            renamed[f"{prefix}adaLN_modulation.1.bias"] = shared["bias"] + value.flatten()
        elif not rest.startswith(("attn1.to_k.", "attn1.to_v.")):
            name = _replace_prefix(rest, _DIFFUSERS_BLOCK_NAMES)
            renamed[key if name == rest else prefix + name] = value
    return renamed


def _replace_prefix(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _same_shape(key: str, weights: StateDict, own: StateDict) -> bool:
    return key in weights and weights[key].shape == own[key].shape


def _misfit(where: str, report: LoadReport, weights: StateDict, notes: str) -> str:
    """Say in one line what does not fit, and what the checkpoint looks like."""
    parts = [
        f"{what}: {_listed(keys)}"
        for what, keys in (
            ("another shape", report.mismatched),
            ("missing", report.missing),
            ("unexpected", report.unexpected),
        )
        if keys
    ]
    looks = _looks_like(weights)
    return "; ".join([f"{where} does not fit the model: {parts[0]}", *parts[1:], *filter(None, (looks, notes))])


def _looks_like(weights: StateDict) -> str:
    """Describe the model that weights were saved from, as far as their shapes tell."""
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    facts = {"depth": len(blocks) or None}
    if "x_embedder.proj.weight" in weights:
        hidden_size, in_channels, *patch = weights["x_embedder.proj.weight"].shape
        facts |= {"hidden_size": hidden_size, "in_channels": in_channels, "patch_size": patch[-1]}
    if "y_embedder.embedding_table.weight" in weights:
        facts["num_classes"] = weights["y_embedder.embedding_table.weight"].shape[0] - 1
    known = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    return f"the checkpoint looks like {known}" if known else ""


def _listed(keys: tuple[str, ...]) -> str:
    more = f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else ""
    return ", ".join(keys[:NAMED_KEYS]) + more


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")

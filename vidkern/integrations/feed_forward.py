"""The feed-forward layers of other people's models, by ``vidkern.ops.gelu_mlp``: GELU's output is not kept."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from vidkern import ops
from vidkern.integrations.patching import Plan, check_source, is_a, why_hooked

FEED_FORWARD = "diffusers.models.attention.FeedForward"
GELU = "diffusers.models.activations.GELU"

#: The code that the replacement stands for: diffusers 0.42.
SOURCES = MappingProxyType(
    {FEED_FORWARD: {"forward": "dae2c9f53987"}, GELU: {"forward": "538b05d6963a", "gelu": "d203f2720ee0"}}
)

#: What timm's Mlp consists of, in its older and in its newer versions.
TIMM_CHILDREN = ({"fc1", "act", "drop", "fc2"}, {"fc1", "act", "drop1", "norm", "fc2", "drop2"})


class Parts(NamedTuple):
    """The modules that a feed-forward layer calls.

    Attributes:
        first: Linear, D to I.
        activation: GELU, of torch or diffusers; the latter holds ``first``.
        second: Linear, I to D.
        others: dropouts, and timm's norm where it has none.
    """

    first: Any
    activation: Any
    second: Any
    others: tuple[Any, ...]


def replace_diffusers(plan: Plan, layer: Any) -> str:
    """Plan to replace a FeedForward of diffusers, and say for the report where it stays, else "".

    At each call whatever came later is looked for: an adapter, a hook, dropout in training; the layer's own code serves
    them.

    Raises:
        ValueError: its code is another version's.
    """
    if not is_a(layer, FEED_FORWARD):
        return _stays(f"it is a {type(layer).__name__}")
    check_source(type(layer), SOURCES[FEED_FORWARD])
    if not is_a(layer.net[0], GELU):
        return _stays(f"its activation is {type(layer.net[0]).__name__}")
    check_source(type(layer.net[0]), SOURCES[GELU])
    return _replace(plan, layer, diffusers_forward, _why_own(_parts_of_diffusers(layer)))


def replace_timm(plan: Plan, layer: Any) -> str:
    """Plan to replace an Mlp of timm, found by its structure; otherwise as :func:`replace_diffusers`."""
    if {name for name, _ in layer.named_children()} not in TIMM_CHILDREN:
        return _stays("it is not made as timm's Mlp")
    return _replace(plan, layer, timm_forward, _why_own(_parts_of_timm(layer)))


def diffusers_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a FeedForward: (..., D) -> (..., D)."""
    parts = _parts_of_diffusers(self)
    if args or kwargs or not _serves(parts):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _gelu_mlp(hidden_states, parts)


def timm_forward(self: Any, x: Tensor) -> Tensor:
    """Run an Mlp: (..., D) -> (..., D)."""
    parts = _parts_of_timm(self)
    return _gelu_mlp(x, parts) if _serves(parts) else type(self).forward(self, x)


def _replace(plan: Plan, layer: nn.Module, forward: Callable[..., Tensor], why_own: str | None) -> str:
    if why_own is not None:
        return _stays(why_own)
    plan.replace(layer, "forward", forward, "feed-forward: GELU computed again for the backward pass, not kept")
    return ""


def _stays(reason: str) -> str:
    return f"; its own feed-forward ({reason})"


def _parts_of_diffusers(layer: Any) -> Parts:
    gelu, dropout, second, *last = layer.net
    return Parts(gelu.proj, gelu, second, (dropout, *last))


def _parts_of_timm(layer: Any) -> Parts:
    others = (layer.drop,) if hasattr(layer, "drop") else (layer.drop1, layer.norm, layer.drop2)
    return Parts(layer.fc1, layer.act, layer.fc2, others)


def _serves(parts: Parts) -> bool:
    return _why_own(parts) is None and not any(getattr(part, "p", 0) and part.training for part in parts.others)


def _why_own(parts: Parts) -> str | None:
    """Say why a layer keeps its own code in every mode, or None where ``gelu_mlp`` computes the same."""
    activation = parts.activation
    if not (is_a(activation, GELU) or type(activation) is nn.GELU) or activation.approximate != "tanh":
        return f"its activation is {activation}"
    for part in (parts.first, parts.second):
        if type(part) is not nn.Linear or part.bias is None:
            return f"{type(part).__name__} in the place of a Linear with bias"
        if type(part.weight) not in (nn.Parameter, Tensor):
            return f"a Linear's weight is a {type(part.weight).__name__}"
    for part in parts.others:
        if type(part) not in (nn.Dropout, nn.Identity):
            return f"{type(part).__name__} in the place of a Dropout"
    for part in (parts.first, activation, parts.second, *parts.others):
        reason = why_hooked(part)
        if reason is not None:
            return f"its {type(part).__name__} {reason}"
    return None


def _gelu_mlp(x: Tensor, parts: Parts) -> Tensor:
    first, second = parts.first, parts.second
    return ops.gelu_mlp(x, first.weight, first.bias, second.weight, second.bias)

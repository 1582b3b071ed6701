"""Every model that vidkern can patch, and the one call that finds them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vidkern._dispatch import log
from vidkern.integrations import cogvideox, cogvideox_vae, latte, official_latte, skyreels_v2, wan, wan_vae
from vidkern.integrations.patching import Refusal, Report, roots


@dataclass(frozen=True)
class Integration:
    """One class of models: how it is recognised (subclasses too), and the function that patches it or raises."""

    recognises: Callable[[nn.Module], bool]
    apply: Callable[..., Report]

    def switches(self) -> tuple[str, ...]:
        """Return the names of the function's switches."""
        parameters = inspect.signature(self.apply).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


KNOWN = (
    Integration(cogvideox.recognises, cogvideox.apply_vidkern_to_cogvideox),
    Integration(cogvideox_vae.recognises, cogvideox_vae.apply_vidkern_to_cogvideox_vae),
    Integration(latte.recognises, latte.apply_vidkern_to_latte),
    Integration(official_latte.recognises, official_latte.apply_vidkern_to_official_latte),
    Integration(skyreels_v2.recognises, skyreels_v2.apply_vidkern_to_skyreels_v2),
    Integration(wan.recognises, wan.apply_vidkern_to_wan),
    Integration(wan_vae.recognises, wan_vae.apply_vidkern_to_wan_vae),
)


def patch(model: Any, **switches: Any) -> Report:
    """Speed up every model that vidkern knows inside a model or pipeline, in place; results stay the same.

    state_dict keys, parameters and classes stay as they are; gradients flow. Patch after loading, moving and adding
    adapters or hooks, and before torch.compile. Patching again applies the switches of the last call.

    Args:
        model: a ``torch.nn.Module``, or a pipeline (anything with ``components``, as diffusers' pipelines).
        switches: passed on to each ``apply_vidkern_to_...`` function that has a switch of that name.

    Returns:
        What was changed, and what was recognised but left as it is, and why; also logged ("vidkern", INFO).

    Raises:
        TypeError: the model is neither, or no known model has such a switch.
    """
    for name in switches:
        if not any(name in known.switches() for known in KNOWN):
            offered = sorted({switch for known in KNOWN for switch in known.switches()})
            raise TypeError(f"{name!r} is not a switch of any model that vidkern knows: {', '.join(offered)}")
    report = Report()
    for name, root in roots(model).items():
        for path, module in root.named_modules():
            report += _patch_one(module, switches).at(".".join(part for part in (name, path) if part))
    log.info("%s", report)
    return report


def _patch_one(module: nn.Module, switches: dict[str, Any]) -> Report:
    for known in KNOWN:
        if known.recognises(module):
            wanted = {name: value for name, value in switches.items() if name in known.switches()}
            try:
                return known.apply(module, **wanted)
            except ValueError as reason:
                return Report(refused=(Refusal("", type(module).__name__, str(reason)),))
    return Report()

"""How a model is patched: methods replaced on its instances, all or none of them, and taken back exactly.

A replacement is a bound method in the instance's ``__dict__``; classes, parameters and the state_dict stay as they
are. So a deep copy is patched too, save_pretrained writes what it always wrote, and a pickle holds an unpatched model
(a bound method pickles as its name), which loads without vidkern.
"""

import hashlib
import inspect
import types
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from vidkern.nn import prepared

#: Where accelerate's hooks keep the forward that they wrap.
_HOOKED_FORWARD = "_old_forward"


class Change(NamedTuple):
    """What was changed in so many modules of one model; path is the model's own, "" for the one that was given."""

    path: str
    model: str
    what: str
    modules: int


class Refusal(NamedTuple):
    """Why a model that was recognised is left as it is."""

    path: str
    model: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was changed, and what was not and why; ``str`` of it is for people. True when there is a change."""

    changed: tuple[Change, ...] = ()
    refused: tuple[Refusal, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changed)

    def __str__(self) -> str:
        lines, title = [], None
        for change in self.changed:
            if (change.path, change.model) != title:
                title = change.path, change.model
                lines.append(f"patched {_titled(*title)}:")
            lines.append(f"  {change.modules} x {change.what}")
        lines += [f"not patched {_titled(path, model)}: {reason}" for path, model, reason in self.refused]
        return "\n".join(lines) or "nothing to patch"

    def __add__(self, other: "Report") -> "Report":
        return Report(self.changed + other.changed, self.refused + other.refused)

    def at(self, path: str) -> "Report":
        """Return this report of one model with the path at which it sits in a larger one."""
        return Report(
            tuple(change._replace(path=path) for change in self.changed),
            tuple(refusal._replace(path=path) for refusal in self.refused),
        )


def _titled(path: str, model: str) -> str:
    return f"{path} ({model})" if path else model


@dataclass
class Plan:
    """The replacements of one model, collected first, so that a refusal leaves the model untouched."""

    model: nn.Module
    _replacements: list[tuple[nn.Module, str, Callable[..., Any], str]] = field(default_factory=list)

    def replace(self, module: nn.Module, method: str, function: Callable[..., Any], what: str) -> None:
        """Plan to replace a method of one module.

        Args:
            module: the model or one inside it.
            method: the method's name, such as "forward".
            function: a function of a vidkern module that takes what the method takes, self first.
            what: one short phrase for the report.

        Raises:
            ValueError: somebody else has replaced the method on this instance.
        """
        held = module.__dict__.get(_slot(module, method))
        if held is not None and not _is_ours(held) and not _is_original(module, method, held):
            raise ValueError(
                f"{method} of a {type(module).__name__} is already replaced, by"
                f" {getattr(held, '__module__', '?')}.{getattr(held, '__qualname__', held)}"
            )
        function.__name__ = method  # a bound method pickles as getattr(module, its name)
        self._replacements.append((module, method, function, what))

    def apply(self) -> Report:
        """Take back what an earlier patch did to the model, replace the planned methods and return the report."""
        unpatch(self.model)
        for module, method, function, _ in self._replacements:
            module.__dict__[_slot(module, method)] = types.MethodType(function, module)
        counts = Counter(what for *_, what in self._replacements)
        return Report(tuple(Change("", type(self.model).__name__, what, count) for what, count in counts.items()))


def unpatch(model: Any) -> None:
    """Restore every model inside a model or pipeline to what it was before :func:`vidkern.patch`.

    Args:
        model: a module, or a pipeline (anything with ``components``); one that is not patched stays as it is.
    """
    for root in roots(model).values():
        for module in root.modules():
            _restore(module)


def roots(model: Any) -> dict[str, nn.Module]:
    """Return the modules to look into by name: the model itself under "", or a pipeline's components.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(f"model must be a torch.nn.Module or a pipeline with components, got {type(model).__name__}")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def is_a(module: nn.Module, path: str) -> bool:
    """Return whether a module is of the class "package.module.Name" or a subclass, without importing it."""
    return any(f"{base.__module__}.{base.__qualname__}" == path for base in type(module).__mro__)


def check_class(module: nn.Module, path: str, where: str = "") -> None:
    """Require exactly the class "package.module.Name".

    Raises:
        ValueError: it is a subclass, whose own code a replacement would skip, or another class.
    """
    found = f"{type(module).__module__}.{type(module).__qualname__}"
    if found == path:
        return
    kind = "a subclass of it" if is_a(module, path) else "another class"
    raise ValueError(f"{where or 'the model'} must be a {path} itself, got {kind}: {found}")


def check_unhooked(module: nn.Module, where: str) -> None:
    """Require that nothing wraps a module whose parameters a replacement reads without calling the module.

    Raises:
        ValueError: it has a forward hook, or its forward is replaced.
    """
    reason = why_hooked(module)
    if reason is not None:
        raise ValueError(f"{where} {reason}, which the patched model would not call")


def why_hooked(module: nn.Module) -> str | None:
    """Say what of its own would not be called with a module that is read instead of called, or None."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    held = module.__dict__.get("forward")
    if held is not None and not _is_ours(held) and not _is_original(module, "forward", held):
        return "has a forward of its own"
    return None


def check_sources(model: nn.Module, known: Mapping[str, Mapping[str, str]]) -> None:
    """Require that the classes inside a model have the source code which the replacements were written for.

    Args:
        model: the model; classes are looked up by name, whatever package holds them.
        known: class name to method name to :func:`fingerprint`.

    Raises:
        ValueError: a method has other code, as in another version of its library.
    """
    for cls in dict.fromkeys(type(module) for module in model.modules()):
        check_source(cls, known.get(cls.__name__, {}))


def check_source(cls: type, known: Mapping[str, str]) -> None:
    """Require that methods of a class have the source code which the replacements were written for.

    Args:
        cls: the class.
        known: method name to :func:`fingerprint`.

    Raises:
        ValueError: a method has other code, as in another version of its library.
    """
    for method, wanted in known.items():
        got = fingerprint(getattr(cls, method))
        if got != wanted:
            package = cls.__module__.partition(".")[0]
            version = getattr(__import__(package), "__version__", "of an unknown version")
            raise ValueError(
                f"{cls.__name__}.{method} of {package} {version} is not the code that vidkern knows"
                f" (fingerprint {got}, wanted {wanted})"
            )


def fingerprint(function: Callable[..., Any]) -> str:
    """Return a short hash of a function's source code."""
    try:
        source = inspect.getsource(function)
    except OSError:
        return "no source"
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _slot(module: nn.Module, method: str) -> str:
    return _HOOKED_FORWARD if method == "forward" and _HOOKED_FORWARD in module.__dict__ else method


def _is_ours(held: Any) -> bool:
    return isinstance(held, types.MethodType) and held.__func__.__module__.startswith("vidkern.")


def _is_original(module: nn.Module, method: str, held: Any) -> bool:
    return isinstance(held, types.MethodType) and held.__func__ is getattr(type(module), method, None)


def _restore(module: nn.Module) -> None:
    for name, held in list(module.__dict__.items()):
        if name == _HOOKED_FORWARD and _is_ours(held):
            module.__dict__[name] = types.MethodType(type(module).forward, module)
        elif name == prepared.SLOT or _is_ours(held):
            del module.__dict__[name]

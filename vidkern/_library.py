"""Registers an operator with torch: schema, fake kernel, dispatching implementation, autograd formula.

torch.library's define/impl is used rather than the custom_op decorator: a call costs a third as much.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vidkern._dispatch import Dispatcher, Kernel

_LIBRARY = torch.library.Library("vidkern", "DEF")

#: Every operator defined, by name: what `python -m vidkern doctor` lists.
operators: dict[str, Dispatcher] = {}


def define(
    schema: str,
    *,
    kernels: Mapping[str, Kernel],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    order: Mapping[str, tuple[str, ...]] | None = None,
) -> torch._ops.OpOverload:
    """Define ``vidkern::<schema>`` and return it as a callable torch operator.

    Args:
        schema: name, arguments and results in torch's schema language, without default values.
        kernels: the implementations besides the reference, by backend ("cpu", "triton", "cuda").
        reference: the definition; takes every call.
        fake: returns empty tensors with the results' exact shapes, strides and dtypes.
        order: for a device type, the backends in the order in which measurements prefer them.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.vidkern, name).default
    arguments = [str(argument.type) for argument in operator._schema.arguments]
    every = {**kernels, "reference": Kernel(reference, lambda *_: None)}
    operators[name] = Dispatcher(name, every, arguments.index("Tensor"), order)
    _LIBRARY.impl(name, operators[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"vidkern::{name}", fake, lib=_LIBRARY)
    return operator


def differentiate(
    operator: torch._ops.OpOverload,
    *,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """Give an operator its gradient.

    Args:
        operator: what :func:`define` returned.
        save: ``save(ctx, inputs, output)`` keeps what the backward pass needs; gradients that nobody asked for
            arrive in ``backward`` as None.
        backward: ``backward(ctx, *grads)`` returns a gradient, or None, for every input; it calls a backward operator.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    torch.library.register_autograd(operator._schema.name, backward, setup_context=setup_context, lib=_LIBRARY)

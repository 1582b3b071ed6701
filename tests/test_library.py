"""Operators as public functions call them: straight to the backend, or through torch's dispatcher, with one result."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vidkern import ops


class Seen(TorchDispatchMode):
    """Notes the name of every operator that torch's dispatcher meets."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A tensor subclass that notes what it passes through."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def problem(grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 16, device="cpu")
    return [x.requires_grad_(grad), *(torch.randn(2, 3, 16, device="cpu").requires_grad_(grad) for _ in range(2))]


def test_a_dispatch_mode_sees_the_operators():
    inputs = problem(grad=True)
    with Seen() as seen:
        ops.layer_norm_modulate(*inputs).sum().backward()
    assert "vidkern.layer_norm_modulate.default" in seen.names
    assert "vidkern.layer_norm_modulate_backward.default" in seen.names


def test_a_subclass_sees_the_operator():
    x, shift, scale = problem()
    Wrapped.seen.clear()
    y = ops.layer_norm_modulate(x.as_subclass(Wrapped), shift, scale)
    assert "vidkern.layer_norm_modulate.default" in Wrapped.seen
    assert torch.equal(y.as_subclass(Tensor), ops.layer_norm_modulate(x, shift, scale))


def test_fake_and_meta_tensors_compute_nothing():
    with FakeTensorMode() as mode:
        y = ops.layer_norm_modulate(*(mode.from_tensor(tensor) for tensor in problem()))
    assert y.shape == (2, 3, 5, 16)
    y = ops.layer_norm_modulate(*(tensor.to("meta") for tensor in problem()))
    assert y.is_meta
    assert y.shape == (2, 3, 5, 16)


def test_both_roads_give_the_same_bits():
    def value_and_grads() -> list[Tensor]:
        inputs = problem(grad=True)
        y = ops.layer_norm_modulate(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.cos(torch.arange(y.numel())).view_as(y))]

    straight = value_and_grads()
    with Seen():
        dispatched = value_and_grads()
    assert all(torch.equal(a, b) for a, b in zip(straight, dispatched, strict=True))


@pytest.mark.parametrize("through_the_dispatcher", [False, True])
def test_differentiating_twice_raises(through_the_dispatcher):
    x, shift, scale = problem(grad=True)
    if through_the_dispatcher:
        y = torch.ops.vidkern.layer_norm_modulate(x, shift, scale, 1e-6)[0]
    else:
        y = ops.layer_norm_modulate(x, shift, scale)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_no_graph_where_none_is_wanted():
    inputs = problem(grad=True)
    with torch.no_grad():
        assert not ops.layer_norm_modulate(*inputs).requires_grad
    with torch.inference_mode():
        assert ops.layer_norm_modulate(*inputs).is_inference()
    assert not ops.layer_norm_modulate(*problem()).requires_grad

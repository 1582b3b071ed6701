"""The timestep embedding: against float64 and diffusers, its gradient, compilation, bad input."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from tests.ops.common import assert_compiles_once, assert_contract
from vidkern import ops

every_dtype = pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32], ids=str)


def exact_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """The definition in NumPy's float64."""
    half = dim // 2
    angle = t.double().cpu().numpy()[..., None] * max_period ** (-np.arange(half) / half)
    padding = np.zeros((*t.shape, dim % 2))
    return torch.tensor(np.concatenate([np.cos(angle), np.sin(angle), padding], -1))


@every_dtype
@pytest.mark.parametrize("dim", [2, 3, 8, 256])
@pytest.mark.parametrize("max_period", [10000, 100])
def test_value_meets_the_contract(dtype, dim, max_period):
    t = torch.arange(-1, 1000).reshape(7, 11, 13).to(dtype)
    ours = ops.timestep_embedding(t, dim, max_period)
    plain = get_timestep_embedding(
        t.flatten(), dim, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=max_period
    )
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert_contract("embedding", ours, plain.view(*t.shape, dim), exact_embedding(t, dim, max_period))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0, 3)], ids=str)
def test_any_shape(shape):
    t = torch.randint(1000, shape)
    torch.testing.assert_close(ops.timestep_embedding(t, 16).double(), exact_embedding(t, 16), rtol=0, atol=1e-4)


def test_expanded_timesteps_are_read_in_place():
    t = torch.randint(1000, (3, 1))
    assert torch.equal(ops.timestep_embedding(t.expand(3, 4), 16), ops.timestep_embedding(t.repeat(1, 4), 16))


def test_float64():
    t = torch.rand(2, 3, dtype=torch.float64) * 1000
    torch.testing.assert_close(ops.timestep_embedding(t, 12), exact_embedding(t, 12), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 7, 16])
def test_gradient(dim):
    t = (torch.rand(2, 3, dtype=torch.float64) * 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.timestep_embedding(t, dim), t)


def test_float32_gradient_meets_the_contract():
    torch.manual_seed(0)
    t, upstream = torch.rand(4, 5) * 1000, torch.randn(4, 5, 256)

    def plain(t: Tensor) -> Tensor:
        angle = t[..., None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=t.dtype) / 128)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def grad(function, dtype: torch.dtype) -> Tensor:
        leaf = t.to(dtype).requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, upstream.to(dtype))[0]

    ours = grad(lambda t: ops.timestep_embedding(t, 256), torch.float32)
    assert_contract("dt", ours, grad(plain, torch.float32), grad(plain, torch.float64))


def test_opcheck():
    operators, check = torch.ops.vidkern, torch.library.opcheck
    check(operators.timestep_embedding.default, (torch.randint(1000, (2, 3)), 7, 10000.0))
    check(operators.timestep_embedding.default, (torch.rand(2, 3, requires_grad=True), 8, 100.0))
    check(operators.timestep_embedding_backward.default, (torch.randn(2, 3, 8), torch.rand(2, 3), 100.0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_compiles_once_for_every_size(dtype):
    def make(batch, frames):
        t = torch.randint(1000, (batch, frames)).to(dtype)
        return (t.requires_grad_(dtype.is_floating_point),)

    assert_compiles_once(lambda t: ops.timestep_embedding(t, 256), make, [(5, 3), (2, 8), (3, 2)])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((3, 256), TypeError, r"t must be a torch\.Tensor, got int"),
        ((torch.rand(2).bfloat16(), 256), TypeError, "t must be int64 or int32 or float32 or float64, got bfloat16"),
        ((torch.rand(2), 1), ValueError, "dim must be at least 2, got 1"),
        ((torch.rand(2), 8, 0), ValueError, "max_period must be a positive number, got 0"),
    ],
)
def test_bad_input_is_refused(args, error, message):
    with pytest.raises(error, match=message):
        ops.timestep_embedding(*args)

"""How attention calls CUDA's libraries: every call is bound to the library's signature, then computed on the CPU.

The stand-ins keep the libraries' layouts and demands; on a machine with a GPU the libraries themselves are compared.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vidkern
from tests.ops.common import assert_contract
from vidkern import ops
from vidkern.ops.attention import cuda_library, reference

LIBRARIES = ("flash-attn", "flash", "efficient")


def bind(name: str, args: tuple, options: dict) -> SimpleNamespace:
    """Bind a call to ATen's own schema: unknown, missing and wrongly typed arguments fail."""
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    values = dict(zip((argument.name for argument in arguments), args, strict=False)) | options
    known = {argument.name for argument in arguments}
    assert set(values) <= known, f"{name} has no {set(values) - known}"
    for argument in arguments:
        assert argument.name in values or argument.has_default_value(), f"{name} needs {argument.name}"
        value, kind = values.get(argument.name), str(argument.type)
        if value is not None and argument.name in values:
            wanted = {"Tensor": Tensor, "bool": bool, "float": float, "int": int}[
                kind.removeprefix("Optional[").strip("]")
            ]
            assert isinstance(value, wanted), f"{name}'s {argument.name} is {kind}, got {value!r}"
    return SimpleNamespace(**values)


def flash_forward(*args, **options):
    call = bind("_scaled_dot_product_flash_attention", args, options)
    o, lse = reference.attention(*(x.transpose(1, 2) for x in (call.query, call.key, call.value)), call.scale)
    return o.transpose(1, 2), lse, None, None, 0, 0, None, None, None


def flash_backward(*args, **options):
    call = bind("_scaled_dot_product_flash_attention_backward", args, options)
    assert call.dropout_p == 0.0
    assert not call.is_causal
    assert call.cum_seq_q is call.cum_seq_k is None
    assert call.max_q == call.max_k == call.query.shape[2]
    tokens = (x.transpose(1, 2) for x in (call.grad_out, call.query, call.key, call.value, call.out))
    return tuple(x.transpose(1, 2) for x in reference.attention_backward(*tokens, call.logsumexp, call.scale))


def efficient_forward(*args, **options):
    call = bind("_efficient_attention_forward", args, options)
    assert call.compute_log_sumexp
    assert call.custom_mask_type == 0
    o, lse = reference.attention(call.query, call.key, call.value, call.scale)
    return o, F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf), None, None, 0, 0


def efficient_backward(*args, **options):
    call = bind("_efficient_attention_backward", args, options)
    length = call.query.shape[1]
    assert call.logsumexp.shape[-1] % 32 == 0
    assert call.logsumexp[..., length:].eq(math.inf).all()
    assert call.max_seqlen_q == call.max_seqlen_k == length
    assert not call.bias_requires_grad
    lse = call.logsumexp[..., :length]
    grads = reference.attention_backward(call.grad_out_, call.query, call.key, call.value, call.out, lse, call.scale)
    return (*(torch.stack(grads, 2).unbind(2) if call.shared_storage_dqdkdv else grads), None)


def flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    assert (dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes) == (
        0,
        False,
        -1,
        -1,
        0,
        None,
    )
    return (*reference.attention(q, k, v, softmax_scale), None, None)


def flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    assert (dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes) == (
        0,
        False,
        -1,
        -1,
        0,
        None,
    )
    assert deterministic is False
    grads = reference.attention_backward(dout, q, k, v, out, softmax_lse, softmax_scale)
    for part, grad in zip((dq, dk, dv), grads, strict=True):
        part.copy_(grad)


@pytest.fixture(params=LIBRARIES)
def stand_in(request, monkeypatch):
    """Put the stand-ins in the place of the libraries."""
    aten = SimpleNamespace(
        _scaled_dot_product_flash_attention=flash_forward,
        _scaled_dot_product_flash_attention_backward=flash_backward,
        _efficient_attention_forward=efficient_forward,
        _efficient_attention_backward=efficient_backward,
    )
    flash_attn = SimpleNamespace(_flash_attn_forward=flash_attn_forward, _flash_attn_backward=flash_attn_backward)
    monkeypatch.setattr(cuda_library, "_aten", aten)
    monkeypatch.setattr(cuda_library, "_flash_attn", lambda: flash_attn)
    monkeypatch.setattr(cuda_library, "_library", lambda q, k, v: request.param)
    return request.param


@pytest.mark.parametrize("length", [5, 32, 40])
def test_calls_fit_the_signatures_and_results_are_the_definitions(stand_in, length):
    torch.manual_seed(0)
    qkv, do = torch.randn(3, length, 3, 2, 72), torch.randn(3, length, 2, 72)
    q, k, v = qkv.unbind(2)
    o, lse = cuda_library.attention_packed(qkv, 0.1)
    assert lse.shape == (3, 2, length)
    assert lse.is_contiguous()
    assert o.is_contiguous()
    for got, wanted in zip((o, lse), reference.attention(q, k, v, 0.1), strict=True):
        assert torch.equal(got, wanted)
    wanted = torch.stack(reference.attention_backward(do, q, k, v, o, lse, 0.1), 2)
    dqkv = cuda_library.attention_packed_backward(do, qkv, o, lse, 0.1)
    apart = cuda_library.attention_backward(do, q, k, v, o, lse, 0.1)
    assert torch.equal(dqkv, wanted)
    assert dqkv.is_contiguous()
    assert torch.equal(torch.stack(apart, 2), wanted)


def test_there_is_a_reason_where_no_library_serves():
    empty = torch.empty(0, 4, 2, 72)
    assert "no CUDA library takes torch.float32, head size 72" in cuda_library.supports(empty, empty, empty)
    odd = torch.empty(1, 4, 2, 20)
    assert "head size 20" in cuda_library.supports(odd, odd, odd)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [32, 64, 72, 128])
@pytest.mark.parametrize("operator", [ops.spatial_attention, ops.joint_attention], ids=lambda o: o.__name__)
def test_the_libraries_on_cuda_meet_the_contract(dtype, d, operator):
    torch.manual_seed(0)
    qkv = torch.randn(2, 3, 40, 3, 4, d, device="cuda").to(dtype).requires_grad_()
    upstream = torch.randn(2, 3, 40, 4, d, device="cuda").to(dtype)
    groups = (0, 1) if operator is ops.spatial_attention else (1, 2)

    def plain(qkv):
        q, k, v = (x.flatten(*groups).transpose(1, 2) for x in qkv.unbind(3))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(upstream.shape)

    with vidkern.backend("cuda"):
        o = operator(qkv)
        (dqkv,) = torch.autograd.grad(o, qkv, upstream)
    exact_qkv = qkv.detach().double().requires_grad_()
    exact, plain_o = plain(exact_qkv), plain(qkv)
    (exact_grad,) = torch.autograd.grad(exact, exact_qkv, upstream.double())
    (plain_grad,) = torch.autograd.grad(plain_o, qkv, upstream)
    assert_contract("o", o.detach(), plain_o.detach(), exact.detach())
    assert_contract("dqkv", dqkv, plain_grad, exact_grad)

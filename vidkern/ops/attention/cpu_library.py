"""Attention within groups of tokens by ATen's flash attention for the CPU, on strided views of q, k and v."""

import torch
from torch import Tensor

_aten = torch.ops.aten


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)  # (G, L, H, d) -> (G, H, L, d), a view


def supports(q: Tensor) -> str | None:
    """Say why ATen cannot take q (G, L, H, d) or qkv (G, L, 3, H, d)."""
    return "an empty tensor is the reference's" if q.numel() == 0 else None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (o, lse) of q, k, v (G, L, H, d)."""
    o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), scale=scale)
    return o.transpose(1, 2).contiguous(), lse.contiguous()


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv)."""
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(do, q, k, v, o), lse, 0.0, False, scale=scale
    )
    dq, dk, dv = (grad.transpose(1, 2).contiguous() for grad in grads)
    return dq, dk, dv


def attention_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (o, lse) of qkv (G, L, 3, H, d)."""
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale)


def attention_packed_backward(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv."""
    q, k, v = qkv.unbind(2)
    dqkv = qkv.new_empty(qkv.shape)
    grads = attention_backward(do, q, k, v, o, lse, scale)
    for part, grad in zip(dqkv.unbind(2), grads, strict=True):
        part.copy_(grad)
    return dqkv

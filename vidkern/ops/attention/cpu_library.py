"""Attention within groups of tokens by ATen's flash attention for the CPU, on strided views of q, k and v.

16-bit tokens go through it as float32 copies: its 16-bit kernels turn NaN and Inf of the scores into 0, and take
longer (measured with AVX-512, d = 64 and 72, 16 to 1024 tokens: forward 0.7 to 4 times as long, backward 0.7 to 14).
"""

import torch
from torch import Tensor

_aten = torch.ops.aten

#: Floats of the widest vector (AVX-512). Over fewer keys ATen finds a row's maximum with comparisons, which a NaN
#: fails: a query whose scores are all NaN, or all -inf, would come out as 0.
_VECTOR = 16


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(_wide(x).transpose(1, 2) for x in tensors)  # (G, L, H, d) -> (G, H, L, d), a view


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(1, 2).to(dtype).contiguous()


def supports(q: Tensor) -> str | None:
    """Say why ATen cannot take q (G, L, H, d) or qkv (G, L, 3, H, d)."""
    if q.numel() == 0:
        return "an empty tensor is the reference's"
    length = q.shape[1]
    return f"fewer than {_VECTOR} keys are the reference's: ATen loses NaN there" if length < _VECTOR else None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (o, lse) of q, k, v (G, L, H, d)."""
    o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), scale=scale)
    return _tokens(o, q.dtype), lse.contiguous()


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv)."""
    dq, dk, dv = (_tokens(grad, q.dtype) for grad in _gradients(do, q, k, v, o, lse, scale))
    return dq, dk, dv


def _gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv (G, H, L, d) in float32 or wider."""
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(do, q, k, v, o), lse, 0.0, False, scale=scale
    )


def attention_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (o, lse) of qkv (G, L, 3, H, d)."""
    q, k, v = _wide(qkv).unbind(2)  # cast as one: each apart takes three times as long
    o, lse = attention(q, k, v, scale)
    return o.to(qkv.dtype), lse


def attention_packed_backward(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv."""
    q, k, v = _wide(qkv).unbind(2)
    dqkv = qkv.new_empty(qkv.shape)
    for part, grad in zip(dqkv.unbind(2), _gradients(do, q, k, v, o, lse, scale), strict=True):
        part.copy_(grad.transpose(1, 2))  # rounded on its way
    return dqkv

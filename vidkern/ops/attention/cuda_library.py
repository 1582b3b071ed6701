"""Attention within groups of tokens on CUDA, on strided views of q, k and v: by flash-attn where it is installed,
else by ATen's flash or memory-efficient attention.

The gradient's sums keep a fixed order only under ``torch.use_deterministic_algorithms(True)``: these libraries'.
"""

import functools
import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten

#: ATen's memory-efficient kernels keep the log-sum-exp in rows of a multiple of this length.
_LSE_ALIGNMENT = 32
_HEAD_GRANULE = 8
_HEAD_MAX = 256


def unavailable() -> str | None:
    """Say why no library can run on this machine."""
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@functools.cache
def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash_attn() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)  # (G, L, H, d) -> (G, H, L, d), a view


def _library(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Name the library that takes the call: "flash-attn", "flash" or "efficient" (ATen's), or None."""
    d = q.shape[-1]
    if q.numel() == 0 or d % _HEAD_GRANULE or d > _HEAD_MAX:
        return None
    q, k, v = _heads_first(q, k, v)
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if torch.backends.cuda.can_use_flash_attention(params):
        return "flash-attn" if _flash_attn_installed() else "flash"
    return "efficient" if torch.backends.cuda.can_use_efficient_attention(params) else None


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why no library takes q, k, v (G, L, H, d)."""
    if _library(q, k, v) is not None:
        return None
    return f"no CUDA library takes {q.dtype}, head size {q.shape[-1]} and shape {tuple(q.shape)}"


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (o, lse) of q, k, v (G, L, H, d)."""
    library = _library(q, k, v)
    if library == "flash-attn":
        o, lse, *_ = _flash_attn()._flash_attn_forward(
            q, k, v, 0.0, scale, False, -1, -1, 0.0, None, False
        )  # no dropout, not causal, no window, no softcap, no ALiBi
    elif library == "flash":
        o, lse, *_ = _aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v), scale=scale)
        o = o.transpose(1, 2)
    else:
        o, lse, *_ = _aten._efficient_attention_forward(
            q, k, v, None, None, None, None, None, 0.0, 0, True, scale=scale
        )
        lse = lse[..., : q.shape[1]]
    return o.contiguous(), lse.contiguous()


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv)."""
    library = _library(q, k, v)
    if library == "flash-attn":
        grads: tuple[Tensor, ...] = tuple(q.new_empty(q.shape) for _ in range(3))
        _flash_attn_backward_into(grads, do, q, k, v, o, lse, scale)
    elif library == "flash":
        grads = _flash_backward(do, q, k, v, o, lse, scale)
    else:
        grads = _efficient_backward(do, q, k, v, o, lse, scale, packed=False)
    dq, dk, dv = (grad.contiguous() for grad in grads)
    return dq, dk, dv


def attention_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (o, lse) of qkv (G, L, 3, H, d)."""
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale)


def attention_packed_backward(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv."""
    q, k, v = qkv.unbind(2)
    library = _library(q, k, v)
    if library == "efficient":
        dq, _, _ = _efficient_backward(do, q, k, v, o, lse, scale, packed=True)
        return dq.as_strided(qkv.shape, torch.empty(qkv.shape, device="meta").stride())  # all of dq's storage
    dqkv = qkv.new_empty(qkv.shape)
    if library == "flash-attn":
        _flash_attn_backward_into(dqkv.unbind(2), do, q, k, v, o, lse, scale)
        return dqkv
    for part, grad in zip(dqkv.unbind(2), _flash_backward(do, q, k, v, o, lse, scale), strict=True):
        part.copy_(grad)
    return dqkv


def _flash_attn_backward_into(
    grads: tuple[Tensor, ...],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    _flash_attn()._flash_attn_backward(do, q, k, v, o, lse, *grads, 0.0, scale, False, -1, -1, 0.0, None, deterministic)


def _unused_seed(q: Tensor) -> Tensor:
    return q.new_empty((), dtype=torch.int64)  # dropout's, and there is none


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    length, seed = q.shape[1], _unused_seed(q)
    grads = _aten._scaled_dot_product_flash_attention_backward(
        *_heads_first(do, q, k, v, o), lse, None, None, length, length, 0.0, False, seed, seed, scale=scale
    )
    return _heads_first(*grads)


def _efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, *, packed: bool
) -> tuple[Tensor, ...]:
    """Return (dq, dk, dv); packed: as views of one (G, L, 3, H, d) tensor that fills their storage."""
    length, seed = q.shape[1], _unused_seed(q)
    padded_lse = F.pad(lse, (0, -length % _LSE_ALIGNMENT), value=math.inf)  # as the forward kernel pads it
    grads = _aten._efficient_attention_backward(
        do,
        q,
        k,
        v,
        None,
        o,
        None,
        None,
        length,
        length,
        padded_lse,
        0.0,
        seed,
        seed,
        0,
        False,
        scale=scale,
        shared_storage_dqdkdv=packed,
    )
    return tuple(grads[:3])

"""What the attention operators mean, in plain PyTorch.

Scores, softmax and sums are taken in float32 (float64 for float64 input), with one rounding at the end.
"""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _turn(x: Tensor) -> Tensor:
    """Turn every pair (x[2i], x[2i+1]) of channels by a quarter: (-x[2i+1], x[2i])."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), -1).flatten(-2)


def _turn_back(x: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((odd, -even), -1).flatten(-2)


def _rope_tables(cos: Tensor, sin: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return cos.to(x.dtype)[:, None, None], sin.to(x.dtype)[:, None, None]  # (F, 1, 1, d), beside (B, F, N, H, d)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotate x (B, F, N, H, d) by its frame's angles: x * cos + turn(x) * sin."""
    if cos is None or sin is None:
        return x
    cos, sin = _rope_tables(cos, sin, x)
    return x * cos + _turn(x) * sin


def rotate_backward(grad: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Return the gradient of x from that of ``rotate(x, cos, sin)``."""
    if cos is None or sin is None:
        return grad
    cos, sin = _rope_tables(cos, sin, grad)
    return grad * cos + _turn_back(grad * sin)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    scores = torch.einsum("bfnhd,bgnhd->bnhfg", q, k) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row in which everything is masked is zero."""
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(nothing, 0)


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """Return o (B, F, N, H, d): attention over F at each (b, n) and head."""
    wide_q, wide_k = rotate(_wide(q), cos, sin), rotate(_wide(k), cos, sin)
    p = _softmax(_scores(wide_q, wide_k, bias, scale, causal))
    return torch.einsum("bnhfg,bgnhd->bfnhd", p, _wide(v)).to(q.dtype).contiguous()


def temporal_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dbias), with everything computed again from the inputs; dbias is empty unless asked for."""
    wide_q, wide_k, wide_do = rotate(_wide(q), cos, sin), rotate(_wide(k), cos, sin), _wide(do)
    p = _softmax(_scores(wide_q, wide_k, bias, scale, causal))
    dp = torch.einsum("bfnhd,bgnhd->bnhfg", wide_do, _wide(v))
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq = rotate_backward(torch.einsum("bnhfg,bgnhd->bfnhd", ds, wide_k) * scale, cos, sin)
    dk = rotate_backward(torch.einsum("bnhfg,bfnhd->bgnhd", ds, wide_q) * scale, cos, sin)
    dv = torch.einsum("bnhfg,bfnhd->bgnhd", p, wide_do)
    dbias = ds.sum((0, 1)) if bias_grad else ds.new_empty(0)
    dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in (dq, dk, dv))
    return dq, dk, dv, dbias


def temporal_attention_packed(
    qkv: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Return :func:`temporal_attention` of the three parts of qkv (B, F, N, 3, H, d)."""
    q, k, v = qkv.unbind(3)
    return temporal_attention(q, k, v, bias, cos, sin, scale, causal)


def temporal_attention_packed_backward(
    do: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dqkv, dbias)."""
    q, k, v = qkv.unbind(3)
    *grads, dbias = temporal_attention_backward(do, q, k, v, bias, cos, sin, scale, causal, bias_grad)
    return torch.stack(grads, 3), dbias


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return o (G, L, H, d), attention over L in each group and head, and the scores' log-sum-exp (G, H, L)."""
    scores = torch.einsum("glhd,gmhd->ghlm", _wide(q), _wide(k)) * scale
    o = torch.einsum("ghlm,gmhd->glhd", scores.softmax(-1), _wide(v))
    return o.to(q.dtype).contiguous(), scores.logsumexp(-1)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv)."""
    wide_q, wide_k, wide_do = _wide(q), _wide(k), _wide(do)
    p = (torch.einsum("glhd,gmhd->ghlm", wide_q, wide_k) * scale - lse.unsqueeze(-1)).exp()
    dp = torch.einsum("glhd,gmhd->ghlm", wide_do, _wide(v))
    delta = torch.einsum("glhd,glhd->ghl", wide_do, _wide(o))
    ds = p * (dp - delta.unsqueeze(-1))
    dq = torch.einsum("ghlm,gmhd->glhd", ds, wide_k) * scale
    dk = torch.einsum("ghlm,glhd->gmhd", ds, wide_q) * scale
    dv = torch.einsum("ghlm,glhd->gmhd", p, wide_do)
    dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in (dq, dk, dv))
    return dq, dk, dv


def attention_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return :func:`attention` of the three parts of qkv (G, L, 3, H, d)."""
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale)


def attention_packed_backward(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv."""
    q, k, v = qkv.unbind(2)
    return torch.stack(attention_backward(do, q, k, v, o, lse, scale), 2)

"""What the attention operators mean, in plain PyTorch.

Scores, softmax and sums are taken in float32 (float64 for float64 input), with one rounding at the end.
"""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _problems(x: Tensor) -> Tensor:
    """Return x (B, F, N, H, d) as one F x d matrix for each (b, n, h), in float32 or wider."""
    return _wide(x).permute(0, 2, 3, 1, 4).contiguous()


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).to(dtype).contiguous()  # (B, N, H, F, d) -> (B, F, N, H, d)


def _quarter_turn(x: Tensor) -> Tensor:
    """Turn every pair of channels (x[2i], x[2i+1]) into (-x[2i+1], x[2i])."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), -1).flatten(-2)


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotate x (..., F, d) by its frame's angles."""
    if cos is None or sin is None:
        return x
    return x * cos.to(x.dtype) + _quarter_turn(x) * sin.to(x.dtype)


def _rotate_backward(grad: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None or sin is None:
        return grad
    return grad * cos.to(grad.dtype) - _quarter_turn(grad * sin.to(grad.dtype))  # a quarter turn's transpose is its -1


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Return softmax(scale * q k^T + bias) over the keys; zeros for a query with every key masked."""
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
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
    wide_q, wide_k = _rotate(_problems(q), cos, sin), _rotate(_problems(k), cos, sin)
    p = _probabilities(wide_q, wide_k, bias, scale, causal)
    return _tokens(p @ _problems(v), q.dtype)


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
    wide_q, wide_k, wide_do = _rotate(_problems(q), cos, sin), _rotate(_problems(k), cos, sin), _problems(do)
    p = _probabilities(wide_q, wide_k, bias, scale, causal)
    dp = wide_do @ _problems(v).mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq = _rotate_backward(ds @ wide_k * scale, cos, sin)
    dk = _rotate_backward(ds.mT @ wide_q * scale, cos, sin)
    dq, dk, dv = (_tokens(grad, q.dtype) for grad in (dq, dk, p.mT @ wide_do))
    return dq, dk, dv, ds.sum((0, 1)) if bias_grad else ds.new_empty(0)


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
    wide_q, wide_k, wide_v = (_wide(x).contiguous() for x in (q, k, v))
    scores = torch.einsum("glhd,gmhd->ghlm", wide_q, wide_k) * scale
    o = torch.einsum("ghlm,gmhd->glhd", scores.softmax(-1), wide_v)
    return o.to(q.dtype).contiguous(), scores.logsumexp(-1)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv)."""
    wide_q, wide_k, wide_v, wide_do = (_wide(x).contiguous() for x in (q, k, v, do))
    p = (torch.einsum("glhd,gmhd->ghlm", wide_q, wide_k) * scale - lse.unsqueeze(-1)).exp()
    dp = torch.einsum("glhd,gmhd->ghlm", wide_do, wide_v)
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

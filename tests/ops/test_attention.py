"""The attention operators as users call them: definition, registration, gradients, compilation, bad input."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import vidkern
from tests.ops.common import assert_compiles_once, assert_value_and_grads
from vidkern import ops

OPERATORS = (ops.temporal_attention, ops.spatial_attention, ops.joint_attention)
REGISTERED = {
    ops.temporal_attention: "temporal_attention",
    ops.spatial_attention: "attention",
    ops.joint_attention: "attention",
}
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_form = pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate as a multiplication by complex numbers: x (B, N, H, F, d), tables (F, d) with each angle twice."""
    dtype = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    pairs = torch.view_as_complex(x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos[:, ::2].double(), sin[:, ::2].double()).to(dtype)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def plain_temporal(q, k, v, bias=None, rope=None, causal=False, scale=None):
    q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))  # (B, N, H, F, d)
    if rope is not None:
        q, k = plain_rope(q, *rope), plain_rope(k, *rope)
    mask = None if bias is None else bias.to(q.dtype)
    if causal:
        frames = q.shape[-2]
        later = torch.full((frames, frames), -math.inf, dtype=q.dtype).triu(1)
        mask = later if mask is None else mask + later
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return o.permute(0, 3, 1, 2, 4)


def plain_spatial(q, k, v):
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def plain_joint(q, k, v):
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def plain_of(operator):
    """Return the plain writing of packed qkv, with the result as (B, F, N, H, d)."""
    plain = {ops.temporal_attention: plain_temporal, ops.spatial_attention: plain_spatial}.get(operator, plain_joint)
    return lambda qkv: plain(*qkv.unbind(3)).reshape(*qkv.shape[:3], *qkv.shape[4:])


def rope_tables(frames: int, d: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(frames)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    return angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)


@every_operator
@every_dtype
@pytest.mark.parametrize("shape", [(2, 5, 7, 3, 2, 72), (1, 1, 1, 3, 1, 32), (1, 16, 3, 3, 1, 64)], ids=str)
def test_value_and_gradient_meet_the_contract(operator, dtype, shape):
    torch.manual_seed(0)
    qkv, upstream = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:3], *shape[4:], dtype=torch.float64)
    assert_value_and_grads(operator, plain_of(operator), [qkv], [upstream], dtype)


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_bias_rope_causal_and_scale_meet_the_contract(dtype, causal):
    torch.manual_seed(0)
    shape = (2, 6, 5, 3, 2, 32)
    rope = rope_tables(6, 32)
    inputs = [torch.randn(shape, dtype=torch.float64), torch.randn(2, 6, 6, dtype=torch.float64)]

    def ours(qkv, bias):
        tables = tuple(table.to(torch.promote_types(qkv.dtype, torch.float32)) for table in rope)
        return ops.temporal_attention(qkv, bias=bias, rope=tables, causal=causal, scale=0.3)

    def plain(qkv, bias):
        return plain_temporal(*qkv.unbind(3), bias, rope, causal, 0.3)

    assert_value_and_grads(ours, plain, inputs, [torch.randn(2, 6, 5, 2, 32, dtype=torch.float64)], dtype)


@every_operator
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_given_apart_equals_packed_on_every_backend(operator, backend):
    torch.manual_seed(0)
    qkv = torch.randn(2, 4, 17, 3, 2, 32, requires_grad=True)
    parts = [part.detach().requires_grad_() for part in qkv.unbind(3)]
    upstream = torch.randn(2, 4, 17, 2, 32)
    with vidkern.backend(backend):
        packed, apart = operator(qkv), operator(tuple(parts))
        (dqkv,) = torch.autograd.grad(packed, qkv, upstream)
        grads = torch.autograd.grad(apart, parts, upstream)
    assert torch.equal(packed, apart)
    assert torch.equal(dqkv, torch.stack(grads, 3))
    assert dqkv.is_contiguous()


def test_rope_pairs_neighbouring_channels_as_diffusers_rotates_cogvideox():
    from diffusers.models.embeddings import apply_rotary_emb

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 4, 2, 64)
    cos, sin = rope_tables(6, 64)
    turned = [apply_rotary_emb(x.permute(0, 2, 3, 1, 4).flatten(0, 1), (cos, sin)).unflatten(0, (2, 4)) for x in (q, k)]
    wanted = plain_temporal(*(x.permute(0, 3, 1, 2, 4) for x in turned), v)
    torch.testing.assert_close(ops.temporal_attention((q, k, v), rope=(cos, sin)), wanted)


def test_rope_with_unit_tables_in_the_tail_rotates_a_part_of_the_head():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 5, 2, 1, 64, dtype=torch.float64)
    cos, sin = (table.double() for table in rope_tables(5, 32))
    ones, zeros = torch.ones_like(cos), torch.zeros_like(sin)
    whole = ops.temporal_attention((q, k, v), rope=(torch.cat((cos, ones), 1), torch.cat((sin, zeros), 1)))

    def turn(x):
        return torch.cat(
            (plain_rope(x[..., :32].permute(0, 2, 3, 1, 4), cos, sin).permute(0, 3, 1, 2, 4), x[..., 32:]), -1
        )

    torch.testing.assert_close(whole, plain_temporal(turn(q), turn(k), v))


def test_rope_makes_scores_depend_on_the_distance_of_frames_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 32, dtype=torch.float64)
    v = torch.randn(1, 8, 1, 1, 32, dtype=torch.float64)
    cos, sin = (table.double() for table in rope_tables(11, 32))
    same = tuple(x.expand(1, 8, 1, 1, 32) for x in (q, k))
    first = ops.temporal_attention((*same, v), rope=(cos[:8], sin[:8]))
    later = ops.temporal_attention((*same, v), rope=(cos[3:], sin[3:]))
    torch.testing.assert_close(first, later)


def test_a_masked_key_has_no_influence_and_a_wholly_masked_query_gives_zero():
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 3, 2, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 5, 5, dtype=torch.float64)
    bias[:, :, 3] = -math.inf
    bias[0, 2] = -math.inf
    bias.requires_grad_()
    o = ops.temporal_attention(qkv, bias=bias)
    kept = [0, 1, 2, 4]
    q, k, v = qkv.unbind(3)
    mask = bias[..., kept].clone()
    mask[0, 2] = 0
    q_, k_, v_ = (x.permute(0, 2, 3, 1, 4) for x in (q, k[:, kept], v[:, kept]))
    wanted = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask).permute(0, 3, 1, 2, 4)
    assert torch.equal(o[:, 2, :, 0], torch.zeros(2, 3, 32, dtype=torch.float64))
    silent = torch.ones(5, 2, 1, dtype=torch.bool)
    silent[2, 0] = False
    torch.testing.assert_close(o, wanted * silent[:, None])
    upstream = torch.randn_like(o)
    grads = torch.autograd.grad(o, (qkv, bias), upstream)
    plain_grads = torch.autograd.grad(wanted * silent[:, None], (qkv, bias), upstream)
    assert torch.equal(grads[0][:, 3, :, 1:], torch.zeros(2, 3, 2, 2, 32, dtype=torch.float64))
    for grad, plain in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, plain)


@pytest.mark.parametrize("learned", [True, False])
def test_the_gradient_of_a_bias_is_summed_where_it_is_learned_only(learned):
    torch.manual_seed(0)
    qkv = torch.randn(2, 3, 4, 3, 2, 32, requires_grad=True)
    o = ops.temporal_attention(qkv, bias=torch.randn(2, 3, 3, requires_grad=learned))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.vidkern.temporal_attention_packed_backward.default:
                self.dbias = result[1]
            return result

    with Watch() as watch:
        o.sum().backward()
    assert watch.dbias.shape == ((2, 3, 3) if learned else (0,))


def test_causal_frames_do_not_see_later_ones():
    torch.manual_seed(0)
    qkv = torch.randn(1, 6, 2, 3, 1, 32)
    changed = qkv.clone()
    changed[:, 4:] += 1
    before, after = (ops.temporal_attention(x, causal=True) for x in (qkv, changed))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    torch.testing.assert_close(ops.temporal_attention(qkv[:, :3], causal=True), before[:, :3])


def registered_args(operator, packed: bool, requires_grad: bool) -> tuple:
    """Return the registered operator and its arguments."""
    name = REGISTERED[operator] + ("_packed" if packed else "")
    if operator is ops.temporal_attention:
        shape = (2, 4, 3, 3, 1, 32) if packed else (3, 2, 4, 3, 1, 32)
        bias = torch.randn(1, 4, 4, requires_grad=requires_grad)
        rest = (bias, *rope_tables(4, 32), 0.2, True)
    else:
        shape = (3, 4, 3, 2, 32) if packed else (3, 3, 4, 2, 32)
        rest = (0.2,)
    tokens = torch.randn(shape).requires_grad_(requires_grad)
    return getattr(torch.ops.vidkern, name).default, ((tokens,) if packed else tuple(tokens.unbind(0))) + rest


@every_operator
@every_form
def test_opcheck(operator, packed):
    torch.manual_seed(0)
    torch.library.opcheck(*registered_args(operator, packed, requires_grad=True))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("bias_grad", [True, False])
def test_opcheck_of_the_temporal_backward(packed, bias_grad):
    torch.manual_seed(0)
    operator, args = registered_args(ops.temporal_attention, packed, requires_grad=False)
    backward = getattr(torch.ops.vidkern, operator._schema.name.split("::")[1] + "_backward").default
    torch.library.opcheck(backward, (torch.randn(2, 4, 3, 1, 32), *args, bias_grad))


@every_form
def test_opcheck_of_the_library_backward(packed):
    torch.manual_seed(0)
    operator, (*tokens, scale) = registered_args(ops.spatial_attention, packed, requires_grad=False)
    o, lse = operator(*tokens, scale)
    backward = getattr(torch.ops.vidkern, operator._schema.name.split("::")[1] + "_backward").default
    torch.library.opcheck(backward, (torch.randn_like(o), *tokens, o, lse, scale))


@every_operator
@every_form
def test_gradcheck(operator, packed):
    torch.manual_seed(0)
    qkv = torch.randn(1, 3, 2, 3, 1, 32, dtype=torch.float64, requires_grad=True)
    if packed:
        assert torch.autograd.gradcheck(operator, qkv)
    else:
        parts = [part.detach().requires_grad_() for part in qkv.unbind(3)]
        assert torch.autograd.gradcheck(lambda *parts: operator(parts), parts)


def test_gradcheck_with_bias_rope_and_causal():
    torch.manual_seed(0)
    qkv = torch.randn(1, 3, 2, 3, 1, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    rope = tuple(table.double() for table in rope_tables(3, 32))
    assert torch.autograd.gradcheck(
        lambda qkv, bias: ops.temporal_attention(qkv, bias=bias, rope=rope, causal=True), (qkv, bias)
    )


@every_operator
@every_form
def test_compiles_once_for_every_batch_frames_and_tokens(operator, packed):
    torch.manual_seed(0)

    def make(batch: int, frames: int, tokens: int) -> list[Tensor]:
        if packed:
            return [torch.randn(batch, frames, tokens, 3, 2, 32, requires_grad=True)]
        return [torch.randn(batch, frames, tokens, 2, 32, requires_grad=True) for _ in range(3)]

    function = operator if packed else lambda *parts: operator(parts)
    assert_compiles_once(function, make, [(4, 6, 5), (2, 3, 7), (3, 8, 6), (5, 2, 2)])


def test_compiles_once_with_bias_rope_and_causal():
    torch.manual_seed(0)

    def make(batch: int, frames: int, tokens: int) -> list[Tensor]:
        qkv = torch.randn(batch, frames, tokens, 3, 2, 32, requires_grad=True)
        return [qkv, torch.randn(2, frames, frames, requires_grad=True), *rope_tables(frames, 32)]

    def function(qkv, bias, cos, sin):
        return ops.temporal_attention(qkv, bias=bias, rope=(cos, sin), causal=True)

    assert_compiles_once(function, make, [(4, 6, 5), (2, 3, 7), (3, 8, 6)])


@every_operator
@every_dtype
def test_strided_parts_are_read_where_they_lie(operator, dtype):
    torch.manual_seed(0)
    wide = torch.randn(3, 2, 4, 5, 2, 80, dtype=dtype)
    q, k, v = (x[..., :64] for x in wide)
    k = k.transpose(-2, -3).contiguous().transpose(-2, -3)  # heads before tokens
    packed = tuple(x.contiguous() for x in (q, k, v))
    if operator is not ops.joint_attention:
        wanted, got = operator(packed), operator((q, k, v))
        assert torch.equal(got, wanted)
        assert got.is_contiguous()
    views = tuple(x.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4) for x in packed)  # batch innermost
    if operator is not ops.spatial_attention:
        assert torch.equal(operator(views), operator(packed))


@every_operator
def test_expanded_upstream_gradients(operator):
    torch.manual_seed(0)
    qkv = torch.randn(2, 3, 4, 3, 2, 32, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(operator(qkv).sum(), qkv)
    (wanted,) = torch.autograd.grad(operator(qkv), qkv, torch.ones(2, 3, 4, 2, 32, dtype=torch.float64))
    assert torch.equal(got, wanted)
    assert got.abs().max() > 0


def test_spatial_attention_of_some_frames_of_a_clip():
    torch.manual_seed(0)
    clip = torch.randn(2, 5, 4, 3, 2, 32, requires_grad=True)
    some = clip[:, 1:4]
    upstream = torch.randn(2, 3, 4, 2, 32)
    got, wanted = ops.spatial_attention(some), ops.spatial_attention(some.contiguous())
    assert torch.equal(got, wanted)
    grads = [torch.autograd.grad(o, clip, upstream)[0] for o in (got, wanted)]
    assert torch.equal(*grads)


@every_operator
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(operator, shape):
    qkv = torch.randn(*shape, 3, 2, 32, requires_grad=True)
    o = operator(qkv)
    assert o.shape == (*shape, 2, 32)
    (grad,) = torch.autograd.grad(o.sum(), qkv)
    assert grad.shape == qkv.shape


@every_operator
def test_the_same_call_gives_the_same_bits(operator):
    torch.manual_seed(0)
    qkv = torch.randn(2, 4, 33, 3, 2, 64, requires_grad=True)
    outputs = [operator(qkv) for _ in range(2)]
    grads = [torch.autograd.grad(o.square().sum(), qkv)[0] for o in outputs]
    assert torch.equal(*outputs)
    assert torch.equal(*grads)


@every_operator
def test_nan_and_infinity_stay_in_their_group(operator):
    torch.manual_seed(0)
    qkv = torch.randn(2, 3, 4, 3, 2, 32)
    qkv[0, 1, 2, 0, 1, 5] = math.nan
    qkv[1, 2, 3, 1, 0, 7] = math.inf
    got = operator(qkv)
    with sdpa_kernel(SDPBackend.MATH):  # the flash kernel turns NaN of a few keys into 0
        wanted = plain_of(operator)(qkv)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert got.isnan().any()
    torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 16, 33])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_library_keeps_nan_and_infinity(dtype, tokens, part, value):
    torch.manual_seed(0)
    qkv = torch.randn(2, 1, tokens, 3, 1, 32).to(dtype)
    qkv[0, 0, tokens // 2, part, 0, 5] = value
    got = ops.spatial_attention(qkv)
    with vidkern.backend("reference"):
        wanted = ops.spatial_attention(qkv)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())


class Allocations(TorchDispatchMode):
    """Collects the names of the operators that give new tensors as large as the tokens."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)
        }
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.numel() >= self.numel and x.untyped_storage().data_ptr() not in inputs:
                self.names.append(str(func))
        return result


@every_operator
def test_nothing_but_the_result_and_one_packed_gradient_is_made(operator):
    torch.manual_seed(0)
    qkv = torch.randn(2, 4, 6, 3, 2, 32, requires_grad=True)
    upstream = torch.randn(2, 4, 6, 2, 32)
    with Allocations(upstream.numel()) as forward:
        o = operator(qkv)
    with Allocations(upstream.numel()) as backward:
        torch.autograd.grad(o, qkv, upstream)
    name = f"vidkern.{REGISTERED[operator]}_packed"
    assert forward.names == [f"{name}.default"]
    assert backward.names == [f"{name}_backward.default"]


def test_the_library_is_called_on_views_and_copies_no_tokens():
    from vidkern.ops.attention import cpu_library

    torch.manual_seed(0)
    qkv = torch.randn(3, 64, 3, 2, 72)
    with Allocations(64 * 72) as forward:
        o, lse = cpu_library.attention_packed(qkv, 0.1)
    with Allocations(64 * 72) as backward:
        cpu_library.attention_packed_backward(torch.randn_like(o), qkv, o, lse, 0.1)
    sdpa = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert forward.names == [f"{sdpa}.default"]
    assert backward.names.count(f"{sdpa}_backward.default") == 3  # dq, dk, dv, copied into dqkv
    assert not [name for name in backward.names if "clone" in name or "contiguous" in name]


def plain_axial(q, k, v, size, axis: int):
    """Attend along an axis (0 frames, 1 height, 2 width) of (B, F, height, width) by moving it to the end."""
    grid = [x.unflatten(2, size).movedim(1 + axis, -2) for x in (q, k, v)]  # (B, ., ., H, L, d)
    o = F.scaled_dot_product_attention(*grid)
    return o.movedim(-2, 1 + axis).flatten(2, 3)


@every_form
@pytest.mark.parametrize("heads", [None, (4, 0, 0), (0, 4, 0), (0, 0, 4), (1, 1, 2)], ids=str)
def test_axial_attention(packed, heads):
    torch.manual_seed(0)
    qkv = torch.randn(2, 3, 20, 3, 4, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unbind(3)
    counts = (2, 1, 1) if heads is None else heads
    shares = zip(*(x.split(list(counts), -2) for x in (q, k, v)), strict=True)
    wanted = torch.cat([plain_axial(*share, (4, 5), axis) for axis, share in enumerate(shares)], -2)
    got = ops.axial_attention(qkv if packed else (q, k, v), (4, 5), heads=heads)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(o, qkv, upstream)[0] for o in (got, wanted)))


def plain_local_global(q, k, v, size, window, stride, local_heads):
    """Joint attention under a mask that lets a token see its block, or its grid."""
    frames, (height, width) = q.shape[1], size
    at = torch.cartesian_prod(*(torch.arange(extent) for extent in (frames, height, width)))
    block, residue = at // torch.tensor(window), at % torch.tensor(stride)
    same = [(key[:, None] == key[None]).all(-1) for key in (block, residue)]
    heads = [same[0]] * local_heads + [same[1]] * (q.shape[-2] - local_heads)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    o = F.scaled_dot_product_attention(*flat, attn_mask=torch.stack(heads))
    return o.transpose(1, 2).unflatten(1, q.shape[1:3])


@every_form
@pytest.mark.parametrize("local_heads", [None, 0, 3])
def test_local_global_attention(packed, local_heads):
    torch.manual_seed(0)
    qkv = torch.randn(2, 4, 24, 3, 3, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unbind(3)
    sizes = {"window": (4, 2, 3), "stride": (2, 2, 3)}
    wanted = plain_local_global(q, k, v, (4, 6), **sizes, local_heads=2 if local_heads is None else local_heads)
    got = ops.local_global_attention(qkv if packed else (q, k, v), (4, 6), **sizes, local_heads=local_heads)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(o, qkv, upstream)[0] for o in (got, wanted)))


def test_compositions_compile_once():
    torch.manual_seed(0)

    def make(batch: int, frames: int) -> list[Tensor]:
        return [torch.randn(batch, frames, 20, 3, 4, 32, requires_grad=True)]

    def function(qkv):
        local = ops.local_global_attention(qkv, (4, 5), window=(1, 2, 5), stride=(1, 2, 1))
        return ops.axial_attention(qkv, (4, 5)) + local

    assert_compiles_once(function, make, [(5, 6), (2, 3), (3, 2)])


QKV = torch.randn(2, 3, 4, 3, 2, 32)
Q, K, V = QKV.unbind(3)
TABLE = torch.randn(3, 32)
BAD = [
    (
        "a list of one",
        ops.spatial_attention,
        ([QKV],),
        {},
        TypeError,
        "qkv must be a torch.Tensor or a tuple (q, k, v)",
    ),
    ("a number", ops.joint_attention, (1.0,), {}, TypeError, "got float"),
    (
        "five dimensions",
        ops.temporal_attention,
        (Q,),
        {},
        ValueError,
        "qkv must be (B, F, N, 3, H, d), got 5 dimensions",
    ),
    ("not three parts", ops.spatial_attention, (QKV[:, :, :, :2],), {}, ValueError, "got (2, 3, 4, 2, 2, 32)"),
    ("integers", ops.temporal_attention, (QKV.long(),), {}, TypeError, "qkv must be float32 or"),
    (
        "k of other frames",
        ops.temporal_attention,
        ((Q, K[:, :2], V),),
        {},
        ValueError,
        "k must be (B, F, N, H, d) as q",
    ),
    ("v of another dtype", ops.joint_attention, ((Q, K, V.double()),), {}, TypeError, "v must be float32, got float64"),
    (
        "v elsewhere",
        ops.spatial_attention,
        ((Q, K, V.to("meta")),),
        {},
        ValueError,
        f"v must be on the device of q ({Q.device})",
    ),
    ("q as a number", ops.spatial_attention, ((1, K, V),), {}, TypeError, "q must be a torch.Tensor, got int"),
    ("d not innermost", ops.spatial_attention, (QKV.mT.contiguous().mT,), {}, ValueError, "qkv must have unit stride"),
    ("no heads", ops.spatial_attention, (QKV[..., :0, :],), {}, ValueError, "at least one head"),
    ("head size 24", ops.temporal_attention, (QKV[..., :24],), {}, ValueError, "72, 80, 96 or 128, got d = 24"),
    (
        "257 frames",
        ops.temporal_attention,
        (torch.empty(1, 257, 1, 3, 1, 32),),
        {},
        ValueError,
        "qkv must have at most 256 frames, got F = 257",
    ),
    ("scale", ops.spatial_attention, (QKV,), {"scale": math.nan}, ValueError, "scale must be a finite number, got nan"),
    (
        "bias of one head",
        ops.temporal_attention,
        (QKV,),
        {"bias": torch.randn(1, 3, 3)},
        ValueError,
        "bias must be (H, F, F) = (2, 3, 3), got (1, 3, 3)",
    ),
    (
        "bias of another dtype",
        ops.temporal_attention,
        (QKV,),
        {"bias": torch.randn(2, 3, 3).half()},
        TypeError,
        "bias must be float32, got float16",
    ),
    ("one rope table", ops.temporal_attention, (QKV,), {"rope": TABLE}, TypeError, "rope must be a tuple (cos, sin)"),
    (
        "rope of half heads",
        ops.temporal_attention,
        (QKV,),
        {"rope": (TABLE[:, :16], TABLE[:, :16])},
        ValueError,
        "rope's cos must be (F, d) = (3, 32), got (3, 16)",
    ),
    (
        "rope with a gradient",
        ops.temporal_attention,
        (QKV,),
        {"rope": (TABLE, TABLE.clone().requires_grad_())},
        ValueError,
        "rope's sin must be a constant",
    ),
    (
        "joint attention of frames apart",
        ops.joint_attention,
        (torch.randn(2, 3, 5, 3, 2, 32)[:, :, :4],),
        {},
        ValueError,
        "qkv must have frames and tokens in one run",
    ),
    (
        "size",
        ops.axial_attention,
        (QKV, (3, 2)),
        {},
        ValueError,
        "size must be (height, width) with height * width = N = 4",
    ),
    (
        "axial heads",
        ops.axial_attention,
        (QKV, (2, 2)),
        {"heads": (1, 1, 1)},
        ValueError,
        "(frames, height, width) must be numbers of heads that add up to H = 2, got (1, 1, 1)",
    ),
    (
        "window",
        ops.local_global_attention,
        (QKV, (2, 2)),
        {"window": (2, 1, 1), "stride": (1, 1, 1)},
        ValueError,
        "window must divide the clip's (frames, height, width) = (3, 2, 2), got (2, 1, 1)",
    ),
    (
        "local heads",
        ops.local_global_attention,
        (QKV, (2, 2)),
        {"window": (1, 1, 1), "stride": (1, 1, 1), "local_heads": 3},
        ValueError,
        "got (3, -1)",
    ),
]


@pytest.mark.parametrize(("case", "operator", "args", "options", "error", "message"), BAD, ids=[c[0] for c in BAD])
def test_bad_input_gets_one_clear_error(case, operator, args, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        operator(*args, **options)

"""The attention modules, the modulation and the blocks that they make, against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidkern import ops
from vidkern.nn import (
    DividedSpaceTimeBlock,
    FinalLayer,
    PerFrameModulation,
    SpatialAttention,
    SplitHeadAttention,
    TemporalAttention,
    residual_modulate,
    rotary_tables,
)

B, FRAMES, N, D, HEADS = 2, 3, 5, 64, 2


def tokens(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, FRAMES, N, D)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


def plain_attention(module: SpatialAttention | TemporalAttention, x: Tensor, over: int) -> Tensor:
    """Attend over dimension ``over`` of (B, F, N, D) by scaled_dot_product_attention in float64."""
    qkv = F.linear(x, module.qkv.weight.double(), module.qkv.bias.double()).unflatten(-1, (3, HEADS, -1))
    q, k, v = (part.movedim(over, -2) for part in qkv.unbind(3))
    o = F.scaled_dot_product_attention(q, k, v).movedim(-2, over)
    return F.linear(o.flatten(-2), module.proj.weight.double(), module.proj.bias.double())


@pytest.mark.parametrize(("kind", "over"), [(SpatialAttention, 2), (TemporalAttention, 1)])
def test_attention_is_over_its_own_dimension(kind, over):
    module, x = randomise(kind(D, HEADS)), tokens()
    torch.testing.assert_close(module(x).double(), plain_attention(module, x.double(), over), rtol=1e-5, atol=1e-6)


def test_rope_makes_temporal_attention_depend_on_order_and_leaves_spatial_alone():
    rope, x = rotary_tables(FRAMES, D // HEADS), tokens()
    spatial, temporal = randomise(SpatialAttention(D, HEADS)), randomise(TemporalAttention(D, HEADS))
    assert torch.equal(spatial(x, rope), spatial(x))
    torch.testing.assert_close(temporal(x.flip(1)).flip(1), temporal(x), rtol=1e-5, atol=1e-6)
    assert (temporal(x.flip(1), rope).flip(1) - temporal(x, rope)).abs().max() > 1e-3


def test_modulation_is_computed_once_for_a_clip_and_expanded():
    module = randomise(PerFrameModulation(D))
    c = torch.randn(B, 1, D)
    once, every = module(c, FRAMES), module(c.expand(-1, FRAMES, -1).contiguous(), FRAMES)
    assert len(once) == 6
    for ours, wanted in zip(once, every, strict=True):
        assert ours.shape == (B, FRAMES, D)
        assert ours.stride(1) == 0
        torch.testing.assert_close(ours, wanted)


def test_residual_modulate_starts_and_continues_a_stack():
    x, y, gate, shift, scale = tokens(), tokens(1), *torch.randn(3, B, FRAMES, D).unbind(0)
    first, h = residual_modulate(x, None, shift, scale)
    assert first is x
    torch.testing.assert_close(h, F.layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, :, None]) + shift[:, :, None])
    z, h = residual_modulate(x, (y, gate), shift, scale)
    torch.testing.assert_close(z, x + gate[:, :, None] * y)
    torch.testing.assert_close(h, F.layer_norm(z, (D,), eps=1e-6) * (1 + scale[:, :, None]) + shift[:, :, None])


def test_a_block_takes_over_the_branch_before_it_and_hands_on_its_own():
    block, x, c = randomise(DividedSpaceTimeBlock(D, HEADS, "temporal")), tokens(), torch.randn(B, FRAMES, D)
    before = tokens(2), torch.randn(B, FRAMES, D)
    threaded, branch = block(x, c, before)
    added, added_branch = block(ops.gate_residual(x, *before), c)
    torch.testing.assert_close(ops.gate_residual(threaded, *branch), ops.gate_residual(added, *added_branch))


@pytest.mark.parametrize("attention", ["spatial", "temporal", "space_then_time", "split_heads"])
def test_a_block_with_closed_gates_changes_nothing(attention):
    block, x = DividedSpaceTimeBlock(D, HEADS, attention), tokens()
    h, branch = block(x, torch.randn(B, FRAMES, D), rope=rotary_tables(FRAMES, D // HEADS))
    assert torch.equal(ops.gate_residual(h, *branch), x)
    assert branch[0].abs().max() > 0.01


def test_the_final_layer_adds_the_last_branch():
    layer, x, c = randomise(FinalLayer(D, 12)), tokens(), torch.randn(B, FRAMES, D)
    y, gate = tokens(3), torch.randn(B, FRAMES, D)
    shift, scale = layer.adaLN_modulation(c, FRAMES)
    h = F.layer_norm(x + gate[:, :, None] * y, (D,), eps=1e-6) * (1 + scale[:, :, None]) + shift[:, :, None]
    torch.testing.assert_close(layer(x, c, (y, gate)), layer.linear(h))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpatialAttention(64, 3), "hidden_size must be a multiple of num_heads = 3, got 64"),
        (lambda: SplitHeadAttention(63, 3), "num_heads must be even .*, got 3"),
        (lambda: DividedSpaceTimeBlock(64, 2, "diagonal"), "attention must be one of .*, got 'diagonal'"),
    ],
)
def test_modules_that_cannot_be_built_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""The position tables against their formulas, one element at a time."""

import math

import pytest
import torch

from vidkern.nn import RelativePositionBias, TemporalAttention, rotary_tables, sincos_1d, sincos_2d


def test_sincos_1d_is_its_formula():
    table = sincos_1d(torch.tensor([0, 3, 250]), 8)
    for row, p in zip(table.tolist(), [0, 3, 250], strict=True):
        angles = [p * 10000 ** (-2 * k / 8) for k in range(4)]
        assert row == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], abs=1e-7)


def test_sincos_2d_encodes_the_column_first_and_runs_row_by_row():
    height, width, dim = 3, 5, 16
    table = sincos_2d(height, width, dim)
    assert table.shape == (height * width, dim)
    for row in range(height):
        for column in range(width):
            token = table[row * width + column]
            assert torch.equal(token[: dim // 2], sincos_1d(torch.tensor([column]), dim // 2)[0])
            assert torch.equal(token[dim // 2 :], sincos_1d(torch.tensor([row]), dim // 2)[0])


def test_rotary_tables_turn_neighbouring_channels_together():
    cos, sin = rotary_tables(7, 6)
    assert cos.dtype == sin.dtype == torch.float32
    for f in range(7):
        for channel in range(6):
            angle = f * 10000 ** (-2 * (channel // 2) / 6)
            assert cos[f, channel].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[f, channel].item() == pytest.approx(math.sin(angle), abs=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sincos_1d(torch.arange(3), 7), "dim must be even, got 7"),
        (lambda: sincos_2d(2, 2, 6), "dim must be a multiple of 4, got 6"),
        (lambda: rotary_tables(4, 5), "dim must be even, got 5"),
    ],
)
def test_sizes_that_cannot_be_split_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_relative_buckets_are_their_definition():
    bias = RelativePositionBias(2)
    ahead = torch.arange(-300, 301)
    for distance, bucket in zip(ahead.tolist(), bias.buckets(ahead).tolist(), strict=True):
        d = abs(distance)
        # of 16 buckets: 8 of one distance each, then k where (d / 8)^8 >= 4^k, in whole numbers
        steps = max((k for k in range(8) if d**8 >= 4**k * 8**8), default=0)
        assert bucket == (16 if distance > 0 else 0) + (d if d < 8 else 8 + steps)


def test_a_shared_relative_bias_reaches_the_scores_and_learns():
    torch.manual_seed(0)
    bias, layers = RelativePositionBias(2, num_buckets=8, max_distance=6), [TemporalAttention(64, 2) for _ in range(2)]
    x = torch.randn(2, 9, 3, 64)
    table = bias(9)
    assert table.shape == (2, 9, 9)
    weight = bias.relative_attention_bias.weight
    assert torch.equal(table[:, 4, 2], weight[2])  # two frames back
    assert torch.equal(table[:, 2, 4], weight[4 + 2])
    out = layers[1](layers[0](x, bias=table), bias=table)
    (grad,) = torch.autograd.grad(out.square().sum(), weight)
    q, k, v = layers[0].qkv(x).unflatten(-1, (3, 2, 32)).permute(3, 0, 2, 4, 1, 5)
    p = (q @ k.mT * 32**-0.5 + table).softmax(-1)
    torch.testing.assert_close(layers[0](x, bias=table), layers[0].proj((p @ v).permute(0, 3, 1, 2, 4).flatten(-2)))
    used = torch.arange(8) != 4  # a later frame is never at distance 0
    assert torch.equal((grad != 0).all(1), used)


@pytest.mark.parametrize(("options", "message"), [((2, 6), "num_buckets"), ((2, 32, 8), "max_distance")])
def test_a_relative_bias_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=f"{message} must be"):
        RelativePositionBias(*options)

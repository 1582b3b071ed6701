"""The position tables against their formulas, one element at a time."""

import math

import pytest
import torch

from vidkern.nn import rotary_tables, sincos_1d, sincos_2d


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

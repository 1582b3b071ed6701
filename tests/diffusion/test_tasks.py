import pytest
import torch

from vidkern.diffusion import (
    given_frames,
    image_to_video,
    interpolation,
    long_video,
    next_frame,
    progressive,
    standard,
    transition,
)

T = torch.tensor([7, 0, -1])


@pytest.mark.parametrize(
    ("task", "held"),
    [
        (standard, []),
        (image_to_video, [0]),
        (interpolation, [0, 5]),
        (lambda t, f: long_video(t, f, given=2), [0, 1]),
        (next_frame, [0, 1, 2, 3, 4]),
        (lambda t, f: transition(t, f, first=2, last=1), [0, 1, 5]),
        (lambda t, f: given_frames(t, f, [1, -2]), [1, 4]),
        (lambda t, f: given_frames(t, f, torch.tensor([1, 0, 0, 1, 0, 0]).bool()), [0, 3]),
    ],
)
def test_given_frames_are_at_zero_and_the_others_at_t(task, held):
    tau, hold = task(T, 6)
    assert tau.dtype == torch.int64
    assert hold.dtype == torch.bool
    for b, t in enumerate(T.tolist()):
        assert tau[b].tolist() == [0 if f in held else t for f in range(6)]
        assert hold[b].tolist() == [f in held for f in range(6)]


def test_a_mask_for_each_sample():
    mask = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 0]]).bool()
    tau, hold = given_frames(T, 3, mask)
    assert tau.tolist() == [[0, 7, 7], [0, 0, 0], [-1, -1, -1]]
    assert torch.equal(hold, mask)


def test_progressive_grows_by_a_tenth_of_t_a_frame():
    tau, hold = progressive(torch.tensor([999, 15, 0, -1]), 12)
    assert tau[0].tolist() == [0, 99, 199, 299, 399, 499, 599, 699, 799, 899, 999, 999]
    assert tau[1].tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 15]
    assert tau[2].tolist() == [0] * 12
    assert tau[3].tolist() == [0] + [-1] * 11
    assert hold.tolist() == [[True] + [False] * 11] * 4


def test_refuses():
    with pytest.raises(ValueError, match=r"given must be .* got 6"):
        long_video(T, 6, given=6)
    with pytest.raises(ValueError, match=r"first and last .* got 3 and 3"):
        transition(T, 6, first=3, last=3)
    with pytest.raises(ValueError, match=r"index must .* got 6"):
        given_frames(T, 6, [6])
    with pytest.raises(ValueError, match=r"index must .* got torch\.bool of shape"):
        given_frames(T, 6, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ramp must .* got 0"):
        progressive(T, 6, ramp=0)

import pytest
import torch
from scipy import stats

from vidkern.diffusion import sample_timesteps


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_clip_timesteps_are_uniform():
    t = sample_timesteps(20_000, 4, 50, generator=generator())
    assert t.shape == (20_000,)
    assert t.dtype == torch.int64
    assert stats.chisquare(torch.bincount(t, minlength=50)).pvalue > 1e-3


def test_frame_timesteps_are_uniform_and_independent():
    t = sample_timesteps(5_000, 4, 50, mode="frame", generator=generator())
    assert t.shape == (5_000, 4)
    assert stats.chisquare(torch.bincount(t.flatten(), minlength=50)).pvalue > 1e-3
    correlation = torch.corrcoef(t.T.double()) - torch.eye(4)
    assert correlation.abs().max() < 0.06


@pytest.mark.parametrize("p", [0.0, 0.2, 0.8, 1.0])
def test_ptss_chooses_for_each_sample(p):
    t = sample_timesteps(5_000, 8, 1000, mode="ptss", p=p, generator=generator())
    varied = (t != t[:, :1]).any(1).float().mean()
    assert abs(varied - p) < 0.02  # 8 frames agree by chance with probability 1e-21
    assert stats.chisquare(torch.bincount(t[:, 3] // 20, minlength=50)).pvalue > 1e-3


def test_ptss_chooses_once_for_a_batch():
    g = generator()
    varied = [
        (t != t[:, :1]).any(1).float().mean().item()
        for t in (sample_timesteps(16, 8, 1000, mode="ptss", p=0.5, per_batch=True, generator=g) for _ in range(64))
    ]
    assert set(varied) == {0.0, 1.0}
    assert 16 < sum(varied) < 48


def test_same_seed_same_timesteps():
    a, b, c = (sample_timesteps(4, 4, 1000, mode="ptss", generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_refuses():
    with pytest.raises(ValueError, match=r"mode must be .* got 'video'"):
        sample_timesteps(1, 1, 10, mode="video")
    with pytest.raises(ValueError, match=r"p must be .* got 1\.5"):
        sample_timesteps(1, 1, 10, mode="ptss", p=1.5)

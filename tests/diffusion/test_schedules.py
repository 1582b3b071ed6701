import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from vidkern.diffusion import make_schedule, respace, sde_beta, sde_diffusion, sde_drift

ALL = ("linear", "scaled_linear", "cosine", "sde", "flow")
VARIANCE_PRESERVING = ALL[:-1]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("linear", {"beta_schedule": "linear"}),
        ("scaled_linear", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_tables_agree_with_diffusers(name, theirs):
    expected = DDPMScheduler(num_train_timesteps=1000, **theirs).alphas_cumprod
    torch.testing.assert_close(make_schedule(name).alphas_cumprod, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_posterior_tables_in_float64(name):
    """q(x_{t-1} | x_t, x_0) by the product of two Gaussians: q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    schedule = make_schedule(name, num_steps=200)
    beta = schedule.log_beta.double().exp()
    bar = torch.cumprod(1 - beta, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    precision = (1 - beta) / beta + 1 / (1 - previous)
    mean_coef = previous.sqrt() / (1 - previous) / precision
    torch.testing.assert_close(schedule.posterior_mean_coef[1:].double(), mean_coef[1:], rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.posterior_log_variance[1:].double(), -precision[1:].log(), rtol=1e-5, atol=1e-5)
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]
    assert schedule.posterior_mean_coef[0] == 1
    torch.testing.assert_close(schedule.alphas_cumprod.double(), bar, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name):
    schedule = make_schedule(name)
    assert schedule.variance_preserving
    total = schedule.alpha.double() ** 2 + schedule.sigma.double() ** 2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)


def test_sde_tables_follow_the_integral():
    s = torch.arange(1, 1001, dtype=torch.float64) / 1000
    expected = torch.exp(-0.5 * (0.1 * s + 0.5 * 19.9 * s**2))
    torch.testing.assert_close(make_schedule("sde").alpha.double(), expected, rtol=1e-6, atol=0)


def test_sde_drift_and_diffusion_move_the_moments():
    """d alpha / ds = drift(alpha), and d sigma^2 / ds = 2 * drift coefficient * sigma^2 + diffusion^2."""
    s = torch.linspace(0.05, 0.95, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    alpha = torch.exp(-0.5 * (0.1 * s + 0.5 * 19.9 * s**2))
    d_alpha = torch.autograd.grad(alpha.sum(), s, retain_graph=True)[0]
    d_variance = torch.autograd.grad((1 - alpha**2).sum(), s)[0]
    drift = sde_drift(alpha[:, :, None, None, None], s)[:, :, 0, 0, 0]
    torch.testing.assert_close(drift, d_alpha)
    torch.testing.assert_close(-sde_beta(s) * (1 - alpha**2) + sde_diffusion(s) ** 2, d_variance)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_agrees_with_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).sigmas
    schedule = make_schedule("flow", shift=shift)
    torch.testing.assert_close(schedule.sigma, theirs.flip(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.alpha + schedule.sigma, torch.ones(1000))
    assert not schedule.variance_preserving


@pytest.mark.parametrize("name", ALL)
def test_coefficients_gather_and_minus_one_is_clean(name):
    schedule = make_schedule(name, num_steps=100)
    t = torch.tensor([[-1, 0, 4], [99, -1, 99]])
    alpha, sigma = schedule.coefficients(t)
    assert alpha.dtype == sigma.dtype == torch.float32
    for got, table, clean in ((alpha, schedule.alpha, 1.0), (sigma, schedule.sigma, 0.0)):
        extended = torch.cat([table, torch.tensor([clean])])  # index -1 is the last entry
        torch.testing.assert_close(got, extended[t], rtol=0, atol=0)


def test_to_moves_every_table():
    moved = make_schedule("linear", num_steps=50).to("meta")
    assert moved.device.type == moved.log_beta.device.type == moved.posterior_mean_coef.device.type == "meta"
    assert moved.num_steps == 50
    assert make_schedule("flow", num_steps=5).to("meta").log_beta is None


@pytest.mark.parametrize(("count", "first", "last"), [("50", [0, 20, 41, 61], 999), (250, [0, 4, 8, 12], 999)])
def test_respace_known_values(count, first, last):
    steps = respace(1000, count)
    assert steps.dtype == torch.int64
    assert steps.shape == (int(count),)
    assert steps[:4].tolist() == first
    assert steps[-1] == last


def test_respace_is_even_and_unique():
    for count in (1, 2, 3, 10, 77, 100, 500, 1000):
        steps = respace(1000, count).numpy()
        assert len(set(steps)) == count
        if count > 1:
            assert np.abs(steps - np.arange(count) * 999 / (count - 1)).max() <= 0.5


@pytest.mark.parametrize("count", [0, 1001, "ten", "-3", 2.5])
def test_respace_refuses(count):
    with pytest.raises(ValueError, match="count"):
        respace(1000, count)


def test_make_schedule_refuses():
    with pytest.raises(ValueError, match=r"name must be .* got 'quadratic'"):
        make_schedule("quadratic")
    with pytest.raises(ValueError, match=r"num_steps must be .* got 1"):
        make_schedule("linear", num_steps=1)
    with pytest.raises(ValueError, match="'linear' must be among beta_start, beta_end, got shift"):
        make_schedule("linear", shift=2.0)
    with pytest.raises(ValueError, match="beta must be"):
        make_schedule("linear", beta_end=1.5)

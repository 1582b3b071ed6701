"""DDIM inversion of clips under denoisers that are known exactly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.sampling.inversion import invert
from vidkern.diffusion import make_schedule, sample

SCHEDULE = make_schedule("scaled_linear", 1000)
SPREAD = 0.7  # standard deviation of the clean values about their mean
KEY = torch.tensor([0, 0])


def clips() -> tuple[Tensor, Tensor]:
    """(mean, x_0) of clean frames N(mean, SPREAD^2)."""
    torch.manual_seed(0)
    mean = torch.randn(2, 1, 3, 4, 4) * 0.5
    return mean, mean + SPREAD * torch.randn_like(mean)


def denoiser(mean: Tensor, prediction: str = "epsilon", modes: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    """The best prediction for clean values N(mean, SPREAD^2), or, with two modes, N(+-mean, SPREAD^2)."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c[:, :, None, None, None] for c in SCHEDULE.coefficients(t))
        variance = (alpha * SPREAD) ** 2 + sigma**2
        centre = mean * (torch.tanh(alpha * mean * x / variance) if modes == 2 else 1)
        epsilon = sigma * (x - alpha * centre) / variance
        x0 = (x - sigma * epsilon) / alpha
        return {"epsilon": epsilon, "x0": x0, "v": alpha * epsilon - sigma * x0}[prediction]

    return predict


def round_trip(num_steps: int, refinements: int, prediction: str = "epsilon") -> float:
    """Relative error of what is drawn from the inverted clip."""
    mean, x0 = clips()
    model = denoiser(mean, prediction, modes=2)
    noise = invert(model, x0, SCHEDULE, num_steps, prediction=prediction, refinements=refinements)
    drawn = sample(model, noise, SCHEDULE, KEY, num_steps=num_steps, prediction=prediction)
    return float((drawn - x0).norm() / x0.norm())


def test_the_noise_is_that_of_the_probability_flow():
    """For Gaussian clips the flow keeps each value's place in the marginal: (z_T - alpha m) / std_T = (x_0 - m) / s."""
    mean, x0 = clips()
    alpha, sigma = SCHEDULE.alpha[-1], SCHEDULE.sigma[-1]
    wanted = alpha * mean + ((alpha * SPREAD) ** 2 + sigma**2).sqrt() / SPREAD * (x0 - mean)
    errors = {
        steps: float((invert(denoiser(mean), x0, SCHEDULE, steps) - wanted).norm() / wanted.norm())
        for steps in (100, 1000)
    }
    assert errors[1000] < 5e-3
    assert errors[1000] < 0.2 * errors[100]  # of first order in the step


def test_more_steps_and_more_refinements_come_closer():
    assert round_trip(10, 0) < 0.1
    assert round_trip(50, 0) < 0.2 * round_trip(10, 0)
    assert round_trip(50, 1) < 0.1 * round_trip(50, 0)
    assert round_trip(50, 5) < 5e-6


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_other_predictions_invert_alike(prediction):
    assert round_trip(50, 5, prediction) < 2e-5


def test_channels_beyond_the_clips_are_the_variance_and_do_not_count():
    mean, x0 = clips()
    model = denoiser(mean)

    def with_variance(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model(x, t), torch.full_like(x, 9.0)], dim=2)

    assert torch.equal(invert(with_variance, x0, SCHEDULE, 10), invert(model, x0, SCHEDULE, 10))


@pytest.mark.parametrize(
    ("schedule", "prediction", "message"),
    [
        ("flow", "epsilon", "schedule must be variance-preserving, got 'flow'"),
        ("linear", "flow", "prediction must be epsilon, v or x0, got 'flow'"),
    ],
)
def test_what_has_no_ddim_is_refused(schedule, prediction, message):
    mean, x0 = clips()
    with pytest.raises(ValueError, match=message):
        invert(denoiser(mean), x0, make_schedule(schedule, 100), 5, prediction=prediction)

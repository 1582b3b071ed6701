"""Training with sharing="shared" (S2DM): a clip's frames have one noise, the one that sampling would draw."""

import pytest
import torch
from torch import Tensor

from vidkern import ops
from vidkern.diffusion import diffusion_loss, make_schedule, sample, sample_timesteps
from vidkern.rng import KeyStream

SHAPE = B, F, C, H, W = 3, 5, 2, 6, 7
STEPS, OFFSET = 4, 10
SCHEDULE = make_schedule("linear")


def start_of_sampling(key: Tensor) -> Tensor:
    """Return what the model gets at the first step of sampling with shared noise."""
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.cat([x, x], dim=2)

    sample(model, SHAPE, SCHEDULE, key, num_steps=1, sharing="shared", sample_offset=OFFSET)
    return seen[0]


def train_step(x0: Tensor, t: Tensor, key: Tensor, answer: Tensor, **options: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return x_t and the losses of a step whose model answers with a given tensor."""
    seen = []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return answer

    losses = diffusion_loss(model, x0, t, SCHEDULE, key, sharing="shared", sample_offset=OFFSET, **options)
    return seen[0], losses


@pytest.mark.parametrize("mode", ["clip", "frame"])
def test_every_step_trains_on_the_noise_that_sampling_would_draw(mode):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(SHAPE, generator=generator)
    keys, noises = KeyStream(5, "cpu"), []
    for _ in range(STEPS):
        key = keys.next()
        t = sample_timesteps(B, F, SCHEDULE.num_steps, mode=mode, generator=generator)
        noise = start_of_sampling(key)
        assert torch.equal(noise, noise[:, :1].expand(SHAPE))

        tau = t if mode == "frame" else t[:, None].expand(B, F)
        alpha, sigma = (level[:, :, None, None, None] for level in SCHEDULE.coefficients(tau))
        x_t, losses = train_step(x0, t, key, noise, learned_range=False)
        assert torch.equal(x_t, alpha * x0 + sigma * noise)
        assert not losses["per_frame"].any()  # the model answered with the noise, which is the target
        _, losses = train_step(x0, t, key, ops.philox_normal(SHAPE, key, sample_offset=OFFSET), learned_range=False)
        assert losses["per_frame"].min() > 0.5  # with other noise than the clips'
        noises.append(noise[:, 0])
    every = torch.stack(noises).flatten(2).flatten(0, 1)  # of each step and sample
    assert (torch.corrcoef(every) - torch.eye(STEPS * B)).abs().max() < 0.5  # 84 numbers


def test_equal_frames_stay_equal_in_training():
    x0 = torch.randn(B, 1, C, H, W, generator=torch.Generator().manual_seed(1)).expand(SHAPE)
    key, t = torch.tensor([4, 9]), torch.tensor([900, 500, 3])
    x_t, losses = train_step(x0, t, key, torch.zeros(B, F, 2 * C, H, W))
    assert torch.equal(x_t, x_t[:, :1].expand(SHAPE))
    assert torch.equal(losses["per_frame"], losses["per_frame"][:, :1].expand(B, F))
    assert (x_t[0] - x_t[1]).abs().max() > 0.5

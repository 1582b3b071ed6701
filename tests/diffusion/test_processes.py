"""One batch on one process and on two: the same noise, the same samples, the same training noise, bit for bit."""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vidkern import ops
from vidkern.diffusion import diffusion_loss, image_to_video, make_schedule, sample, sample_timesteps
from vidkern.rng import KeyStream

SHAPE = BATCH, F, C, H, W = 6, 4, 3, 5, 7
SHARING = {"independent": None, "shared": None, "mixed": 0.3, "progressive": 0.6}
SAMPLERS = {
    "ddim": {"eta": 0.7},
    "ddpm": {"task": image_to_video, "step_sharing": "shared", "sharing": "mixed", "base_weight": 0.4},
    "flow": {"prediction": "flow", "sharing": "progressive", "base_weight": 0.5},
}
TRAINING_STEPS = 3


def model(x: Tensor, t: Tensor) -> Tensor:
    """Products only: matrix products may round differently when the batch is split."""
    return torch.cat([0.9 * x, -0.3 * x], dim=2)


def share_of(rank: int, world: int) -> dict[str, Tensor]:
    """Return what a process draws of the batch, samples first."""
    size = BATCH // world
    first, shape = rank * size, (size, *SHAPE[1:])
    mine = slice(first, first + size)
    clips = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(1), device="cpu").clamp(-1, 1)
    key = torch.tensor([20261121, 7], device="cpu")
    drawn = {}
    for sharing, weight in SHARING.items():
        noise = ops.philox_normal(shape, key, sharing=sharing, base_weight=weight, sample_offset=first)
        drawn[f"noise, {sharing}"] = noise
    for sampler, options in SAMPLERS.items():
        schedule = make_schedule("flow" if sampler == "flow" else "linear")
        drawn[f"samples, {sampler}"] = sample(
            model, shape, schedule, key, sampler=sampler, known=clips[mine], num_steps=5, sample_offset=first, **options
        )
    keys, schedule = KeyStream(3, "cpu"), make_schedule("linear")
    generator = torch.Generator("cpu").manual_seed(2)
    for step in range(TRAINING_STEPS):
        sharing, weight = list(SHARING.items())[step + 1]
        key, seen = keys.next(), []
        t = sample_timesteps(BATCH, F, schedule.num_steps, mode="frame", generator=generator)[mine]

        def watched(x_t: Tensor, t: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x_t)
            return model(x_t, t)

        losses = diffusion_loss(
            watched, clips[mine], t, schedule, key, sharing=sharing, base_weight=weight, sample_offset=first
        )
        drawn[f"key of step {step}"] = key.expand(size, 2).contiguous()
        drawn[f"x_t of step {step}"] = seen[0]
        drawn[f"losses of step {step}"] = losses["per_frame"]
    return drawn


def run_process(rank: int, world: int, folder: str) -> None:
    """Draw a process's share on a number of threads of its own, and save the whole batch on the first process."""
    torch.set_num_threads(1 + rank)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world, timeout=limit)
    whole = {}
    for name, mine in share_of(rank, world).items():
        shares = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(shares, mine)
        whole[name] = torch.cat(shares)
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.start_processes(run_process, args=(2, str(folder)), nprocs=2, start_method="spawn")
    return torch.load(folder / "whole.pt", weights_only=True)


@pytest.fixture(scope="module")
def by_one() -> dict[str, Tensor]:
    return share_of(0, 1)


@pytest.mark.parametrize(
    "name",
    [
        *(f"noise, {sharing}" for sharing in SHARING),
        *(f"samples, {sampler}" for sampler in SAMPLERS),
        *(f"{what} of step {step}" for step in range(TRAINING_STEPS) for what in ("key", "x_t", "losses")),
    ],
)
def test_two_processes_give_the_bits_of_one(name, by_one, by_two):
    assert torch.equal(by_two[name], by_one[name])
    samples = by_one[name].flatten(1)
    assert name.startswith("key") or len(torch.unique(samples, dim=0)) == BATCH  # or any sample_offset would do


def test_everything_is_compared(by_one, by_two):
    assert by_one.keys() == by_two.keys()
    assert len(by_one) == len(SHARING) + len(SAMPLERS) + 3 * TRAINING_STEPS

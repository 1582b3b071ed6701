"""A run's state, and one optimiser step of it."""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoints import load_weights
from models.config import TrainConfig
from models.networks import Network, build_network, noise_options
from models.s2dm import S2DM
from models.sampling.network import find_checkpoint
from models.training.distributed import World, distribute, gradient_exchange
from models.training.draws import Draws, draw
from models.training.graph import GraphedStep
from models.training.metrics import say
from models.training.optimizer import Rates, make_optimizer, rates_at, take_step
from models.training.rng import seed_process, seed_step
from vidkern.diffusion import Schedule, diffusion_loss, make_schedule
from vidkern.optim import AdamWEMA
from vidkern.rng import KeyStream


@dataclasses.dataclass
class Run:
    """Everything that a training step reads or changes."""

    config: TrainConfig
    world: World
    schedule: Schedule
    model: Network
    network: nn.Module  # what training calls: `model`, or a DDP replica around it
    ema: Network
    optimizer: AdamWEMA
    generator: torch.Generator  # of what a step draws for the whole batch
    keys: KeyStream  # noise keys, one a step, the same in every process
    step: int = 0
    graphed: GraphedStep | None = None  # `learn` as a CUDA graph

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return Path(self.config.run_dir) / "checkpoints"

    def tell(self, message: str) -> None:
        """Print one line, once."""
        if self.world.is_main:
            say(message)


def make_run(config: TrainConfig, world: World) -> Run:
    """Build a run at step 0, the same in every process.

    Raises ValueError or OSError for sizes that cannot be built, or weights to begin with that are not there or do not
    fit.
    """
    if config.graph:
        refuse_graph(world)
    seed_process(config.seed)
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the papers' code trains
    model = build_network(config).to(world.device)
    if config.init is not None:
        load_weights(model, find_checkpoint(Path(config.init)))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    model.activation_checkpointing = config.activation_checkpointing
    if not isinstance(model, S2DM):
        model.recompute = config.recompute
    if config.compile:
        model.compile()
    network = distribute(model, ema, config.strategy, world)
    run = Run(
        config=config,
        world=world,
        schedule=make_schedule(config.diffusion.schedule, config.diffusion.num_steps, world.device),
        model=model,
        network=network,
        ema=ema,
        optimizer=make_optimizer(model, ema, config.optim),
        generator=torch.Generator(world.device),
        keys=KeyStream(config.seed, world.device),
    )
    if config.graph:
        run.graphed = GraphedStep(functools.partial(learn, run), world.device)
    return run


def refuse_graph(world: World) -> None:
    """Raise ValueError where a step cannot be a CUDA graph, with the reason."""
    if world.device.type != "cuda":
        raise ValueError(f"--graph wants a CUDA device, the run is on the {world.device.type}")
    if torch.distributed.is_initialized():
        raise ValueError("--graph captures the step of one process, and torchrun's exchange gradients in it")


def train_step(run: Run, x0: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """One optimiser step on this process's share of the batch, (n, F, C, H, W). Never waits for the device.

    The share is run in parts of at most `micro_batch_size` clips; each part's loss has the weight of its frames that
    count, so the gradient is that of the whole batch, whatever the parts and the number of processes.

    Returns loss, mse, vb and the norm of the gradient before clipping, float32 (4,) on the device.
    """
    config, world = run.config, run.world
    seed_step(run.generator, config.seed, run.step, world.rank)
    draws, rates = draw(config, x0.shape[1], run.generator), rates_at(config.optim, run.step + 1)
    step = functools.partial(learn, run) if run.graphed is None else run.graphed
    values = step(x0, conditions, draws, rates)
    run.step += 1
    return values


def learn(run: Run, x0: Tensor, conditions: dict[str, Tensor], draws: Draws, rates: Rates) -> Tensor:
    """The part of `train_step` that is on the device, and its result."""
    config, world, n = run.config, run.world, len(x0)
    key = run.keys.next()
    sums = torch.zeros(3, device=x0.device)
    size = min(config.micro_batch_size or n, n)
    for begin in range(0, n, size):
        part = slice(begin, min(begin + size, n))
        clips = slice(world.rank * n + begin, world.rank * n + part.stop)
        weight = draws.weight(clips) * world.size  # gradients are averaged over the processes
        with gradient_exchange(run.network, enabled=part.stop == n):
            some = {name: value[part] for name, value in conditions.items()}
            losses = loss_of(run, x0[part], some, draws.part(clips), key, clips.start)
            (weight * losses["loss"]).backward()
        sums += weight * torch.stack([losses["loss"].detach(), losses["mse"], losses["vb"]])
    norm = take_step(run.optimizer, config.optim, rates)
    return torch.cat([sums, norm[None]])


def loss_of(
    run: Run, x0: Tensor, conditions: dict[str, Tensor], draws: Draws, key: Tensor, sample_offset: int
) -> dict[str, Tensor]:
    """The loss of clips whose numbers in the whole batch begin at `sample_offset`."""
    config, options = run.config, dict[str, Any](conditions)
    if config.data.images:
        options["num_images"] = config.data.images
    if draws.given is not None:
        options |= {"known": x0, "given": draws.given}
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return diffusion_loss(
            functools.partial(run.network, **options, dropped=draws.dropped),
            x0,
            draws.t,
            run.schedule,
            key,
            prediction=config.diffusion.prediction,
            learned_range=config.network_config.learn_sigma,
            hold=draws.given,
            **noise_options(config, x0.device),
            sample_offset=sample_offset,
        )

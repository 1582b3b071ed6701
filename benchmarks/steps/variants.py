"""The ways to take a step of Latte or FVDM that are compared: plain PyTorch in three, the library in two.

All variants of a kind share one set of weights, one optimiser state and one EMA, so that they fit on a GPU together.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.plain import AttentionKind, PlainLatte
from benchmarks.baselines.plain_diffusion import PlainDiffusion
from benchmarks.baselines.plain_training import PlainTraining
from benchmarks.steps.parts import DATA, part
from models.config import DiffusionConfig, OptimConfig, TrainConfig
from models.latte import Latte, LatteConfig, published_config
from models.training.distributed import World
from models.training.graph import GraphedStep
from models.training.step import learn, make_run, train_step
from vidkern import ops
from vidkern.diffusion import diffusion_loss, sample

TRAINING, SAMPLING = "training step", "DDIM sampling"
#: Steps of the DDIM run that is reported.
DDIM_STEPS = 50
CLASSES = 101
SCALE = 4.0  # of guidance
MAX_GRAD_NORM = 0.1
DECAY = 0.9999
LEARNING_RATE = 0.0  # no step changes the weights: every variant is held to the same truth
#: Of the weights that a fresh network has at zero, so that a comparison of outputs compares something.
WEIGHT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network and a batch: "Latte-S/2" has one timestep for a clip, "FVDM-S/2" one for each frame."""

    network: str
    batch: int
    overrides: tuple[tuple[str, int], ...] = ()  # of the configuration's fields

    @property
    def config(self) -> LatteConfig:
        return published_config(self.family, self.network, num_classes=CLASSES, **dict(self.overrides))

    @property
    def family(self) -> str:
        return self.network.partition("-")[0]

    @property
    def per_frame(self) -> bool:
        return self.family == "FVDM"

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, F, C, H, W) of the latents."""
        config = self.config
        return self.batch, config.num_frames, config.in_channels, *config.frame_size

    @property
    def name(self) -> str:
        """The network, and what it does not have of the published size."""
        changed = ", ".join(f"{field} {value}" for field, value in self.overrides)
        return f"{self.network} ({changed})" if changed else self.network

    def __str__(self) -> str:
        return f"{self.name} batch {self.batch}"

    def clips(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Return random latents and labels on the host."""
        x0 = torch.randn(batch or self.batch, *self.shape[1:])
        return x0, torch.arange(len(x0)) % CLASSES


@dataclasses.dataclass(frozen=True)
class Way:
    """How a variant computes: by whom, in which precision, and whether torch.compile has its blocks.

    Of ours, what is compiled is also captured on a GPU: the whole training step, and a DDIM step, as CUDA graphs.
    """

    ours: bool
    dtype: torch.dtype
    attention: AttentionKind = "sdpa"  # of plain PyTorch
    compiled: bool = False

    @property
    def letter(self) -> str:
        """As the benchmarks' page calls it: a is the public arithmetic as shipped, e is ours compiled."""
        if self.ours:
            return "e" if self.compiled else "d"
        return "a" if self.attention == "softmax" else "c" if self.compiled else "b"

    @property
    def name(self) -> str:
        maker = "ours" if self.ours else "public" if self.attention == "softmax" else "SDPA"
        return " ".join([maker, str(self.dtype).removeprefix("torch."), *(["compiled"] if self.compiled else [])])


def ways(device: torch.device, both_precisions: bool = True) -> list[Way]:
    """Return the ways that are not compiled. A CPU may have each in two precisions: which is faster depends on it."""
    on_cpu = device.type == "cpu" and both_precisions
    dtypes = [torch.float32, torch.bfloat16] if on_cpu else [torch.bfloat16]
    plain = [Way(False, torch.float32, "softmax"), *(Way(False, dtype) for dtype in dtypes)]
    return plain + [Way(True, dtype) for dtype in dtypes]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network in one way, and what it can do.

    Attributes:
        way: how.
        network: what is called; its parameters are those of every variant.
        optimiser: what a training step calls.
        loss: of clips x0, timesteps, labels and a noise key; with a graph.
        train: takes a training step on clips and labels of the host; returns the loss, or what comes with it.
        sample: draws clips by DDIM under guidance, from starting noise, labels and a number of steps.
    """

    way: Way
    network: nn.Module
    optimiser: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    train: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Tensor, int], Tensor]


class Variants:
    """Makes the variants of one setting."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        self.run = make_run(_train_config(setting), World(0, 1, device))
        for parameter in self.run.model.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.copy_(torch.where(parameter == 0, WEIGHT_STD * torch.randn_like(parameter), parameter))
        self.schedule = self.run.schedule
        self.diffusion = PlainDiffusion(self.schedule, tables_on_host=True)
        parameters = dict(self.run.model.named_parameters())
        self.training = PlainTraining(parameters, self.diffusion, LEARNING_RATE, MAX_GRAD_NORM, DECAY)

    def make(self, way: Way) -> Variant:
        """Return the network in one way."""
        return self._ours(way) if way.ours else self._plain(way)

    def exact(self, dtype: torch.dtype) -> Variant:
        """Return the public arithmetic in another precision, on a copy of the weights: what the others are held to."""
        weights = {name: p.detach().to(dtype, copy=True) for name, p in self.run.model.named_parameters()}
        return self._plain(Way(False, dtype, "softmax"), weights)

    def _network(self, build: Callable[[], nn.Module], way: Way, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """Build a network around the shared parameters, or other weights."""
        with torch.device("meta"):
            network = build()
        network.load_state_dict(weights or self.run.model.state_dict(keep_vars=True), assign=True)
        if way.compiled:
            for block in network.get_submodule("blocks").children():
                block.compile(dynamic=False)
        return network

    def _autocast(self, way: Way) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=way.dtype == torch.bfloat16)

    def _plain(self, way: Way, weights: dict[str, Tensor] | None = None) -> Variant:
        setting = self.setting
        network = self._network(lambda: PlainLatte(setting.config, way.attention), way, weights)

        def loss(x0: Tensor, t: Tensor, y: Tensor, key: Tensor) -> Tensor:
            with self._autocast(way):
                return self.diffusion.loss(network, x0, t, y, ops.philox_normal(x0.shape, key, device=x0.device))

        def train(x0: Tensor, y: Tensor) -> Tensor:
            return self.training.step(network.train(), x0, y, setting.per_frame, way.dtype)

        def sample_clips(start: Tensor, y: Tensor, steps: int) -> Tensor:
            with self._autocast(way):
                return self.diffusion.sample(network.eval(), start, steps, y, CLASSES, SCALE, setting.per_frame)

        return Variant(way, network, self.training.optimiser, loss, train, sample_clips)

    def _ours(self, way: Way) -> Variant:
        network = self._network(lambda: Latte(self.setting.config), way)
        config = dataclasses.replace(
            self.run.config, precision="bfloat16" if way.dtype == torch.bfloat16 else "float32"
        )
        run = dataclasses.replace(self.run, config=config, network=network)
        if way.compiled and self.device.type == "cuda":
            run.graphed = GraphedStep(functools.partial(learn, run), self.device)

        def loss(x0: Tensor, t: Tensor, y: Tensor, key: Tensor) -> Tensor:
            with self._autocast(way):
                return diffusion_loss(network, x0, t, self.schedule, key, y=y)["loss"]

        def train(x0: Tensor, y: Tensor) -> Tensor:
            network.train()
            with part(DATA):
                x0, y = x0.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            return train_step(run, x0, {"y": y})

        def sample_clips(start: Tensor, y: Tensor, steps: int) -> Tensor:
            graph = way.compiled and self.device.type == "cuda"
            options: dict[str, Any] = {"num_steps": steps, "cfg_scale": SCALE, "graph": graph}
            key = torch.zeros(2, dtype=torch.int64, device=start.device)
            with self._autocast(way):
                return sample(network.eval(), start, self.schedule, key, y=y, y_null=CLASSES, **options)

        return Variant(way, network, run.optimizer, loss, train, sample_clips)


def _train_config(setting: Setting) -> TrainConfig:
    return TrainConfig(
        batch_size=setting.batch,
        model=setting.config,
        diffusion=DiffusionConfig(timesteps="ptss" if setting.per_frame else "clip"),
        optim=OptimConfig(lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, ema_decay=DECAY),
    )

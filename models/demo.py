"""The main job on real input, in minutes on two CPU cores: `make demo`, or `python -m models.demo --out outputs/demo`.

Trains a small FVDM on a real clip in pixel space, draws clips in four ways with the one network, and measures a
training step against plain PyTorch. Writes to `--out`:

    samples.png                      a row for each task, given frames marked, under the real clip
    <task>.gif                       the clips
    loss.png                         the loss of each step
    speed.md                         clips a second and memory kept for the backward pass, measured in this run
    train/                           the training run, see models.train
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.baselines.plain import PlainLatte
from models import train
from models.command_line import one_line_errors
from models.config import TrainConfig
from models.data import contact_sheet, real_clip, write_gif
from models.data.decode import read_frames
from models.data.frames import to_clip
from models.latte import Latte, LatteConfig
from models.networks import Network
from models.sampling.draw import draw_clips
from models.sampling.network import load_network
from vidkern.diffusion import TASKS, diffusion_loss, make_schedule

PROG = "models.demo"
CONFIG = Path(__file__).parent / "configs" / "fvdm_demo.yaml"
CLIP = "carphone"
EPOCH = 4096  # clips, each from another place in the one video
STEPS = 50  # DDIM
WINDOWS, OVERLAP = 4, 4  # of the long video
SMOOTHED = 25  # steps in the running mean of the loss curve
ROUNDS = 9  # of each variant in the speed table, interleaved
ZOOM = 2


class Drawn(NamedTuple):
    """A clip (F, C, H, W) and which of its frames were given, bool (F,)."""

    clip: Tensor
    held: Tensor


def train_network(out: Path, video: Path) -> None:
    """Train by the demo's configuration; the training's own command does the work."""
    listing = out / "clips.txt"
    listing.write_text(f"{video.resolve()}\n" * EPOCH)
    shutil.rmtree(out / "train", ignore_errors=True)  # a demo begins anew
    options = ["--config", str(CONFIG), "--run_dir", str(out / "train")]
    if train.main([*options, "--data.path", str(listing)]):
        raise SystemExit(f"{PROG}: error: the training failed")


def draw_tasks(network: Network, config: TrainConfig, real: Tensor) -> dict[str, Drawn]:
    """Draw one clip for each task with the trained network; `real` (F, C, H, W) lends the given frames."""
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.num_steps)
    drawn = {}
    for task in ("standard", "image-to-video", "interpolation", "long-video"):
        long = task == "long-video"  # goes on from the whole real clip, window by window
        pattern = TASKS["standard" if long else task]
        held = pattern(torch.zeros(1, dtype=torch.int64), len(real))[1][0] | long
        clips = draw_clips(
            network,
            schedule,
            count=1,
            batch_size=1,
            seed=0,
            num_steps=STEPS,
            known=real if held.any() else None,
            chunks=WINDOWS if long else 1,
            overlap=OVERLAP if long else 0,
            task=pattern,
            prediction=config.diffusion.prediction,
            clip_x0=1.0,
            progress=True,
        )
        clip = clips[0]
        if not torch.equal(clip[: len(held)][held], real[held]):
            raise SystemExit(f"{PROG}: error: {task}: a given frame came out changed")
        drawn[task] = Drawn(clip, torch.cat([held, torch.zeros(len(clip) - len(held), dtype=torch.bool)]))
    return drawn


def write_pictures(out: Path, real: Tensor, drawn: dict[str, Drawn], fps: int) -> None:
    """Write the contact sheet and a GIF for each task."""
    rows = {"a real clip": Drawn(real, torch.zeros(len(real), dtype=torch.bool))}
    rows |= {
        f"{task}, {int(held.sum())} of {len(held)} frames given": Drawn(c, held) for task, (c, held) in drawn.items()
    }
    contact_sheet(
        out / "samples.png",
        [clip for clip, _ in rows.values()],
        captions=list(rows),
        held=[held for _, held in rows.values()],
        zoom=ZOOM,
        columns=max(map(len, (clip for clip, _ in rows.values()))),
    )
    for task, (clip, _) in drawn.items():
        write_gif(out / f"{task}.gif", clip, fps=fps, zoom=2 * ZOOM)


def write_loss_curve(out: Path) -> tuple[float, float]:
    """Plot the loss of each step; return its mean over the first and over the last steps."""
    lines = (out / "train" / "metrics.jsonl").read_text().splitlines()
    loss = torch.tensor([json.loads(line)["loss"] for line in lines])
    smooth = loss.unfold(0, SMOOTHED, 1).mean(1)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(loss) + 1), loss, linewidth=0.5, alpha=0.4, label="each step")
    axes.plot(range(SMOOTHED, len(loss) + 1), smooth, label=f"mean of {SMOOTHED} steps")
    axes.set(xlabel="step", ylabel="loss (mean squared error)", yscale="log", title="A small FVDM on a real clip")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
    return float(smooth[0]), float(smooth[-1])


class Speed(NamedTuple):
    """A training step's median seconds, and MiB that its forward pass keeps for its backward pass."""

    seconds: float
    kept: float


def measure_speed(config: LatteConfig, x0: Tensor, precision: str) -> dict[str, Speed]:
    """Time forward and backward of one batch (B, F, C, H, W) in a precision, the variants in turn.

    In float32 the norm of their gradients is checked equal first.
    """
    torch.manual_seed(0)
    ours = Latte(config)
    for parameter in ours.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # a fresh network is zero at its end, and would compare as zeros
    variants: dict[str, Latte | PlainLatte] = {
        "plain PyTorch, the public code's arithmetic": PlainLatte(config, "softmax"),
        "plain PyTorch, scaled_dot_product_attention": PlainLatte(config, "sdpa"),
        "vidkern": ours,
    }
    for model in variants.values():
        model.load_state_dict(ours.state_dict())
    wanted = _training_step(ours, x0, "float32")()
    for name, model in variants.items():
        if not torch.allclose(_training_step(model, x0, "float32")(), wanted, rtol=1e-4):
            raise SystemExit(f"{PROG}: error: {name} does not compute the gradients that vidkern computes")
    steps = {name: _training_step(model, x0, precision) for name, model in variants.items()}
    for step in steps.values():
        step()  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: Speed(statistics.median(seconds[name]), _kept(steps[name])) for name in steps}


def _training_step(model: Latte | PlainLatte, x0: Tensor, precision: str) -> Callable[[], Tensor]:
    """Return a function that runs forward and backward and returns the norm of all gradients."""
    schedule, key = make_schedule("linear"), torch.tensor([0, 0])
    t = torch.randint(1000, x0.shape[:2], generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = diffusion_loss(model, x0, t, schedule, key, learned_range=model.config.learn_sigma)["loss"]
        return nn.utils.get_total_norm(torch.autograd.grad(loss, trained))

    return step


def _kept(step: Callable[[], Tensor]) -> float:
    """MiB of the tensors that one step's autograd graph saves, each storage once; weights and inputs count too."""
    storages: dict[int, tuple[int, Tensor]] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        step()
    return sum(size for size, _ in storages.values()) / 2**20


def speed_table(speeds: dict[str, Speed], clips: int, precision: str) -> str:
    """Render the measurements as a Markdown table."""
    slowest = next(iter(speeds.values()))
    lines = [
        f"| training step in {precision} | clips/s | times the first | MiB kept for backward |",
        "|---|---|---|---|",
    ]
    for name, (seconds, kept) in speeds.items():
        lines.append(f"| {name} | {clips / seconds:.2f} | {slowest.seconds / seconds:.2f} | {kept:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROG}", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of the results")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with one_line_errors(PROG):
        video = real_clip(CLIP)
    train_network(out, video)
    network, config = load_network(out / "train")
    interval, frames = config.data.frame_interval, config.model.num_frames
    real = to_clip(read_frames(video, range(0, frames * interval, interval)), config.model.frame_size)
    drawn = draw_tasks(network, config, real)
    write_pictures(out, real, drawn, fps=8)
    first, last = write_loss_curve(out)
    batch = real.expand(config.batch_size, *real.shape).contiguous()
    speeds = measure_speed(config.model, batch, config.precision)
    table = speed_table(speeds, config.batch_size, config.precision)
    (out / "speed.md").write_text(table)
    if not last < first / 2:
        raise SystemExit(f"{PROG}: error: the loss did not fall: {first:.3f} at first, {last:.3f} at last")
    print(f"\n{table}")
    print(f"loss {first:.3f} -> {last:.3f}; every given frame came out bit for bit")
    print(f"pictures, loss curve and table are in {out}/ ({time.perf_counter() - begin:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables and pictures of predicted whole steps, and of the prediction put to the test on this machine."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.markdown import markdown
from benchmarks.results import Run
from benchmarks.steps.parts import PARTS
from benchmarks.steps.prediction import Machine, counted, memory_share, predict
from benchmarks.steps.tables import STEPS
from benchmarks.steps.variants import DDIM_STEPS, SAMPLING, TRAINING, Setting, Way
from models.latte import SIZES

PUBLIC = Way(False, torch.float32, "softmax")
SDPA = Way(False, torch.bfloat16)
OURS = Way(True, torch.bfloat16)
WAYS = (PUBLIC, SDPA, OURS)
NETWORKS = ("Latte-XL/2", "FVDM-XL/2")
BATCH = 4
TASKS = (TRAINING, SAMPLING)
#: What the curves go along: values of a batch, of frames, of a frame's height and width, and of the model's size.
BATCHES, FRAMES, HEIGHTS = (1, 2, 4, 8, 16, 32), (8, 16, 32, 64, 128), (32, 64, 128)


def step_table(machines: Sequence[Machine]) -> list[str]:
    """Return a row for each network, task and way: predicted milliseconds, and the share that memory bounds."""
    rows = []
    for name in NETWORKS:
        for task in TASKS:
            setting = Setting(name, BATCH)
            for way in WAYS:
                cells = [f"{name}, batch {BATCH}", "training step" if task == TRAINING else "DDIM step", way.name]
                for machine in machines:
                    ours = sum(predict(setting, OURS, task, machine).values())
                    total = sum(predict(setting, way, task, machine).values())
                    memory = memory_share(setting, way, task, machine)
                    cells.append(f"{total * 1e3:.0f} ({total / ours:.2f}x, {memory:.0%})")
                rows.append(cells)
    return markdown(["network", "what", "variant", *(f"{m.name}, predicted ms" for m in machines)], rows)


def parts_table(machine: Machine) -> list[str]:
    """Return the predicted milliseconds of each part of a training step."""
    rows = []
    for name in NETWORKS:
        for way in WAYS:
            parts = predict(Setting(name, BATCH), way, TRAINING, machine)
            rows.append([f"{name}, {way.name}", *(f"{parts.get(part, 0) * 1e3:.1f}" for part in PARTS)])
    return markdown([f"{machine.name}, predicted ms", *PARTS], rows)


def curves() -> dict[str, list[tuple[str, Setting]]]:
    """Return the settings along each curve, with what changes."""
    name = NETWORKS[0]
    return {
        "batch": [(str(batch), Setting(name, batch)) for batch in BATCHES],
        "frames": [(str(frames), Setting(name, 1, (("num_frames", frames),))) for frames in FRAMES],
        "tokens a frame": [(str(h * h // 4), Setting(name, 1, (("input_size", h),))) for h in HEIGHTS],
        "size": [(size, Setting(f"Latte-{size}/2", BATCH)) for size in SIZES],
    }


def curve_table(machines: Sequence[Machine]) -> list[str]:
    """Return how the prediction for a training step changes along each curve: ours, and the time of SDPA over it."""
    rows = []
    for along, settings in curves().items():
        for value, setting in settings:
            cells = [f"{along} {value}"]
            for machine in machines:
                ours, other = (sum(predict(setting, way, TRAINING, machine).values()) for way in (OURS, SDPA))
                cells.append(f"{setting.batch / ours:.3g} ({other / ours:.2f}x)")
            rows.append(cells)
    return markdown(["training step", *(f"{m.name}, predicted clips/s" for m in machines)], rows)


def against_measurement(runs: Iterable[Run]) -> list[str]:
    """Return each measured step of a CPU beside what the model says from the ceilings of the same run."""
    rows = []
    for run in runs:
        for result in run.results:
            if result["family"] != STEPS or "capability" in run.environment:
                continue
            machine = measured_machine(run, result["product_teraflops"])
            setting = Setting(**{**result["setting"], "overrides": tuple(map(tuple, result["setting"]["overrides"]))})
            for way in (PUBLIC, dataclasses.replace(SDPA, dtype=torch.float32), SDPA, OURS):
                variant = result["variants"].get(way.name, {})
                if "seconds" in variant:
                    steps = 1 if result["passes"] == TRAINING else DDIM_STEPS
                    measured = variant["seconds"] / steps
                    total = sum(predict(setting, way, result["passes"], machine).values())
                    name = f"{result['operator']}, {result['passes']}, {way.name}"
                    rows.append([name, f"{total:.2f}", f"{measured:.2f}", f"{measured / total:.2f}"])
    return markdown(["step", "predicted s", "measured s", "measured over predicted"], rows) if rows else []


def measured_machine(run: Run, products: dict[str, float]) -> Machine:
    """Return the machine that a run's ceilings describe; a CPU has no launches."""
    copied = run.ceilings["copy_gigabytes_per_second"] * 1e9
    return Machine(run.environment["device"], copied, products["bfloat16"] * 1e12, products["float32"] * 1e12, 0.0)


# --- pictures ---


def draw_parts(path: Path, machines: Sequence[Machine]) -> None:
    """Draw where a training step's time is predicted to go, each way a bar."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, machine in zip(figure.subplots(1, len(machines)), machines, strict=True):
        bars = {
            f"{name.split('-')[0]} {way.name}": predict(Setting(name, BATCH), way, TRAINING, machine)
            for name in NETWORKS
            for way in WAYS
        }
        stacked(axes, bars, 1e3)
        axes.set(title=f"{machine.name}, predicted", xlabel="ms, XL/2 training step, batch 4")
    _finish(figure, path)


def draw_measured_parts(path: Path, runs: Iterable[Run]) -> None:
    """Draw where the time of measured training steps went."""
    found = [(run, r) for run in runs for r in run.results if r["family"] == STEPS and r["passes"] == TRAINING]
    if not found:
        return
    columns = min(len(found), 3)
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in places[len(found) :]:
        axes.set_axis_off()
    for axes, (run, result) in zip(places, found, strict=False):
        stacked(axes, {name: v["parts"] for name, v in result["variants"].items() if "parts" in v}, 1.0)
        axes.set_title(f"{result['operator']}\n{result['shape_name']}, {run.environment['device']}, measured", size=9)
        axes.set_xlabel("s of a training step")
    _finish(figure, path)


def stacked(axes: Axes, bars: dict[str, dict[str, float]], scale: float) -> None:
    """Draw a bar of parts for each name, the first on top."""
    names = list(bars)[::-1]
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [bars[name].get(part, 0.0) * scale for name in names]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.tick_params(labelsize=7)


def draw_roofline(path: Path, machines: Sequence[Machine]) -> None:
    """Draw each part of a training step under the roof of each GPU: FLOPs a byte and what they allow."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    setting = Setting(NETWORKS[0], BATCH)
    for axes, machine in zip(figure.subplots(1, len(machines)), machines, strict=True):
        roof = [0.1, machine.half_flops / machine.bytes, 1e4]
        axes.plot(roof, [min(x * machine.bytes, machine.half_flops) / 1e12 for x in roof], color="black")
        for way, marker in ((SDPA, "o"), (OURS, "s")):
            for i, part in enumerate(PARTS):
                works = [(w, n) for w, n in counted(setting, way, TRAINING) if w.part == part]
                flops = sum(n * w.flops for w, n in works)
                if flops:
                    seconds = sum(n * w.seconds(machine) for w, n in works)
                    moved = sum(n * w.bytes for w, n in works)
                    label = f"{part}, {way.name}"
                    axes.plot(flops / moved, flops / seconds / 1e12, marker, color=f"C{i}", label=label)
        axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s", title=f"{machine.name}, predicted")
    _finish(figure, path)


def draw_curves(path: Path, machines: Sequence[Machine]) -> None:
    """Draw the predicted gain along each curve."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    every = curves()
    places = figure.subplots(1, len(every), sharey=True, squeeze=False)[0]
    for axes, (along, settings) in zip(places, every.items(), strict=True):
        for machine in machines:
            gains = []
            for _, setting in settings:
                ours, other = (sum(predict(setting, way, TRAINING, machine).values()) for way in (OURS, SDPA))
                gains.append(other / ours)
            axes.plot([value for value, _ in settings], gains, marker=".", label=machine.name)
        axes.set(xlabel=along)
    figure.axes[0].set_ylabel("SDPA over ours, predicted")
    _finish(figure, path)


def _finish(figure: Figure, path: Path) -> None:
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=7)
    figure.savefig(path, dpi=100)

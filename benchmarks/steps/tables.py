"""The tables of whole steps, from the results of a run."""

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.results import Run
from benchmarks.steps.parts import PARTS

#: The family of these results.
STEPS = "models"
MIB = 2**20
BASIS = (
    "Whole steps: clips a second of ours, uncompiled; how many times as long plain PyTorch takes, in the faster"
    " precision of each kind; and memory, how many times as much plain PyTorch's fastest variant takes at the peak of a"
    " step beyond weights, moments and averages. What was not measured is empty."
)
NO_GPU = "Whole steps have not yet been run on a GPU: `make gpu SUITE=models` does that."


def step_report(run: Run) -> list[str]:
    """Return, for each setting of a run, the table of its variants and that of where their time goes."""
    sections = []
    for result in run.results:
        if result["family"] == STEPS:
            sections += [_title(result), _variants(result), _parts(result)]
    return [section for section in sections if section]


def step_summary(runs: Iterable[Run]) -> list[str]:
    """Return a row for each setting: ours, and how many times as long and as much memory the others take."""
    rows, runs = [], list(runs)
    for run in runs:
        for result in run.results:
            if result["family"] != STEPS or "seconds" not in result["variants"][result["ours"]]:
                continue
            ours = result["variants"][result["ours"]]
            rows.append(
                [
                    run.environment["device"],
                    f"{result['operator']}, {result['shape_name']}",
                    result["passes"],
                    f"{result['shape'][0] / ours['seconds']:.3g}, {ours['dtype']}",
                    *(_ratio(_of_letter(result, letter), ours, "seconds") for letter in "abc"),
                    _ratio(_fastest(result), ours, "peak_bytes"),
                ]
            )
    header = ["device", "network", "what", "ours: clips/s", "a: public code", "b: SDPA", "c: b compiled", "memory"]
    told = [BASIS, "\n".join(markdown(header, rows))] if rows else []
    return told if on_gpu(runs) else [*told, NO_GPU]


def on_gpu(runs: Iterable[Run]) -> bool:
    """Return whether a GPU has run whole steps and ours were right."""
    return any(
        result["family"] == STEPS and result["variants"][result["ours"]]["correct"]
        for run in runs
        if "capability" in run.environment
        for result in run.results
    )


def _of_letter(result: dict[str, Any], letter: str) -> dict[str, Any] | None:
    """Return the fastest variant of a letter."""
    found = [v for v in result["variants"].values() if v["letter"] == letter and "seconds" in v]
    return min(found, key=lambda v: v["seconds"]) if found else None


def _fastest(result: dict[str, Any]) -> dict[str, Any] | None:
    """Return plain PyTorch's fastest variant."""
    found = [v for v in result["variants"].values() if not v["ours"] and "seconds" in v]
    return min(found, key=lambda v: v["seconds"]) if found else None


def _ratio(other: dict[str, Any] | None, ours: dict[str, Any], name: str) -> str:
    if other is None or name not in other or not ours.get(name):
        return ""
    return f"{other[name] / ours[name]:.2f}x"


def _title(result: dict[str, Any]) -> str:
    batch, frames, channels, height, width = result["shape"]
    lines = [f"**{result['operator']}**, {result['passes']}, {batch} x {frames} x {channels} x {height} x {width}:"]
    lines.append(f"{result['flops'] / 1e12:.3g} TFLOP at least; medians of {result['samples']} interleaved rounds.")
    if result["steps_taken"] > 1:
        lines.append(f"A run of 50 steps with guidance; {result['steps_taken']} of them were taken.")
    return " ".join(lines)


def _variants(result: dict[str, Any]) -> str:
    header = [
        *("variant", "", "seconds", "clips/s", "MFU", "ours is faster", "peak MiB", "saved MiB a block", "launches"),
        *("J a clip", "error"),
    ]
    ours = result["variants"][result["ours"]]
    rows = []
    for name, variant in result["variants"].items():
        seconds = variant.get("seconds")
        rows.append(
            [
                variant["letter"],
                name,
                _number("{:.4g}", seconds) if seconds else variant.get("failed", "wrong result")[:60],
                _number("{:.3g}", result["shape"][0] / seconds if seconds else None),
                _number("{:.0%}", _mfu(result, variant)),
                _ratio(variant, ours, "seconds"),
                _number("{:.0f}", _scaled(variant.get("peak_bytes"), 1 / MIB)),
                _number("{:.1f}", _scaled(variant.get("saved_bytes_a_block"), 1 / MIB)),
                _number("{}", variant.get("launches")),
                _number("{:.3g}", _scaled(variant.get("joules"), 1 / result["shape"][0])),
                _number("{:.1e}", variant.get("error")),
            ]
        )
    told = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return "\n".join(markdown([header[i] for i in told], [[row[i] for i in told] for row in rows]))


def _parts(result: dict[str, Any]) -> str:
    """Return the milliseconds of each part in the variants that were watched; empty when none was."""
    split = {name: variant["parts"] for name, variant in result["variants"].items() if "parts" in variant}
    if not split:
        return ""
    told = [part for part in PARTS if any(parts[part] >= 1e-4 for parts in split.values())]
    steps = result["steps_taken"]
    rows = [[name, *(f"{parts[part] / steps * 1e3:.1f}" for part in told)] for name, parts in split.items()]
    return "\n".join(markdown(["ms of a profiled step", *told], rows))


def _mfu(result: dict[str, Any], variant: dict[str, Any]) -> float | None:
    """Return the FLOPs that are needed over those that products in the variant's precision reach in the time taken."""
    reached = result["product_teraflops"][variant["dtype"]]
    return result["flops"] / variant["seconds"] / 1e12 / reached if "seconds" in variant else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)

"""Renders the Markdown tables from the JSON files of runs, and says which kernels no GPU has run yet."""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.results import RESULTS, Run, figures, read_runs
from benchmarks.steps.tables import STEPS, on_gpu, step_report, step_summary
from vidkern import _library

NAMES = ["operator", "shape", "dtype", "pass", "by"]
FIGURES = ["time", "GB/s", "% of copy", "memory", "energy"]
BASELINES = ("eager", "compile")
GPU_BACKENDS = ("triton", "cuda")
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def run_report(run: Run) -> str:
    """Return one run's conditions, the table of its operators, and the tables of its whole steps."""
    operators = dataclasses.replace(run, results=[r for r in run.results if r["family"] != STEPS])
    sections = [conditions(run)]
    if operators.results:
        sections.append("\n".join(result_table(operators)))
    return "\n\n".join([*sections, *step_report(run)])


def conditions(run: Run) -> str:
    """Return what a run was measured on, and its ceilings."""
    env, ceilings = run.environment, run.ceilings
    named = ("torch", "triton", "cuda", "cudnn", "driver", "threads", "load_average", "sm_mhz", "memory_mhz", "watts")
    versions = ", ".join(f"{name.replace('_', ' ')} {env[name]}" for name in named if env.get(name) is not None)
    lines = [f"**{env['device']}**, commit {env['commit']}, {env['date'][:10]}: {versions}."]
    if ceilings:
        lines.append(
            f"Ceilings in this run: copy {ceilings['copy_gigabytes_per_second']:.1f} GB/s,"
            f" {ceilings['product_size']}^3 {ceilings['product_dtype']} product"
            f" {ceilings['product_teraflops']:.2f} TFLOP/s."
        )
    return "\n".join(lines)


def result_table(run: Run) -> list[str]:
    """Return the table: ours, and in the last columns how many times as long the others take."""
    header = [*NAMES, *FIGURES, *BASELINES, "others"]
    rows = [_row(result, run.ceilings) for result in run.results]
    told = [i for i in range(len(header)) if i < len(NAMES) or any(row[i] for row in rows)]
    return markdown([header[i] for i in told], [[row[i] for i in told] for row in rows])


def _row(result: dict[str, Any], ceilings: dict[str, Any]) -> list[str]:
    ours = result["ours"]
    names = [result["operator"], result["shape_name"], result["dtype"], result["passes"], ours.removeprefix("ours:")]
    found = figures(result, ceilings)
    if not found:
        return [*names, "wrong result", *[""] * (len(FIGURES) + len(BASELINES))]
    cells = [
        _time(found["seconds"]),
        _number("{:.1f}", found.get("gigabytes_per_second")),
        _number("{:.0f}", found.get("percent_of_copy")),
        _memory(result["variants"][ours], result["variants"]["eager"]),
        _number("{:.2f} mJ", result["variants"][ours].get("joules"), 1e3),
    ]
    times = {name: _times(name, result, found) for name in result["variants"] if name != ours}
    cells += [times.pop(name, "") for name in BASELINES]
    return [*names, *cells, ", ".join(f"{name.removeprefix('ours:')} {value}" for name, value in times.items())]


def _number(form: str, value: float | None, unit: float = 1) -> str:
    return "" if value is None else form.format(value * unit)


def _memory(ours: dict[str, Any], eager: dict[str, Any]) -> str:
    """Return our peak, and how many times as much eager PyTorch holds."""
    peak = _number("{:.1f} MiB", ours.get("peak_bytes"), 2**-20)
    if not ours.get("peak_bytes") or "peak_bytes" not in eager:
        return peak
    return f"{peak} (eager {eager['peak_bytes'] / ours['peak_bytes']:.2f}x)"


def _times(variant: str, result: dict[str, Any], found: dict[str, float]) -> str:
    if f"times_{variant}" in found:
        return f"{found[f'times_{variant}']:.2f}x"
    return "fails" if "failed" in result["variants"][variant] else "wrong"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"


def never_on_gpu(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """Return (operator, backend) for every GPU kernel that no run has shown to be right on a GPU."""
    shown = {
        (result["operator"], name.removeprefix("ours:"))
        for run in runs
        if "capability" in run.environment
        for result in run.results
        if _covers_every_kernel(result)
        for name, variant in result["variants"].items()
        if variant["correct"]
    }
    return [
        (operator, backend)
        for operator, dispatcher in sorted(_library.operators.items())
        if not operator.endswith("_backward")
        for backend in GPU_BACKENDS
        if backend in dispatcher.kernels and (operator, backend) not in shown
    ]


def _covers_every_kernel(result: dict[str, Any]) -> bool:
    """Whether a result has run the gradient's kernel too, where its operator has one."""
    return result["passes"] == "forward+backward" or f"{result['operator']}_backward" not in _library.operators


def newest(runs: Sequence[Run]) -> Iterator[Run]:
    """Yield the runs, given oldest first, cut down to the families of which they are their device's newest.

    Of whole steps, which take minutes each and are often run apart, to the steps of which they are the newest.
    """

    def place(run: Run, result: dict[str, Any]) -> tuple[str, ...]:
        step = (result["operator"], result["shape_name"], result["passes"]) if result["family"] == STEPS else ()
        return run.environment["device"], result["family"], *step

    last = {place(run, result): run for run in runs for result in run.results}
    for run in runs:
        kept = [result for result in run.results if last[place(run, result)] is run]
        if kept:
            yield dataclasses.replace(run, results=kept)


def full_report(runs: Sequence[Run]) -> str:
    """Return the newest results of every device, and the kernels that wait for a GPU."""
    sections = [run_report(run) for run in newest(runs)]
    waiting = [[operator, backend, "not yet run on a GPU"] for operator, backend in never_on_gpu(runs)]
    if not on_gpu(runs):
        waiting.append(["whole steps", "all", "not yet run on a GPU"])
    if waiting:
        sections.append("\n".join(markdown(["operator", "kernels", "state"], waiting)))
    return "\n\n".join(sections)


def summary(runs: Sequence[Run]) -> str:
    """Return, for each device, operator and pass, how many times as long the others take over all shapes and dtypes."""
    groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for run in newest(runs):
        for result in run.results:
            if result["family"] == STEPS or result["timer"] == "overhead":
                continue
            found = figures(result, run.ceilings)
            if found:
                key = run.environment["device"], result["operator"], result["passes"]
                groups.setdefault(key, []).append(found)
    rows = [
        [*key, str(len(found)), *(_spread(found, f"times_{name}") for name in BASELINES)]
        for key, found in groups.items()
    ]
    told = ["\n".join(markdown(["device", "operator", "pass", "cases", *BASELINES], rows))] if rows else []
    return "\n\n".join([*told, *step_summary(newest(runs))])


def _spread(found: Sequence[dict[str, float]], name: str) -> str:
    values = [figure[name] for figure in found if name in figure]
    if len(values) <= 1:
        return "".join(f"{value:.2f}x" for value in values)
    return f"{min(values):.2f}x to {max(values):.2f}x, median {statistics.median(values):.2f}x"


def kernel_report(runs: Sequence[Run]) -> str:
    """Return, for each device's newest run that launched CUDA kernels of ours, what each of them needs."""
    last = {run.environment["device"]: run for run in runs if run.kernels}
    sections = [[conditions(run), "", *kernel_table(run)] for run in last.values()]
    return "\n\n".join("\n".join(lines) for lines in sections)


def kernel_table(run: Run) -> list[str]:
    """Return a row for each kernel and number of threads: per thread and block, and the SM's threads that it fills."""
    header = ["kernel", "threads", "registers", "shared", "stack and spills", "blocks an SM", "occupancy"]
    full = run.environment["threads_a_multiprocessor"]
    rows = [
        [k["kernel"], str(k["threads"]), str(k["registers"]), f"{k['shared_bytes']} B", f"{k['local_bytes']} B",
         str(k["blocks_per_sm"]), f"{k['blocks_per_sm'] * k['threads'] / full:.0%}"]
        for k in run.kernels
    ]  # fmt: skip
    return markdown(header, rows)


def put_into(page: Path, report: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the two markers of a page.

    Raises:
        ValueError: the page does not have the markers.
    """
    before, begun, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{page} must hold the lines {begin!r} and {end!r}")
    page.write_text(f"{before}{begin}\n{report}\n{end}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that holds <device>/*.json")
    parser.add_argument("--into", type=Path, metavar="PAGE", help=f"write between {BEGIN} and {END} of this page")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--summary", action="store_true", help="a row for each operator and pass, over all its cases")
    kind.add_argument("--kernels", action="store_true", help="registers, shared memory and occupancy of CUDA kernels")
    options = parser.parse_args(arguments)
    render = summary if options.summary else kernel_report if options.kernels else full_report
    report = render(read_runs(options.results))
    if options.into is None:
        print(report)
    else:
        put_into(options.into, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

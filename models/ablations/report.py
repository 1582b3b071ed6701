"""Tables, plots and pictures of the studies, and which arms can be told apart."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.report import markdown, put_into
from models.ablations.measures import MEASURES
from models.ablations.run import pictured, records
from models.ablations.studies import STUDIES, Study
from models.data import contact_sheet

BEGIN, END = "<!-- ablations: begin -->", "<!-- ablations: end -->"
RESULTS = "results.json"
SHEET_WIDTH = 48  # pixels of a frame, about


class Value(NamedTuple):
    """A measure of an arm: its mean over seeds, and the lowest and highest ends of the seeds' intervals."""

    mean: float
    low: float
    high: float


class Table(NamedTuple):
    """The results of a study on some data for one task."""

    study: Study
    data: str
    task: str
    records: list[dict[str, Any]]

    @property
    def arms(self) -> list[str]:
        """The arms that are done, in the study's order."""
        done = {record["arm"] for record in self.records}
        return [arm.name for arm in self.study.arms if arm.name in done]

    @property
    def measures(self) -> list[str]:
        """The measures that every arm has."""
        return [name for name in MEASURES if all(name in record["measures"] for record in self.records)]

    def of(self, arm: str) -> list[dict[str, Any]]:
        """The records of an arm by their seeds."""
        return sorted((record for record in self.records if record["arm"] == arm), key=lambda record: record["seed"])

    def value(self, arm: str, measure: str) -> Value:
        """A measure of an arm over its seeds."""
        found = [record["measures"][measure] for record in self.of(arm)]
        mean = sum(estimate["value"] for estimate in found) / len(found)
        return Value(mean, min(e["low"] for e in found), max(e["high"] for e in found))

    def real(self, measure: str) -> float | None:
        """The measure of real clips, where it can be had."""
        found = self.records[0]["real"].get(measure)
        return None if found is None else found["value"]


def tables(found: Sequence[dict[str, Any]]) -> list[Table]:
    """The records by study, data and task, in the order of the studies."""
    result = []
    for study, data in itertools.product(STUDIES.values(), ("digits", "clips")):
        for task in study.tasks:
            some = [r for r in found if (r["study"], r["data"], r["task"]) == (study.name, data, task)]
            if some:
                result.append(Table(study, data, task, some))
    return result


def write_report(out: Path, page: Path | None) -> None:
    """Write results.json, plots, pictures and report.md to `out`; with a page, into it and the folder beside it too."""
    out.mkdir(parents=True, exist_ok=True)
    found = records(out)
    kept = [{name: value for name, value in record.items() if name != "settings"} for record in found]
    (out / RESULTS).write_text(json.dumps(kept, indent=1) + "\n")
    grouped = [list(group) for _, group in itertools.groupby(tables(found), key=lambda t: (t.study.name, t.data))]
    pictures = []
    for group in grouped:
        name = f"{group[0].study.name}-{group[0].data}"
        plot(group, out / f"{name}.png")
        sheet(group, out, out / f"{name}-clips.png")
        pictures += [f"{name}.png", f"{name}-clips.png"]
    (out / "report.md").write_text(render(grouped, "") + "\n")
    if page is not None:
        folder = page.with_suffix("")
        folder.mkdir(exist_ok=True)
        for name in [RESULTS, *pictures]:
            shutil.copy(out / name, folder / name)
        put_into(page, render(grouped, f"{folder.name}/"), BEGIN, END)


def render(grouped: Sequence[Sequence[Table]], folder: str) -> str:
    """Return the Markdown of all tables; pictures are in `folder`."""
    lines: list[str] = []
    for name, groups in itertools.groupby(grouped, key=lambda group: group[0].study.name):
        lines += [f"## {STUDIES[name].title}", "", STUDIES[name].paper, ""]
        for group in groups:
            data = group[0].data
            lines += [f"### {'Moving digits' if data == 'digits' else 'Videos'}", "", conditions(group[0]), ""]
            for table in group:
                lines += [f"**{table.task}**", ""] if len(group) > 1 else []
                lines += [*rows(table), "", *(f"- {verdict(table, measure)}" for measure in table.measures), ""]
            lines += [f"![{name}]({folder}{name}-{data}.png)", "", f"![clips]({folder}{name}-{data}-clips.png)", ""]
    return "\n".join(lines).rstrip()


def conditions(table: Table) -> str:
    """Say what was trained, for how long and where."""
    settings, env = table.records[0]["training"], table.records[0]["environment"]
    seeds = len({record["seed"] for record in table.records})
    return (
        f"{settings['steps']} steps of {settings['batch_size']} clips, {seeds} seed{'s' if seeds > 1 else ''}, on"
        f" {env['device']} with {env['threads']} threads; torch {env['torch']}, {env['date'][:10]}."
    )


def rows(table: Table) -> list[str]:
    """The table: means over seeds, and in brackets the ends of the seeds' intervals."""
    header = ["arm", "seeds", "clips", *(MEASURES[name].heading for name in table.measures)]
    lines = []
    for arm in table.arms:
        found = table.of(arm)
        values = [table.value(arm, name) for name in table.measures]
        cells = [f"{_number(v.mean)} [{_number(v.low)}, {_number(v.high)}]" for v in values]
        lines.append([arm, str(len(found)), str(found[0]["clips"]), *cells])
    real = [table.real(name) for name in table.measures]
    lines.append(["real clips", "", "", *("" if value is None else _number(value) for value in real)])
    return markdown(header, lines)


def verdict(table: Table, measure: str) -> str:
    """Say which arm is best by a measure, and which others are worse by more than the intervals of all seeds."""
    sign = -1 if MEASURES[measure].more_is_better else 1
    values = {arm: table.value(arm, measure) for arm in table.arms}
    best, *others = sorted(values, key=lambda arm: sign * values[arm].mean)
    worse = [arm for arm in others if _apart(values[best], values[arm])]
    alike = [arm for arm in others if arm not in worse]
    parts = [f"{MEASURES[measure].heading}: best is {best}"]
    parts += [f"Worse beyond all intervals: {'; '.join(worse)}"] if worse else []
    parts += [f"Not told apart from it: {'; '.join(alike)}"] if alike else []
    return ". ".join(parts) + "."


def _apart(a: Value, b: Value) -> bool:
    return a.high < b.low or b.high < a.low


def _number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plot(group: Sequence[Table], path: Path) -> None:
    """Plot every measure of every task: a point for each seed with its interval, dashed what real clips have."""
    columns = max(len(table.measures) for table in group)
    height = 1.2 + 0.35 * max(len(table.arms) for table in group)
    figure = Figure(figsize=(3.2 * columns, height * len(group)), layout="constrained")
    for axes_row, table in zip(figure.subplots(len(group), columns, squeeze=False), group, strict=True):
        for axes, measure in itertools.zip_longest(axes_row, table.measures):
            if measure is None:
                axes.set_visible(False)
                continue
            for place, arm in enumerate(table.arms):
                found = table.of(arm)
                for i, estimate in enumerate(record["measures"][measure] for record in found):
                    y = place + 0.15 * (i - (len(found) - 1) / 2)
                    axes.plot([estimate["low"], estimate["high"]], [y, y], color=f"C{place}", linewidth=1)
                    axes.plot(estimate["value"], y, "o", color=f"C{place}", markersize=4)
            if (real := table.real(measure)) is not None:
                axes.axvline(real, color="grey", linestyle="--", linewidth=1)
            arrow = "more" if MEASURES[measure].more_is_better else "less"
            axes.set_title(f"{MEASURES[measure].heading}\n({arrow} is better)", fontsize=8)
            axes.set_yticks(range(len(table.arms)), table.arms if axes is axes_row[0] else [], fontsize=8)
            axes.set_ylim(len(table.arms) - 0.5, -0.5)
            axes.tick_params(axis="x", labelsize=7)
        axes_row[0].set_ylabel(table.task, fontsize=8)
    figure.savefig(path, dpi=100)


def sheet(group: Sequence[Table], out: Path, path: Path) -> None:
    """Show the first clip of each arm and task, with the first seed."""
    clips, captions = [], []
    for table in group:
        for arm in table.arms:
            clips.append(pictured(out, table.of(arm)[0]["name"])[0])
            captions.append(f"{arm}, {table.task}" if len(group) > 1 else arm)
    zoom = max(1, SHEET_WIDTH // clips[0].shape[-1])
    contact_sheet(path, clips, captions=captions, zoom=zoom, columns=max(map(len, clips)))

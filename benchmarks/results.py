"""A run's JSON file: written after every measurement, read back with the figures that follow from it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Where a run's JSON goes instead of RESULTS: `make gpu` sets it.
JSON_VARIABLE = "VIDKERN_BENCHMARK_JSON"
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Run:
    """One run on one device: its environment, its ceilings, its results, and what else is known.

    That is on CUDA the kernels of ours that it launched (vidkern._resources.Launched), and of ``make gpu`` its parts.
    """

    path: Path
    environment: dict[str, Any]
    ceilings: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: dict[str, Any]) -> None:
        """Append a result and write the file, so that a run which is cut short keeps what it measured."""
        self.results.append(result)
        self.write()

    def write(self) -> None:
        """Write the file in one step: a reader sees the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {key: value for key, value in vars(self).items() if key != "path"}
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(fresh, self.path)

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read a run back."""
        return cls(path, **json.loads(path.read_text()))


def result_path(environment: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Return <folder>/<device>/<date>-<commit>.json for a run that begins now."""
    moment = environment["date"][:19].replace(":", "")
    return folder / environment["device"] / f"{moment}-{environment['commit']}.json"


def read_runs(folder: Path = RESULTS) -> list[Run]:
    """Return every run under a folder, by device and then oldest first."""
    return [Run.read(path) for path in sorted(folder.glob("*/*.json"))]


def figures(result: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, float]:
    """Return what the tables show of the variant that serves by default; empty when its result was wrong.

    seconds; gigabytes_per_second and percent_of_copy from the least traffic; teraflops and percent_of_product where
    the problem counts FLOPs; and for every other variant that was right, times_<variant>: its time over ours.
    """
    ours = result["variants"][result["ours"]]
    if "seconds" not in ours:
        return {}
    seconds = ours["seconds"]
    found = {"seconds": seconds}
    if result["traffic_bytes"]:
        found["gigabytes_per_second"] = result["traffic_bytes"] / seconds / 1e9
        found["percent_of_copy"] = 100 * found["gigabytes_per_second"] / ceilings["copy_gigabytes_per_second"]
    if result["flops"]:
        found["teraflops"] = result["flops"] / seconds / 1e12
        found["percent_of_product"] = 100 * found["teraflops"] / ceilings["product_teraflops"]
    for name, variant in result["variants"].items():
        if name != result["ours"] and "seconds" in variant:
            found[f"times_{name}"] = variant["seconds"] / seconds
    return found

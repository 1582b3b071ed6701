"""Writes vidkern/ops/conv3d/roads.json: which of two roads was faster for each convolution, on each device measured.

Run ``python -m benchmarks.conv3d_roads`` after the conv3d suite. A device with one road gets no rows.
"""

import json
from collections.abc import Iterable
from typing import Any

from benchmarks.results import Run, read_runs
from vidkern.ops.conv3d.choice import TABLE, Layer

_OURS = "ours:"


def table_of(runs: Iterable[Run]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every device; of a layer that was measured more than once, the newest."""
    found: dict[str, dict[Layer, str]] = {}
    for run in runs:
        for result in run.results:
            fastest = _fastest(result)
            if fastest is not None:
                found.setdefault(run.environment["device"], {})[_layer(result)] = fastest
    return {
        device: [{**layer._asdict(), "backend": backend} for layer, backend in sorted(rows.items())]
        for device, rows in sorted(found.items())
    }


def _layer(result: dict[str, Any]) -> Layer:
    cin, cout, *kernel = result["shape"][:5]
    return Layer(result["dtype"], tuple(kernel), cin, cout)


def _fastest(result: dict[str, Any]) -> str | None:
    if result["operator"] != "causal_conv3d" or result["passes"] != "forward":
        return None
    roads = {
        name.removeprefix(_OURS): variant["seconds"]
        for name, variant in result["variants"].items()
        if name.startswith(_OURS) and "seconds" in variant
    }
    return min(roads, key=roads.__getitem__) if len(roads) > 1 else None


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table_of(read_runs()), indent=1) + "\n")

"""An evaluation's results: numbers by metric, as a table and as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.evaluation.bootstrap import Estimate
from models.training.checkpointing import atomic_file

UNITS = {"fvd": "FVD", "kvd": "KVD", "ssim": "SSIM", "psnr": "PSNR (dB)"}


def with_confidence(estimate: Estimate) -> str:
    """A value and how sure it is, as far as that is known: value ± standard error, or value [low, high]."""
    if estimate.error is not None:
        return f"{number(estimate.value)} ± {number(estimate.error)}"
    if math.isnan(estimate.low):
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def number(value: float) -> str:
    """Four significant digits, no exponent for the usual sizes."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.{max(3 - math.floor(math.log10(abs(value))), 0)}f}" if abs(value) >= 1e-4 else f"{value:.1e}"


def table(results: Mapping[str, Estimate], counts: str) -> str:
    """Markdown, a row for each metric."""
    lines = ["| metric | value | clips |", "|---|---|---|"]
    lines += [f"| {UNITS[name]} | {with_confidence(result)} | {counts} |" for name, result in results.items()]
    return "\n".join(lines)


def write(out: Path, protocol: Mapping[str, Any], results: Mapping[str, Estimate], notes: list[str], text: str) -> None:
    """Write results.json and table.md into `out`. JSON has null for a number that is not finite.

    Raises StorageError where they cannot be written.
    """

    def finite(value: Any) -> Any:
        return value if not isinstance(value, float) or math.isfinite(value) else None

    metrics = {name: {key: finite(value) for key, value in asdict(result).items()} for name, result in results.items()}
    content = {"protocol": dict(protocol), "metrics": metrics, "notes": notes}
    for name, written in (("results.json", json.dumps(content, indent=2)), ("table.md", text)):
        with atomic_file(out / name) as temporary:
            temporary.write_text(written + "\n")

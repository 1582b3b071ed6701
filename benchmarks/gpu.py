"""`make gpu`: everything that needs a CUDA GPU, in nine minutes and without the network.

Builds the CUDA library unless it is there, checks a small case of every CUDA kernel, by itself and under
compute-sanitizer, and one of every Triton kernel, then runs the operators' tests on the GPU, and the benchmarks. A part
that fails or runs out of time is reported, and the next one runs; --part gives one part all the time.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, environment
from benchmarks.report import markdown, run_report
from benchmarks.results import JSON_VARIABLE, Run, result_path
from benchmarks.suites import SUITES

PARTS = ("build", "doctor", "cuda", "memcheck", "racecheck", "triton", "tests", "benchmarks")
TOTAL_SECONDS = 520
CHECK_SECONDS, SANITIZER_SECONDS, TESTS_SECONDS = 40, 70, 100
#: Processes that share the tests, where pytest-xdist is installed: most of a test is Triton's compiler, on one core.
MOST_PROCESSES = 8
#: Without the tests of the CPU's kernels, and of what Triton would compile for other GPUs.
OF_A_GPU = "not cpu and not aot and not triton_compiles and not triton_keeps"
GRACE_SECONDS = 8
TAIL_LINES = 20
#: compute-sanitizer's filter: kernels whose mangled names hold the namespace.
WATCHED = ("--kernel-name", "kernel_substring=vidkern")
#: The suite of whole steps takes what time the operators' suites leave; its tests are the baselines'.
WHOLE, MODELS_TESTS = "models", "tests/benchmarks/test_baselines.py"
#: A suite's tests are tests/ops/test_<name>*.py, by its own name and by these.
FURTHER_TESTS = {
    "attention": ["temporal_attention"],
    "conv3d": ["norm_silu_pad", "upsample_conv"],
    "mlp": ["activation"],
    "noise": ["hybrid_loss"],
}
PREBUILT = ROOT / "vidkern" / "_C_cuda.so"


@dataclass(frozen=True)
class Part:
    """A command with a time limit; ``command`` is None where a tool that it needs is missing."""

    name: str
    command: Sequence[str] | None
    limit_seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def parts_of(suites: Sequence[str], results: Path) -> list[Part]:
    """Return the parts in order: every kernel's first result before all else, the benchmarks in the time left."""
    python = sys.executable
    every = set(suites) == set(SUITES)
    names = [name for suite in suites for name in (suite, *FURTHER_TESTS.get(suite, []))]
    of_suites = [str(path) for name in names for path in sorted(ROOT.glob(f"tests/ops/test_{name}*.py"))]
    tests = ["tests/ops", "tests/diffusion/test_graphs.py"] if every else of_suites or [MODELS_TESTS]
    timed = [f"benchmarks/test_{suite}.py" for suite in sorted(suites, key=lambda suite: (suite == WHOLE, suite))]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    on_gpu = ["--device", "cuda", "--continue-on-collection-errors", "-k", OF_A_GPU, *_processes()]
    build = [] if PREBUILT.exists() else [Part("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 150)]
    return [
        *build,
        Part("doctor", [python, "-m", "vidkern", "doctor"], 30),
        Part("cuda", small_cases(suites, "cuda"), CHECK_SECONDS),
        sanitizer_part("memcheck", suites),
        sanitizer_part("racecheck", suites),
        Part("triton", small_cases(suites, "triton"), CHECK_SECONDS),
        Part("tests", [*pytest, *on_gpu, *tests], TESTS_SECONDS),
        Part("benchmarks", [*pytest, "--benchmark", *timed], TOTAL_SECONDS, {JSON_VARIABLE: str(results)}),
    ]


def small_cases(suites: Sequence[str], backend: str) -> list[str]:
    """Return the command that checks a small, ragged case of each of a backend's kernels."""
    narrowed = [f"--suite={suite}" for suite in suites]
    return [sys.executable, "-m", "benchmarks.sanitize", "--backend", backend, *narrowed]


def _processes() -> list[str]:
    """Return pytest's options for several processes, none where pytest-xdist is missing."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2)))]


def sanitizer_part(tool: str, suites: Sequence[str]) -> Part:
    """Return compute-sanitizer's run of one tool over the small cases, each tensor in an allocation of its own.

    It watches our kernels alone: PyTorch's many, which make the inputs and the truth, would take minutes.
    """
    sanitizer = find_sanitizer()
    options = ["--tool", tool, "--error-exitcode", "1", *WATCHED]
    command = [sanitizer, *options, *small_cases(suites, "cuda")] if sanitizer else None
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(tool, command, SANITIZER_SECONDS, uncached, "compute-sanitizer is neither on PATH nor in CUDA_HOME")


def find_sanitizer() -> str | None:
    """Return compute-sanitizer's path, or None."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *(f"{h}/bin" for h in homes)]))


def alone(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """Return the parts of some names, in order, each with the total time for its limit."""
    return [replace(part, limit_seconds=TOTAL_SECONDS) for part in parts if part.name in names]


def run_part(part: Part, logs: Path, seconds_left: float) -> dict[str, Any]:
    """Run a part, its output going to <logs>/<name>.log; return how it ended, and never raise for its failure.

    The status is "passed", "failed", "timed out", "missing" (a tool is not there) or "no time left".
    """
    limit = min(part.limit_seconds, seconds_left)
    record: dict[str, Any] = {"name": part.name, "limit_seconds": round(limit), "seconds": 0.0, "returncode": None}
    if part.command is None:
        return record | {"status": "missing", "tail": [part.missing]}
    if limit <= 0:
        return record | {"status": "no time left", "tail": []}
    log = logs / f"{part.name}.log"
    start = time.monotonic()
    returncode = _run(part, log, limit)
    status = "timed out" if returncode is None else "passed" if returncode == 0 else "failed"
    return record | {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "returncode": returncode,
        "tail": log.read_text(errors="replace").splitlines()[-TAIL_LINES:],
    }


def _run(part: Part, log: Path, limit: float) -> int | None:
    """Return the exit status, or None when the time was up and the command and its children were ended."""
    assert part.command is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **part.environment}
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_hear_interrupts,
            )
        except OSError as error:
            output.write(f"{error}\n")
            return 127
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)


def _hear_interrupts() -> None:
    """Undo, in a child, the deafness to SIGINT that a shell's background jobs inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, after time to tell how far it came (as pytest does), and all its children."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_parts(parts: Sequence[Part], logs: Path, total_seconds: float) -> list[dict[str, Any]]:
    """Run the parts in turn within the total time, telling about each; a failing one does not stop the next."""
    start = time.monotonic()
    records = []
    for part in parts:
        print(f"{part.name} ...", flush=True)
        record = run_part(part, logs, total_seconds - (time.monotonic() - start))
        print(f"{part.name}: {record['status']} after {record['seconds']} s", flush=True)
        if record["status"] != "passed":
            print("\n".join(f"    {line}" for line in record["tail"]), flush=True)
        records.append(record)
    return records


def write_record(results: Path, device: torch.device, parts: Sequence[dict[str, Any]]) -> Run:
    """Add the parts to the run that the benchmarks wrote, or write one that holds the parts alone."""
    run = Run.read(results) if results.exists() else Run(results, environment(device), {})
    run.parts = list(parts)
    run.write()
    return run


def summary(run: Run) -> str:
    """Return the short tables: how each part ended, and the benchmarks."""
    rows = [
        [part["name"], part["status"], f"{part['seconds']:.0f} s", part["tail"][-1][:80] if part["tail"] else ""]
        for part in run.parts
    ]
    table = "\n".join(markdown(["part", "status", "time", "last line"], rows))
    return f"{run_report(run)}\n\n{table}\n\nwritten to {run.path}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when every part passed, 1 when one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for <device>/<date>-<commit>.json and logs")
    parser.add_argument("--suite", choices=SUITES, action="append", help="run this suite alone; may be repeated")
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="run this alone, in all the time; may be repeated"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA GPU, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    logs = options.out.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    results = result_path(environment(device), options.out.resolve())
    parts = parts_of(options.suite or SUITES, results)
    if options.part:
        parts = alone(parts, options.part)
    run = write_record(results, device, run_parts(parts, logs, TOTAL_SECONDS))
    print(summary(run))
    return int(any(part["status"] != "passed" for part in run.parts))


if __name__ == "__main__":
    sys.exit(main())

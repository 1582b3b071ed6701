"""`make gpu` without a GPU: its parts, that it goes on past one that fails, its record, and what it says here."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, sanitize
from benchmarks.gpu import Part, parts_of, run_parts, summary, write_record
from benchmarks.harness import Problem
from benchmarks.results import JSON_VARIABLE, Run
from benchmarks.suites import SUITES
from tests.benchmarks.problems import CEILINGS, CPU, environment_of, problem_of, result_of
from vidkern import _library, _resources, ops

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc (CUDA)")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")


def python(name: str, code: str, limit: float = 30, **environment: str) -> Part:
    return Part(name, [sys.executable, "-c", code], limit, environment)


def test_parts_that_fail_are_told_and_the_next_ones_run(tmp_path, capsys):
    parts = [
        python("good", "import os; print('value', os.environ['SOME'])", SOME="thing"),
        python("bad", "print('line one'); raise SystemExit(3)"),
        python("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=1),
        Part("absent", None, 5, missing="no such tool here"),
        Part("unknown", [str(tmp_path / "nothing")], 5),
        python("last", "print('the end')"),
    ]
    records = {record["name"]: record for record in run_parts(parts, tmp_path, total_seconds=60)}
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "good": "passed",
        "bad": "failed",
        "slow": "timed out",
        "absent": "missing",
        "unknown": "failed",
        "last": "passed",
    }
    assert records["good"]["tail"] == ["value thing"]
    assert (records["bad"]["returncode"], records["bad"]["tail"]) == (3, ["line one"])
    assert 1 <= records["slow"]["seconds"] < 20
    assert (records["slow"]["tail"][0], records["slow"]["tail"][-1]) == ("begun", "KeyboardInterrupt")
    told = capsys.readouterr().out
    assert "bad: failed" in told
    assert "    line one" in told
    assert "    no such tool here" in told


def test_a_part_that_is_out_of_time_ends_with_its_children(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    (record,) = run_parts([python("parent", code, limit=2)], tmp_path, total_seconds=60)
    child = int(record["tail"][0])
    for _ in range(50):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is still running")


def test_no_part_begins_when_the_total_is_spent(tmp_path):
    records = run_parts([python("first", "pass"), python("second", "pass")], tmp_path, total_seconds=0)
    assert [record["status"] for record in records] == ["no time left"] * 2


def test_the_parts_are_added_to_the_run_that_the_benchmarks_wrote(tmp_path):
    parts = [{"name": "tests", "status": "failed", "seconds": 2.0, "tail": ["1 failed"], "returncode": 1}]
    path = tmp_path / "run.json"
    Run(path, environment_of(), CEILINGS).add(result_of())
    run = write_record(path, CPU, parts)
    assert run.results == [result_of()]
    assert json.loads(path.read_text())["parts"] == parts
    lines = summary(run).splitlines()
    assert any("layer_norm_modulate" in line for line in lines)
    assert [cell.strip() for cell in lines[-3].strip("|").split("|")] == ["tests", "failed", "2 s", "1 failed"]


def test_a_record_is_written_even_when_no_benchmark_ran(tmp_path):
    run = write_record(tmp_path / "run.json", CPU, [])
    assert set(json.loads(run.path.read_text())) == {"environment", "ceilings", "results", "parts", "kernels"}
    assert "written to" in summary(run)


def test_a_prebuilt_library_is_not_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PREBUILT", tmp_path / "_C_cuda.so")
    names = [part.name for part in parts_of(SUITES, tmp_path / "run.json")]
    assert (
        names
        == list(gpu.PARTS)
        == ["build", "doctor", "cuda", "memcheck", "racecheck", "triton", "tests", "benchmarks"]
    )
    tests = next(part for part in parts_of(SUITES, tmp_path / "run.json") if part.name == "tests")
    assert tests.command[-2:] == ["tests/ops", "tests/diffusion/test_graphs.py"]
    gpu.PREBUILT.touch()
    assert [part.name for part in parts_of(SUITES, tmp_path / "run.json")] == names[1:]


def test_whole_steps_come_last_and_bring_their_baselines(tmp_path):
    parts = {part.name: part for part in parts_of(SUITES, tmp_path / "run.json")}
    assert parts["benchmarks"].command[-1] == "benchmarks/test_models.py"
    alone = {part.name: part for part in parts_of(["models"], tmp_path / "run.json")}
    assert alone["tests"].command[-1] == "tests/benchmarks/test_baselines.py"
    assert alone["benchmarks"].command[-1] == "benchmarks/test_models.py"


def test_a_suite_narrows_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    parts = {part.name: part for part in parts_of(["modulation"], tmp_path / "run.json")}
    assert parts["benchmarks"].command[-1] == "benchmarks/test_modulation.py"
    assert parts["benchmarks"].environment == {JSON_VARIABLE: str(tmp_path / "run.json")}
    small_cases = ["-m", "benchmarks.sanitize", "--backend", "cuda", "--suite=modulation"]
    assert parts["cuda"].command[1:] == small_cases
    assert parts["memcheck"].command[-len(small_cases) :] == small_cases
    assert parts["memcheck"].command[:3] == ["/cuda/bin/compute-sanitizer", "--tool", "memcheck"]
    assert sum(part.limit_seconds for part in parts.values() if part.name != "benchmarks") < gpu.TOTAL_SECONDS


def test_every_suite_runs_the_tests_of_its_operators(tmp_path):
    def run_by(suites: list[str]) -> set[str]:
        tests = next(part for part in parts_of(suites, tmp_path / "run.json") if part.name == "tests")
        return {Path(path).stem for path in tests.command if path.endswith(".py")}

    of_suites = set().union(*(run_by([suite]) for suite in SUITES))
    every = {path.stem for path in (gpu.ROOT / "tests/ops").glob("test_*.py")}
    assert every - of_suites == {"test_common", "test_embedding", "test_triton_launches"}
    assert run_by(["mlp"]) == {"test_activation", "test_activation_kernels"}


def test_one_part_has_all_the_time(tmp_path):
    parts = parts_of(SUITES, tmp_path / "run.json")
    kept = gpu.alone(parts, ["tests", "doctor"])
    assert [(part.name, part.limit_seconds) for part in kept] == [("doctor", 520), ("tests", 520)]


def test_what_a_cpu_does_is_not_tested_on_a_gpu(tmp_path):
    (tmp_path / "test_some_kernels.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('backend', ['cpu', 'cuda', 'triton'])\n"
        "def test_contract(backend): pass\n"
        "def test_triton_compiles_once(): pass\n"
        "def test_strides(): pass\n"
    )
    (tmp_path / "test_noise_aot.py").write_text("def test_registers(): pass\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-k", gpu.OF_A_GPU]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    kept = [line.split("::")[1] for line in listed.splitlines() if "::" in line]
    assert kept == ["test_contract[cuda]", "test_contract[triton]", "test_strides"]


@needs_nvcc
def test_the_filter_of_the_sanitizer_names_our_kernels_alone():
    dump, reason = _resources.resource_usage()
    assert dump is not None, reason
    (substring,) = [word.removeprefix("kernel_substring=") for word in gpu.WATCHED if "=" in word]
    assert all(substring in instance.name for instance in _resources.instances(dump))


def test_the_sanitizers_find_goes_into_the_record_and_the_next_part_runs(tmp_path, monkeypatch):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "$@"\necho "========= ERROR SUMMARY: 1 error"\n[ $2 = racecheck ]\n')
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    parts = [gpu.sanitizer_part(tool, ["modulation"]) for tool in ("memcheck", "racecheck")]
    memcheck, racecheck = run_parts(parts, tmp_path, 60)
    assert (memcheck["status"], racecheck["status"]) == ("failed", "passed")
    told, last = memcheck["tail"]
    assert told.startswith("--tool memcheck --error-exitcode 1 --kernel-name kernel_substring=vidkern ")
    assert told.endswith("-m benchmarks.sanitize --backend cuda --suite=modulation")
    assert last == "========= ERROR SUMMARY: 1 error"


def test_a_missing_sanitizer_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    (record,) = run_parts([gpu.sanitizer_part("racecheck", SUITES)], tmp_path, 60)
    assert (record["status"], record["tail"]) == ("missing", ["compute-sanitizer is neither on PATH nor in CUDA_HOME"])


@needs_no_cuda
@pytest.mark.parametrize(("main", "arguments"), [(gpu.main, ["--out", "nowhere"]), (sanitize.main, [])])
def test_without_a_gpu_there_is_one_line_and_status_2(main, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "needs a CUDA GPU" in said.err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--out", "nowhere", "--suite", "nothing"])
    assert refused.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_every_family_has_a_small_case_of_every_operator():
    small = sanitize.small_cases(SUITES)
    for problem in small:
        assert isinstance(problem, Problem)
        assert problem.backward == (f"{problem.operator}_backward" in _library.operators), problem
    covered = {problem.operator for problem in small}
    modulation = {"layer_norm_modulate", "rms_norm_modulate", "gate_residual"}
    assert modulation | {"gate_residual_modulate", "gate_residual_rms_modulate"} <= covered <= set(_library.operators)


def test_a_backend_is_not_asked_for_kernels_that_it_has_not():
    small = sanitize.small_cases(SUITES)
    assert sanitize.of_backend(small, "cuda") == small
    of_triton = {problem.operator for problem in sanitize.of_backend(small, "triton")}
    assert {problem.operator for problem in small} - of_triton == {"adamw_ema_", "norm_silu_pad"}


def test_a_small_case_is_judged_and_says_which_backend_is_absent():
    assert sanitize.run_case(problem_of(ops.gate_residual, True), CPU, "reference") in (
        "right",
        "not served by reference",
    )
    assert sanitize.run_case(problem_of(ops.gate_residual, True), CPU, "cuda") == "not served by cuda"
    backend = sanitize.serving_backends("gate_residual", True, CPU)[0]
    assert sanitize.run_case(problem_of(ops.gate_residual, True), CPU, backend) == "right"
    assert sanitize.run_case(problem_of(lambda x, y, gate: x, True), CPU, backend).startswith("wrong")

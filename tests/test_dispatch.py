"""Choosing a backend: automatic, forced, by environment, logged; and what doctor reports."""

import os
import subprocess
import sys

import pytest
import torch

import vidkern
from vidkern import _dispatch, _library
from vidkern.__main__ import doctor
from vidkern._dispatch import BackendError, Dispatcher, Kernel

X, V = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 8)


def a_dispatcher(refusal: str | None = None, unavailable: str | None = None) -> Dispatcher:
    kernels = {
        "cpu": Kernel(lambda x: "cpu", lambda x: refusal, unavailable),
        "reference": Kernel(lambda x: "reference", lambda x: None),
    }
    return Dispatcher("an_operator", kernels, device_argument=0)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_the_fast_backend_is_chosen_and_the_reference_takes_what_it_refuses():
    assert a_dispatcher()(X) == "cpu"
    assert a_dispatcher(refusal="no")(X) == "reference"
    assert a_dispatcher(unavailable="not built")(X) == "reference"


def test_forcing_a_backend_obeys_and_restores():
    dispatcher = a_dispatcher()
    with vidkern.backend("reference"):
        assert dispatcher(X) == "reference"
        with vidkern.backend(None):
            assert dispatcher(X) == "cpu"
        assert dispatcher(X) == "reference"
    assert dispatcher(X) == "cpu"


@pytest.mark.parametrize(
    ("dispatcher", "forced", "why"),
    [
        (a_dispatcher(refusal="D = 7 is odd"), "cpu", "D = 7 is odd"),
        (a_dispatcher(unavailable="_C_cpu.so is not built"), "cpu", "_C_cpu.so is not built"),
        (a_dispatcher(), "triton", "not written for this operator"),
    ],
)
def test_forcing_a_backend_that_cannot_serve_says_why(dispatcher, forced, why):
    with vidkern.backend(forced), pytest.raises(BackendError, match=f"'{forced}' is forced.*an_operator on cpu: {why}"):
        dispatcher(X)


def test_cuda_is_not_silently_replaced_on_cpu_tensors():
    with vidkern.backend("cuda"), pytest.raises(BackendError, match="cannot serve layer_norm_modulate on cpu"):
        vidkern.ops.layer_norm_modulate(X, V, V)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="one of reference, cpu, triton, cuda, got 'metal'"), vidkern.backend("metal"):
        pass
    failed = run_python("import vidkern", VIDKERN_BACKEND="metal")
    assert failed.stderr.strip().endswith(
        "VIDKERN_BACKEND: backend must be one of reference, cpu, triton, cuda, got 'metal'"
    )


def test_the_log_tells_each_choice_once():
    code = (
        "import torch, vidkern; x, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 8)\n"
        "for _ in range(3): vidkern.ops.layer_norm_modulate(x, v, v)\n"
        "with vidkern.backend('reference'): vidkern.ops.layer_norm_modulate(x, v, v)\n"
        "vidkern.ops.layer_norm_modulate(x.double(), v.double(), v.double())"
    )
    lines = run_python(code, VIDKERN_LOG="dispatch", VIDKERN_BACKEND="").stderr.splitlines()
    assert lines.count("vidkern: layer_norm_modulate on cpu: reference (forced)") == 1
    assert len(lines) == len(set(lines))
    assert any("not cpu: " in line for line in lines), "float64 is not the compiled kernel's: the log says so"
    assert run_python(code, VIDKERN_LOG="", VIDKERN_BACKEND="").stderr == ""


def test_an_unknown_log_subject_is_refused():
    failed = run_python("import vidkern", VIDKERN_LOG="dispach")
    assert "VIDKERN_LOG must be 'dispatch' or unset, got 'dispach'" in failed.stderr


def test_the_environment_forces_a_backend():
    code = "import vidkern._dispatch as d; print(d.forced_backend())"
    assert run_python(code, VIDKERN_BACKEND="reference").stdout.strip() == "reference"


def test_doctor_lists_every_operator_with_a_reason_for_each_absent_backend():
    report = doctor()
    rows = {
        line.split()[0]: line.split()[1:]
        for line in report.splitlines()
        if line and line.split()[0] in _library.operators
    }
    assert rows.keys() == _library.operators.keys()
    for name, (serving, *cells) in rows.items():
        dispatcher = _library.operators[name]
        for backend, cell in zip(_dispatch.BACKENDS, cells, strict=True):
            reason = dispatcher.why_not(backend, "cpu")
            assert (cell == "yes") == (reason is None)
            assert reason is None or f"{cell} {reason}" in report
        assert dispatcher.why_not(serving, "cpu") is None


def test_doctor_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "vidkern", "doctor"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert f"vidkern {vidkern.__version__}" in done.stdout
    assert "layer_norm_modulate" in done.stdout


def test_differentiating_twice_is_refused_not_wrong():
    x, v = X.clone().requires_grad_(), V.clone().requires_grad_()
    y = vidkern.ops.layer_norm_modulate(x, v, v)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()

"""What doctor and the benchmarks tell of the CUDA kernels: read from a library's file, and asked of CUDA."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.emulator import build
from vidkern import __main__, _extension, _resources
from vidkern._resources import Compiled, Launched

ROOT = Path(__file__).parent.parent
FILE = "52_GLOBAL__N__f7b97c40_13_modulation_cu_1dbb864d_32604"
DUMP = f"""
Fatbin elf code:
================
arch = sm_80
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN7vidkern4cuda{FILE}14forward_kernelI6__halfEEvNS1_7ForwardE:
  REG:96 STACK:0 SHARED:384 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7vidkern4cuda{FILE}14forward_kernelIfEEvNS1_7ForwardE:
  REG:64 STACK:8 SHARED:512 LOCAL:24 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z5plaini:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Function _Z5plaini:
  REG:48 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
KERNELS = [
    Compiled("sm_80", "", "plain", 1, (40, 40), 0, 0),
    Compiled("sm_80", "modulation.cu", "forward_kernel", 2, (64, 96), 512, 32),
    Compiled("sm_90a", "", "plain", 1, (48, 48), 0, 0),
]


def test_the_kernels_of_a_dump_are_gathered_by_target_and_file():
    assert _resources.parse(DUMP) == KERNELS


def test_doctor_tells_what_each_kernel_needs(monkeypatch):
    monkeypatch.setattr(_resources, "compiled", lambda: (KERNELS, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    header, _, forward, _ = (line.split() for line in __main__.doctor().splitlines()[-4:])
    assert header[:2] == ["CUDA", "kernel"]
    assert forward == ["modulation.cu", "forward_kernel", "sm_80", "2", "64", "to", "96", "512", "B", "32", "B"]


@pytest.mark.parametrize(
    ("capability", "said"), [((8, 0), "modulation.cu forward_kernel"), ((12, 0), "none compiled for sm_120")]
)
def test_doctor_tells_of_this_gpus_target_alone(monkeypatch, capability, said):
    monkeypatch.setattr(_resources, "compiled", lambda: (KERNELS, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    table = "\n".join(__main__._kernels())
    assert said in table
    assert "sm_90a" not in table


def test_a_missing_library_or_tool_is_one_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(_resources, "LIBRARY", tmp_path / "_C_cuda.so")
    assert _resources.compiled() == ([], "_C_cuda.so is not built")
    _resources.LIBRARY.touch()
    monkeypatch.setattr(_resources, "_cuobjdump", lambda: None)
    assert _resources.compiled() == ([], "cuobjdump is neither on PATH nor in triton")
    assert __main__._kernels() == ["CUDA kernels: cuobjdump is neither on PATH nor in triton"]


def test_without_its_library_or_module_launches_have_a_reason(monkeypatch):
    monkeypatch.setitem(_extension.missing, "cuda", "_C_cuda.so is not loaded: torch sees no CUDA device")
    assert _resources.launched() == ([], "_C_cuda.so is not loaded: torch sees no CUDA device")
    monkeypatch.setitem(_extension.missing, "cuda", None)
    monkeypatch.setitem(sys.modules, "vidkern._C_info", None)
    found, reason = _resources.launched()
    assert found == []
    assert reason.startswith("_C_info, which reports launches, does not load: ")


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory):
    """Return the module as setup.py builds it."""
    import pybind11

    path = tmp_path_factory.mktemp("info") / f"_C_info{sysconfig.get_config_var('EXT_SUFFIX')}"
    cxx = shutil.which(os.environ.get("CXX", "g++")) or "c++"
    include = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command = [cxx, "-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-shared", *include]
    subprocess.run([*command, str(ROOT / "csrc/info/info.cpp"), "-o", str(path), "-ldl"], check=True)
    spec = importlib.util.spec_from_file_location("vidkern._C_info", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_launch_of_a_loaded_library_is_reported_once(info, monkeypatch, tmp_path):
    library = tmp_path / "vidkern_reported.so"
    monkeypatch.setitem(_extension.missing, "cuda", None)
    monkeypatch.setitem(sys.modules, "vidkern._C_info", info)
    monkeypatch.setattr(_resources, "LIBRARY", library)
    assert _resources.launched() == ([], f"{library} is not loaded")
    sources = [ROOT / "tests/emulator/faults.cu", ROOT / "csrc/cuda/resources.cu"]
    build.load(sources, "vidkern_reported", tmp_path)
    assert _resources.launched() == ([], None)
    for _ in range(2):
        torch.ops.vidkern_reported.reverse.default(torch.randn(64, device="cpu"), 0)
    assert _resources.launched() == ([Launched("kernel", 64, 40, 256, 16, 32)], None)


def test_a_library_that_reports_nothing_is_said(info):
    library = _extension.__file__.replace("_extension.py", "_C_cpu.so")
    with pytest.raises(RuntimeError, match="does not report its launches"):
        info.launched(library)


def test_a_kernels_name_is_told_without_namespaces_and_parameters():
    name = "void vidkern::cuda::(anonymous namespace)::backward<float, 72>(vidkern::cuda::Backward)"
    assert _resources._readable(name) == "backward<float, 72>"

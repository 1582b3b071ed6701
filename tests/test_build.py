"""setup.py: what it builds, what it rebuilds, what it says without a compiler, and what the libraries need to load."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vidkern import _extension

ROOT = Path(__file__).parent.parent
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc (CUDA)")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what a build needs, so that tests may touch it."""
    copy = tmp_path_factory.mktemp("project")
    for folder in ("csrc", "vidkern"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / path, copy / path)
    return copy


def run(project: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env={**os.environ, "VIDKERN_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_only_what_changed_is_built_again(project):
    build = ("setup.py", "build_ext", "--inplace")
    run(project, *build)
    library = project / "vidkern" / "_C_cpu.so"
    assert library.exists()
    assert "ninja: no work to do" in run(project, *build)
    with (project / "csrc" / "cpu" / "vec.h").open("a") as header:
        header.write("// touched\n")
    assert "modulation.cpp" in run(project, *build)


def test_the_wheel_serves_every_python(project, tmp_path):
    run(
        project, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), "."
    )
    [wheel] = tmp_path.glob("*.whl")
    assert re.fullmatch(r"vidkern-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "vidkern/_C_cpu.so" in names
    assert "vidkern/ops/modulation/op.py" in names
    assert not [name for name in names if name.startswith(("tests", "models", "csrc"))]


def test_without_a_compiler_the_install_goes_on_and_says_so(project, tmp_path):
    said = run(
        project, "setup.py", "build_ext", "--build-lib", str(tmp_path), CXX="no-such-compiler", PATH=str(tmp_path)
    )
    assert [line for line in said.splitlines() if "no C++ compiler" in line] == [
        "vidkern: no C++ compiler found, so no compiled kernels; Triton and PyTorch remain"
    ]
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails_is_one_line_below_its_own(project, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-temp", str(tmp_path / "build")],
        cwd=project,
        env={**os.environ, "VIDKERN_CUDA": "0", "CXX": str(compiler)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: vidkern: {compiler} ")
    assert done.stderr.count("\n") == 1
    assert "no such flag" in done.stdout


def test_a_build_goes_on_without_the_report_of_what_kernels_need(project, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n[ "$1" = -o ] && touch "$2.d"\n')
    nvcc.chmod(0o755)
    (project / "csrc" / "info" / "info.cpp").write_text("#error not on this machine\n")
    said = run(project, "setup.py", "build_ext", "--inplace", VIDKERN_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "vidkern: no report of what CUDA kernels need: _C_info failed as told above" in said
    package = project / "vidkern"
    assert (package / "_C_cuda.so").exists()
    assert not list(package.glob("_C_info*"))


def undefined_symbols(library: Path) -> list[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in listing.stdout.splitlines()]


@pytest.mark.parametrize("name", ["_C_cpu.so", pytest.param("_C_cuda.so", marks=needs_nvcc)])
def test_a_library_needs_only_the_stable_abi_of_torch(name):
    symbols = undefined_symbols(Path(_extension.__file__).with_name(name))
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    of_torch = [symbol for symbol in symbols if re.search(r"torch|c10|2at[0-9]|Py[A-Z_]", symbol)]
    assert all(symbol.startswith(("aoti_torch_", "torch_")) for symbol in of_torch), of_torch


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90a"])
def test_cuda_kernels_fit_the_budget(target, tmp_path):
    import torch

    include = Path(torch.__file__).parent / "include"
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        command = f"nvcc -std=c++20 -O3 -cubin -arch={target} -Xptxas -v -DUSE_CUDA"
        command += f" -DTORCH_TARGET_VERSION=0x020b000000000000 -I{ROOT / 'csrc'} -isystem {include}"
        done = subprocess.run(
            [*command.split(), str(source), "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        spills = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", done.stderr)]
        shared = [int(n) for n in re.findall(r"(\d+) bytes smem", done.stderr)]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
        assert len(registers) > 0, done.stderr
        assert max(spills) == 0, done.stderr
        assert max(shared, default=0) <= 99 * 1024, done.stderr

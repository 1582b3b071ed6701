"""setup.py: what it builds, what it rebuilds, what it says without a compiler, and what the libraries need to load."""

import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from vidkern import _extension, _resources
from vidkern._resources import Instance

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


class Gpu(NamedTuple):
    """What one SM of a target holds at most, and the bytes that it must have under way to keep the memory busy."""

    threads: int
    blocks: int
    bytes_under_way: float  # bandwidth x 600 ns of latency / SMs


TARGETS = {
    "sm_80": Gpu(2048, 32, 11e3),  # A100: 2039 GB/s, 108 SMs
    "sm_86": Gpu(1536, 16, 5.5e3),  # A6000: 768 GB/s, 84 SMs
    "sm_90a": Gpu(2048, 32, 22e3),  # H200: 4800 GB/s, 132 SMs
}


@cache
def kernels_of(target: str) -> list[Instance]:
    """Return what the compiler says of every kernel in the library that the build made."""
    dump, reason = _resources.resource_usage()
    assert dump is not None, reason
    found = [instance for instance in _resources.instances(dump) if instance.target == target]
    assert len(found) > 100, f"{len(found)} kernels for {target}"
    return found


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_cuda_kernels_fit_the_budget(target):
    for kernel in kernels_of(target):
        assert kernel.local_bytes == 0, kernel
        assert kernel.shared_bytes <= 99 * 1024, kernel


def blocks_of_an_sm(kernel: Instance, threads: int, gpu: Gpu) -> int:
    """Return how many blocks an SM holds: each of its four parts gives registers to warps, in eights a thread."""
    warps_of_a_part = 16384 // (32 * 8 * math.ceil(kernel.registers / 8))
    return min(4 * warps_of_a_part // (threads // 32), gpu.threads // threads, gpu.blocks)


class ModulationKernel(NamedTuple):
    """A kernel of csrc/cuda/modulation.cu and the template arguments in its name."""

    kernel: Instance
    member: tuple[str, ...]  # direction, residual, norm, dtype
    packs: int  # of eight elements, that a thread owns
    tokens: int  # that a block loads at a time
    max_threads: int

    @property
    def loaded_bytes(self) -> int:
        """Bytes of each channel that a block loads at a time."""
        direction, residual, norm, dtype = self.member
        tensors = {"forward": 1, "backward": 2 if norm != "0" else 1}[direction]
        tensors += int(residual) * (2 if direction == "backward" and norm != "0" else 1)
        return self.tokens * tensors * (4 if dtype == "f" else 2)

    def threads(self, channels: int) -> int:
        """Return the threads of a block for D channels."""
        return 32 * math.ceil(channels / 8 / self.packs / 32)


def modulation_kernels(target: str) -> list[ModulationKernel]:
    pattern = r"(forward|backward)_kernelILb([01])\w*NormE([012])E(f|6__half|13__nv_bfloat16)\w*ConfigI"
    pattern += r"Li(\d+)ELi(\d+)ELi\d+ELi(\d+)E"
    found = []
    for kernel in kernels_of(target):
        match = re.search(pattern, kernel.name)
        if match is not None:
            packs, tokens, max_threads = map(int, match.groups()[4:])
            found.append(ModulationKernel(kernel, match.groups()[:4], packs, tokens, max_threads))
    return found


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_modulation_kernels_keep_the_memory_busy(target):
    gpu, kernels = TARGETS[target], modulation_kernels(target)
    assert len({kernel.member for kernel in kernels}) == 5 * 2 * 3  # operators, directions, dtypes
    for kernel in kernels:
        assert blocks_of_an_sm(kernel.kernel, kernel.max_threads, gpu) >= 1, f"cannot be launched: {kernel}"
    for channels in (1152, 1536, 3072):
        fitting = [kernel for kernel in kernels if kernel.threads(channels) <= kernel.max_threads]
        fitting.sort(key=lambda kernel: kernel.packs, reverse=True)
        for kernel in {kernel.member: kernel for kernel in fitting}.values():  # of each, the one with fewest packs
            threads = kernel.threads(channels)
            blocks = blocks_of_an_sm(kernel.kernel, threads, gpu)
            assert blocks >= 2, f"nothing to do at a barrier: D = {channels}, {kernel}"
            assert blocks * threads >= 384, f"too few threads: D = {channels}, {kernel}"
            under_way = blocks * channels * kernel.loaded_bytes
            assert under_way >= gpu.bytes_under_way, f"{under_way} bytes under way: D = {channels}, {kernel}"


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half"])
def test_attention_kernels_of_16_frames_keep_the_memory_busy(dtype, target):
    gpu, frames, warps, found = TARGETS[target], 16, 4, []
    for kernel in kernels_of(target):
        match = re.search(rf"temporal_attention(_backward_one_tile)?_kernelI{dtype}Li(\d+)EE", kernel.name)
        if match is not None:
            tensors, d = (4 if match[1] else 3), int(match[2])  # q, k, v (and do), all loaded before the first wait
            under_way = blocks_of_an_sm(kernel, 32 * warps, gpu) * warps * tensors * frames * d * 2
            assert under_way >= gpu.bytes_under_way, f"{under_way} bytes under way: {kernel}"
            found.append((tensors, d))
    assert sorted(found) == [(tensors, d) for tensors in (3, 4) for d in (32, 64, 72, 80, 96, 128)]

"""Builds the compiled operators: vidkern/_C_cpu.so always, vidkern/_C_cuda.so where nvcc is found.

Both speak PyTorch's stable ABI, so one binary serves every Python and every torch >= 2.11. Neither is needed to
import vidkern. ``VIDKERN_CUDA=0`` leaves the CUDA library out; ``CXX`` and ``CUDA_HOME`` choose the compilers.
Beside the CUDA library comes vidkern/_C_info, by pybind11 and for this Python alone, which reports what the CUDA
kernels need; a build without it goes on.
"""

import importlib.util
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


CXX_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra -Wno-psabi"
CUDA_FLAGS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -warn-spills --threads 2"
CUDA_TARGETS = ("sm_80", "sm_86", "sm_90a")
PTX_TARGET = "compute_90"  # what later GPUs compile for themselves
TORCH_ABI = "0x020b000000000000"  # torch 2.11
INFO = f"_C_info{sysconfig.get_config_var('EXT_SUFFIX')}"


def find_cxx() -> str | None:
    """Return the C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def find_nvcc() -> str | None:
    """Return the CUDA compiler, or None where it is missing or unwanted."""
    if os.environ.get("VIDKERN_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")


def torch_folder() -> Path:
    """Return the folder of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("building vidkern needs torch's headers: install torch >= 2.11 first")
    return Path(spec.origin).parent


def ninja_file(cxx: str, nvcc: str | None) -> str:
    """Return the build graph: an object per source file, a library per language."""
    torch = torch_folder()
    include = f"-DTORCH_TARGET_VERSION={TORCH_ABI} -I{ROOT / 'csrc'} -isystem {torch / 'include'}"
    rules = [
        f"cxx = {cxx}",
        "rule compile_cpu",
        f"  command = $cxx {CXX_FLAGS} {include} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link_cpu",
        f"  command = $cxx -shared $in -o $out -L{torch / 'lib'} -ltorch_cpu",
        *_library("cpu", "cpp"),
    ]
    if nvcc is not None:
        arch = [f"-gencode=arch={sm.replace('sm', 'compute')},code={sm}" for sm in CUDA_TARGETS]
        arch.append(f"-gencode=arch={PTX_TARGET},code={PTX_TARGET}")
        rules += [
            f"nvcc = {nvcc} -ccbin $cxx",
            "rule compile_cuda",
            f"  command = $nvcc {CUDA_FLAGS} {' '.join(arch)} -DUSE_CUDA {include} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule stub",  # torch's CUDA library by name: a CPU build of torch does not have it
            "  command = $cxx -shared -Wl,-soname,libtorch_cuda.so -x c /dev/null -o $out",
            "build libtorch_cuda.so: stub",
            "rule link_cuda",
            f"  command = $nvcc -shared $in -o $out -Xlinker --no-as-needed"
            f" -L{torch / 'lib'} -ltorch_cpu -L. -ltorch_cuda",
            *_library("cuda", "cu", "libtorch_cuda.so"),
            *_info(),
            "default _C_cpu.so _C_cuda.so",
        ]
    return "\n".join(rules) + "\n"


def _library(name: str, extension: str, needs: str = "") -> list[str]:
    sources = sorted((ROOT / "csrc" / name).glob(f"*.{extension}"))
    objects = [f"{name}/{source.stem}.o" for source in sources]
    compiles = [f"build {obj}: compile_{name} {src}" for obj, src in zip(objects, sources, strict=True)]
    return [*compiles, f"build _C_{name}.so: link_{name} {' '.join(objects)} | {needs}".rstrip(" |")]


def _info() -> list[str]:
    pybind11 = importlib.util.find_spec("pybind11")
    headers = [Path(pybind11.origin).parent / "include"] if pybind11 and pybind11.origin else []
    include = " ".join(f"-isystem {folder}" for folder in [*headers, sysconfig.get_path("include")])
    return [
        "rule compile_info",
        f"  command = $cxx {CXX_FLAGS} -shared -I{ROOT / 'csrc'} {include} -MMD -MF $out.d $in -o $out -ldl",
        "  depfile = $out.d",
        "  deps = gcc",
        f"build {INFO}: compile_info {ROOT / 'csrc' / 'info' / 'info.cpp'}",
    ]


class BuildKernels(build_ext):
    """Runs ninja over the build graph and puts the libraries into the package."""

    def run(self) -> None:
        """Build what the compilers at hand can build; without a C++ compiler, say so and go on."""
        cxx = find_cxx()
        if cxx is None:
            print("vidkern: no C++ compiler found, so no compiled kernels; Triton and PyTorch remain", file=sys.stderr)
            return
        # one folder for `pip install -e` and `build_ext --inplace`: neither builds again what the other has built
        folder = (ROOT / "build" if self._in_place() else Path(self.build_temp).resolve()) / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        graph = ninja_file(cxx, find_nvcc())
        ninja = folder / "build.ninja"
        if not ninja.exists() or ninja.read_text() != graph:
            ninja.write_text(graph)
        command = [sys.executable, "-m", "ninja", "-C", str(folder)]
        print(shlex.join(command))
        if subprocess.run(command).returncode:
            raise CompileError(f"vidkern: {cxx} or nvcc failed as told above; VIDKERN_CUDA=0 does without nvcc")
        built = self._outputs()
        if find_nvcc() and subprocess.run([*command, INFO]).returncode:
            print("vidkern: no report of what CUDA kernels need: _C_info failed as told above", file=sys.stderr)
            built = [library for library in built if library.name != INFO]
        for library in built:
            library.parent.mkdir(parents=True, exist_ok=True)
            fresh = library.with_suffix(".new")
            shutil.copy2(folder / library.name, fresh)
            fresh.replace(library)  # a process that has the old library mapped keeps it

    def _in_place(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def _outputs(self) -> list[Path]:
        package = (ROOT if self._in_place() else Path(self.build_lib)) / "vidkern"
        built = ["_C_cpu.so"] + (["_C_cuda.so", INFO] if find_nvcc() else [])
        return [package / name for name in built]

    def get_outputs(self) -> list[str]:
        """Return the files that go into the wheel."""
        return [str(path) for path in self._outputs() if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Return an empty mapping: an editable install finds the libraries in the source tree."""
        return {}


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for every Python 3 on this platform: the stable ABI does not depend on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return (python, abi, platform)."""
        return "py3", "none", f"{platform.system().lower()}_{platform.machine()}"


setup(
    version=runpy.run_path(str(ROOT / "vidkern" / "version.py"))["__version__"],
    packages=find_packages(include=["vidkern", "vidkern.*"]),
    package_data={"vidkern": ["py.typed", "**/README.md", "ops/conv3d/roads.json"]},
    ext_modules=[Extension("vidkern._C_cpu", [])],  # marks the wheel as one for this platform
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
)

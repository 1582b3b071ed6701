"""Compiles CUDA sources for the CPU, against the headers of this folder, and loads them as torch operators."""

import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TORCH = Path(torch.__file__).parent
FLAGS = (
    "-std=c++20 -O1 -fPIC -shared -fno-strict-aliasing -fvisibility=hidden -ffp-contract=off -fsanitize=alignment "
    "-Wall -Werror -Wl,--as-needed "
    "-Wno-unknown-pragmas -DVIDKERN_EMULATOR -DVIDKERN_CUDA_KEY=CPU -DUSE_CUDA "
    "-DTORCH_TARGET_VERSION=0x020b000000000000"
)


def load(sources: list[Path], namespace: str, folder: Path) -> None:
    """Compile the sources, and load their operators of namespace vidkern_cuda as those of another namespace."""
    library = folder / f"{namespace}.so"
    cxx = shutil.which(os.environ.get("CXX", "g++")) or "c++"
    command = [cxx, *FLAGS.split(), f"-Dvidkern_cuda={namespace}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(TORCH / "include"), "-x", "c++", *map(str, sources), str(HERE / "torch_cuda.cpp")]
    command += ["-o", str(library), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(str(library))

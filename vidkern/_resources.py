"""What the CUDA kernels of _C_cuda.so need: read from the file without a GPU, and from CUDA for those launched."""

import importlib
import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vidkern import _extension

LIBRARY = Path(_extension.__file__).with_name("_C_cuda.so")

_ARCH = re.compile(r"^arch = (\w+)", re.M)
_FUNCTION = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FILE = re.compile(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_")  # nvcc's name for a file's anonymous namespace


@dataclass(frozen=True)
class Instance:
    """One kernel with its template arguments in the library, compiled for one target."""

    target: str  # "sm_80"
    name: str  # mangled
    registers: int  # a thread
    shared_bytes: int  # a block
    local_bytes: int  # stack and spills of a thread


@dataclass(frozen=True)
class Compiled:
    """The instances of one kernel in the library, compiled for one target."""

    target: str  # "sm_80"
    source: str  # its file under csrc/cuda, "" if unknown
    kernel: str
    instances: int
    registers: tuple[int, int]  # a thread, least and most
    shared_bytes: int  # a block, at most
    local_bytes: int  # stack and spills of a thread, at most


@dataclass(frozen=True)
class Launched:
    """A kernel that this process launched, with one number of threads a block."""

    kernel: str
    threads: int
    registers: int  # a thread
    shared_bytes: int  # a block
    local_bytes: int  # stack and spills of a thread
    blocks_per_sm: int  # that fit at once


def compiled() -> tuple[list[Compiled], str | None]:
    """Return (kernels, None) as cuobjdump reads them from the library, or ([], reason)."""
    dump, reason = resource_usage()
    return ([], reason) if dump is None else (parse(dump), None)


def resource_usage() -> tuple[str | None, str | None]:
    """Return (what ``cuobjdump --dump-resource-usage`` prints of the library, None), or (None, reason)."""
    if not LIBRARY.exists():
        return None, f"{LIBRARY.name} is not built"
    tool = _cuobjdump()
    if tool is None:
        return None, "cuobjdump is neither on PATH nor in triton"
    done = subprocess.run([tool, "--dump-resource-usage", LIBRARY], capture_output=True, text=True)
    if done.returncode:
        return None, f"cuobjdump does not read {LIBRARY.name}: {(done.stdout + done.stderr).strip().splitlines()[-1:]}"
    return done.stdout, None


def _cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    return shutil.which("cuobjdump") or next((shutil.which("cuobjdump", path=str(f)) for f in folders), None)


def instances(dump: str) -> Iterator[Instance]:
    """Yield every kernel of what ``cuobjdump --dump-resource-usage`` prints."""
    _, *sections = _ARCH.split(dump)
    for target, section in zip(sections[::2], sections[1::2], strict=True):
        for name, *usage in _FUNCTION.findall(section):
            registers, stack, shared, local = map(int, usage)
            yield Instance(target, name, registers, shared, stack + local)


def parse(dump: str) -> list[Compiled]:
    """Return the kernels of what ``cuobjdump --dump-resource-usage`` prints, their instances together."""
    groups: dict[tuple[str, str, str], list[Instance]] = defaultdict(list)
    for instance in instances(dump):
        *namespaces, kernel = _identifiers(instance.name)
        source = next((f"{file[1]}.cu" for file in map(_FILE.match, namespaces) if file), "")
        groups[instance.target, source, kernel].append(instance)
    return [_compiled(key, found) for key, found in sorted(groups.items())]


def _identifiers(mangled: str) -> list[str]:
    """Return the parts of a mangled name, each of which follows its length, without template arguments."""
    found, rest = [], mangled.removeprefix("_Z").removeprefix("N")
    while digits := re.match(r"\d+", rest):
        end = digits.end() + int(digits[0])
        found.append(rest[digits.end() : end])
        rest = rest[end:]
    return found or [mangled]


def _compiled(key: tuple[str, str, str], found: list[Instance]) -> Compiled:
    registers = [instance.registers for instance in found]
    shared_bytes = max(instance.shared_bytes for instance in found)
    local_bytes = max(instance.local_bytes for instance in found)
    return Compiled(*key, len(found), (min(registers), max(registers)), shared_bytes, local_bytes)


def launched() -> tuple[list[Launched], str | None]:
    """Return (kernels that this process launched so far, None) by name, or ([], reason)."""
    reason = _extension.missing["cuda"]
    if reason is not None:
        return [], reason
    try:
        info = importlib.import_module("vidkern._C_info")
    except ImportError as error:
        return [], f"_C_info, which reports launches, does not load: {error}"
    try:
        found = info.launched(str(LIBRARY))
    except RuntimeError as error:
        return [], str(error)
    kernels = [Launched(**fields | {"kernel": _readable(fields["kernel"])}) for fields in found]
    return sorted(kernels, key=lambda k: (k.kernel, k.threads)), None


def _readable(name: str) -> str:
    """Return a demangled kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|vidkern::cuda::|^void ", "", name)
    return re.sub(r"\([^()<>]*\)$", "", name)

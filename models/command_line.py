"""Commands' options: dataclasses filled from YAML and the command line, with every mistake reported in one line."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

T = TypeVar("T")

LARGEST_SEED = 2**63 - 1  # a noise key holds int64


class UsageError(ValueError):
    """A mistake of the caller, told in one line."""


def parse(cls: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Fill the dataclass `cls` from command-line options such as `--optim.lr 1e-3`.

    Raises UsageError with one line for an unknown option (the nearest one is named) or a value of the wrong type.
    `--help` prints every field and exits.
    """
    known = {name.replace("_", "-") for name in _leaves(cls)} | {"help"}
    for option in (argument.split("=")[0] for argument in argv if argument.startswith("--")):
        name = option[2:].replace("_", "-")
        if name not in known and re.sub(r"(^|\.)no-", r"\1", name) not in known:
            raise UsageError(f"unknown option {option}{_nearest(name, known, '--')}")
    return _run_tyro(cls, argv, prog=prog, default=default)


def read_yaml(cls: type[T], path: str | Path) -> T:
    """Fill the dataclass `cls` from a YAML file with the same names, nested.

    Raises UsageError with one line that names the file for an unreadable file, an unknown key (the nearest one is
    named) or a value of the wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return from_dict(cls, values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Fill the dataclass `cls` from nested dictionaries, as `read_yaml` does."""
    if not isinstance(values, dict):
        raise UsageError(f"want keys of {cls.__name__}, got {values!r}")
    _check_keys(cls, values, "")
    return _run_tyro(cls, list(_as_options(values)), config=(tyro.conf.FlagConversionOff,))


def to_yaml(config: Any) -> str:
    """The YAML text that `read_yaml` turns back into `config`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as nested dictionaries of plain values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted names whose values differ between two results of `to_dict`, as "name: old -> new"."""
    a, b = dict(flatten(old)), dict(flatten(new))
    return [f"{name}: {a.get(name)} -> {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name)]


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dictionaries."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Raise UsageError unless the option's value lies from `least` to `most`; NaN lies nowhere."""
    if not least <= value <= most:
        wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UsageError(f"--{name} wants {wanted}, got {value}")


def check_finite_number(name: str, value: float) -> None:
    """Raise UsageError for NaN or infinity."""
    if not math.isfinite(value):
        raise UsageError(f"--{name} wants a finite number, got {value}")


@contextlib.contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Print a mistake of the caller (bad value, missing or unreadable file) as one line and exit with status 2.

    An interrupt (Ctrl-C) is one line and status 130. From here on a file's name that is no UTF-8 can be printed:
    its bytes are escaped, as they are in errors.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's processes make the same mistake
            print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _leaves(cls: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _leaves(field.type, f"{prefix}{field.name}.")
        else:
            renamed = (note.name for note in getattr(field.type, "__metadata__", ()) if getattr(note, "name", None))
            yield prefix + next(renamed, field.name)


def _check_keys(cls: Any, values: dict[str, Any], prefix: str) -> None:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            names = set(_leaves(cls, prefix)) | {prefix + name for name in fields}
            raise UsageError(f"unknown key {prefix}{key}{_nearest(f'{prefix}{key}', names, '')}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UsageError(f"{prefix}{key} wants keys of its own, got {value!r}")
            _check_keys(fields[key], value, f"{prefix}{key}.")


def _nearest(name: str, known: set[str], prefix: str) -> str:
    matches = difflib.get_close_matches(name, sorted(known), n=1)
    if not matches:
        last = {option.rpartition(".")[2]: option for option in sorted(known, reverse=True)}
        matches = [last[m] for m in difflib.get_close_matches(name.rpartition(".")[2], list(last), n=1)]
    return f"; the nearest is {prefix}{matches[0].replace('-', '_')}" if matches else ""


def _as_options(values: dict[str, Any]) -> Iterator[str]:
    for name, value in flatten(values):
        if isinstance(value, (list, tuple)):
            yield from (f"--{name}", *map(str, value))
        else:
            yield f"--{name}={value}"


def _run_tyro(cls: type[T], argv: Sequence[str], **options: Any) -> T:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            return tyro.cli(cls, args=list(argv), use_underscores=True, **options)
        except SystemExit as stop:
            if not stop.code:
                raise
    raise UsageError(_first_sentence(errors.getvalue()))


def _first_sentence(box: str) -> str:
    """The message of tyro's error box: from below its title to the next empty or ruled line."""
    lines = [line.strip("│ ") for line in box.strip().splitlines()[1:]]
    words = itertools.dropwhile(lambda line: not line.strip("-─"), lines)
    sentence = " ".join(itertools.takewhile(lambda line: line.strip("-─"), words))
    return sentence.replace(" .", ".") or "bad options"  # the box may break before the full stop

"""The suites by name: every test_<family>.py beside this file."""

from pathlib import Path

SUITES = sorted(path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py"))

"""`pytest --benchmark` runs the benchmark suites in the place of the tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --benchmark and --batch."""
    parser.addoption("--benchmark", action="store_true", help="run the suites under benchmarks/ instead of the tests")
    parser.addoption(
        "--batch", type=int, action="append", help="clips of the whole steps that are measured; may be repeated"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Turn a bare `pytest --benchmark` to the benchmarks; paths given on the command line are kept."""
    if config.getoption("--benchmark") and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = [str(config.rootpath / "benchmarks")]

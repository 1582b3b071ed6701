"""Where tests run: `--device cuda` puts tensors made without naming a device there; without CUDA, Triton interprets."""

import pytest
import torch

from tests import triton_interpreter


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device."""
    parser.addoption("--device", default="cpu", help="the device of tensors that tests make (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    """Set the default device, and Triton's interpreter, before the test modules are imported.

    Libraries sum in another order on another number of threads, and accuracy is compared with theirs: one thread.
    """
    if config.getoption("--benchmark"):  # pytest reads this file on its way to the benchmarks, too
        return
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        triton_interpreter.enable()
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch {torch.__version__} sees no CUDA device")
    if device.type != "cpu":
        torch.set_default_device(device)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU, leave Triton's tests for the end: each waits for a compiler, the others for nothing."""
    if torch.device(config.getoption("--device")).type == "cuda":
        items.sort(key=lambda item: "triton" in item.nodeid or "conv3d_kernels" in item.nodeid)

"""`--device cuda` runs tests on a GPU: a tensor that a test makes without naming a device is made there."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device."""
    parser.addoption("--device", default="cpu", help="the device of tensors that tests make (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    """Set the default device before the test modules are imported."""
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch {torch.__version__} sees no CUDA device")
    if device.type != "cpu":
        torch.set_default_device(device)

"""The emulator runs a right kernel, and catches every kind of wrong one."""

from pathlib import Path

import pytest
import torch

from tests.emulator import build
from tests.ops.common import poisoned_empty

# fault: (its number in faults.cu, the error)
FAULTS = {
    "missing barrier": (1, "thread 0: shared element 63 is read before it is written"),
    "out of bounds": (2, "thread 0: shared element 64 of 64"),
    "lane outside its mask": (4, "thread 0 is not in the mask of its own shuffle"),
    "source outside the mask": (5, "thread 0 reads a lane that its mask leaves out"),
    "lane that never comes": (6, "a warp waits for ever: a mask names lanes that do not come"),
    "barrier not reached by all": (7, "some threads of a block end while others wait at __syncthreads"),
    "read before write": (8, "thread 63: shared element 0 is read before it is written"),
    "overwritten after a read": (9, "shared element 63 is overwritten with no barrier after another thread's read"),
    "misaligned access": (10, "thread 3: an access in line .* of .*device.h is not aligned to 16 bytes"),
    "too many threads": (11, "a launch of 1 blocks of 2048 threads"),
}


@pytest.fixture(scope="module")
def reverse(tmp_path_factory: pytest.TempPathFactory):
    faults = Path(__file__).with_name("faults.cu")
    build.load([faults], "vidkern_faults", tmp_path_factory.mktemp("faults"))
    return torch.ops.vidkern_faults.reverse.default


def test_a_right_kernel_runs(reverse):
    x = torch.randn(64, device="cpu")
    with poisoned_empty():
        torch.testing.assert_close(reverse(x, 0), x.flip(0) + sum(range(32)))


def test_launches_are_counted(reverse):
    launches = torch.ops.vidkern_faults.launches
    before = launches()
    reverse(torch.randn(64, device="cpu"), 0)
    reverse(torch.randn(64, device="cpu"), 0)
    assert launches() == before + 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error(reverse, fault):
    number, message = FAULTS[fault]
    with pytest.raises(RuntimeError, match=message):
        reverse(torch.randn(64, device="cpu"), number)
    torch.testing.assert_close(reverse(torch.ones(64, device="cpu"), 0), torch.full((64,), 497.0, device="cpu"))


def test_an_unwritten_output_is_nan(reverse):
    with poisoned_empty():
        out = reverse(torch.randn(64, device="cpu"), 3)
    assert out.isnan().nonzero().flatten().tolist() == [9]

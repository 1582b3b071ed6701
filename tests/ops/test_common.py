"""The helpers of the operator tests: what they must catch, they catch."""

import pytest
import torch

from tests.ops.common import KERNEL_DTYPES, poisoned_empty


@pytest.mark.parametrize("fill", [True, False], ids=["torch fills", "the C library fills"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_new_memory_is_poisoned(dtype, fill):
    with poisoned_empty():
        torch.utils.deterministic.fill_uninitialized_memory = fill
        values = torch.empty(1000, dtype=dtype, device="cpu").double()
    # (a freed block keeps its owner's notes in 16 bytes at its end)
    assert (values.isnan() | (values > 1e38)).sum() >= 992

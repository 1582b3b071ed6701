"""The emulator's products of matrices and transposes are those of the tensor cores' instructions."""

from pathlib import Path

import pytest
import torch

from tests.emulator import build

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory):
    build.load([Path(__file__).with_name("matrix.cu")], "vidkern_matrix", tmp_path_factory.mktemp("matrix"))
    return torch.ops.vidkern_matrix


@every_dtype
@pytest.mark.parametrize("k", [16, 8])
@pytest.mark.parametrize("twice_turned", [False, True])
def test_a_product(matrix, dtype, k, twice_turned):
    torch.manual_seed(0)
    a, b = torch.randn(16, k, device="cpu").to(dtype), torch.randn(8, k, device="cpu").to(dtype)
    torch.testing.assert_close(matrix.product(a, b, twice_turned, False), a.float() @ b.float().T)


def test_a_transpose(matrix):
    x = torch.randn(8, 8, device="cpu").to(torch.bfloat16)
    assert torch.equal(matrix.turn(x), x.T)


def test_a_lane_that_does_not_come_is_an_error(matrix):
    a, b = torch.randn(16, 16, device="cpu").half(), torch.randn(8, 16, device="cpu").half()
    with pytest.raises(RuntimeError, match="a warp waits for ever"):
        matrix.product(a, b, False, True)

"""The roads of causal_conv3d by way of libraries, our float32 kernel on the CPU, and which road serves a layer."""

import json

import pytest
import torch
from torch import Tensor

from benchmarks.conv3d_roads import table_of
from benchmarks.results import Run
from tests.ops.common import assert_contract, poisoned_empty
from tests.ops.test_conv3d import plain_conv, video
from vidkern.ops.conv3d import choice, cpu_library, cuda_library, reference

#: kernel, stride, dilation, time_pad, space_pad, cached
CASES = [
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), "zeros", "zeros", True),
    ((3, 3, 3), (2, 2, 1), (1, 1, 2), "first_frame", "replicate", False),
    ((3, 1, 1), (1, 1, 1), (2, 1, 1), "zeros", "zeros", False),
    ((1, 3, 3), (1, 2, 2), (1, 1, 1), "zeros", "reflect", False),
    ((1, 1, 1), (1, 1, 1), (1, 1, 1), "zeros", "zeros", False),
    ((2, 2, 2), (1, 1, 1), (1, 1, 1), "first_frame", "zeros", False),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def arguments(case: tuple, dtype: torch.dtype, cin: int = 8, cout: int = 16) -> tuple[list[Tensor | None], list]:
    """Return (x, weight, bias, cache), and stride, dilation and both paddings."""
    kernel, stride, dilation, time_pad, space_pad, cached = case
    torch.manual_seed(0)
    x, weight = video(2, cin, 3, 6, 7, dtype=dtype), torch.randn(cout, cin, *kernel).to(dtype)
    frames = reference.extent(kernel[0], dilation[0])
    cache = video(2, cin, frames, 6, 7, dtype=dtype) if cached else None
    return [x, weight, torch.randn(cout).to(dtype), cache], [stride, dilation, time_pad, space_pad]


def exact_and_plain(tensors: list[Tensor | None], rest: list) -> tuple[Tensor, Tensor]:
    wide = [None if tensor is None else tensor.double() for tensor in tensors]
    return plain_conv(*wide, *rest), plain_conv(*tensors, *rest)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", [cpu_library, cuda_library], ids=["cpu", "cuda"])
def test_values_meet_the_contract(library, case, dtype):
    (x, weight, bias, cache), rest = arguments(case, dtype)
    exact, plain = exact_and_plain([x, weight, bias, cache], rest)
    residual = video(*exact.shape, dtype=dtype)
    with poisoned_empty():
        y = library.causal_conv3d(x, weight, bias, cache, None, *rest)
        added = library.causal_conv3d(x, weight, bias, cache, residual, *rest)
    if library is cpu_library or dtype != torch.float32:  # oneDNN stands in for cuDNN, and sums float32 its own way
        assert_contract("y", y, plain, exact)
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=1e-4 if dtype == torch.float32 else 0.3)
    assert torch.equal(added, y + residual)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@every_case
@pytest.mark.parametrize("library", [cpu_library, cuda_library], ids=["cpu", "cuda"])
@pytest.mark.parametrize("wanted", [[True, True, True, True], [False, True, False, False]], ids=str)
def test_gradients_equal_the_definitions(library, case, wanted):
    (x, weight, _, cache), rest = arguments(case, torch.float32)
    wanted = [*wanted[:3], wanted[3] and cache is not None]
    dy = video(*reference.output_shape(x, weight, cache, rest[0], rest[1]), dtype=torch.float32)
    ours = library.causal_conv3d_backward(dy, x, weight, cache, *rest, wanted)
    exact = reference.causal_conv3d_backward(dy, x, weight, cache, *rest, wanted)
    for got, value in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("cin", "cout"), [(1, 1), (130, 9), (257, 50), (64, 24)], ids=str)
def test_our_float32_kernel_takes_any_number_of_channels(cin, cout):
    tensors, rest = arguments(CASES[0], torch.float32, cin, cout)
    exact, plain = exact_and_plain(tensors, rest)
    with poisoned_empty():
        y = cpu_library.causal_conv3d(*tensors, None, *rest)
    assert_contract("y", y, plain, exact)


def test_our_float32_kernel_gives_the_same_bits_on_any_number_of_threads():
    tensors, rest = arguments(CASES[0], torch.float32, 40, 40)
    first = cpu_library.causal_conv3d(*tensors, None, *rest)
    torch.set_num_threads(3)
    second = cpu_library.causal_conv3d(*tensors, None, *rest)
    torch.set_num_threads(1)
    assert torch.equal(first, second)


def test_nothing_is_copied_where_nothing_is_padded():
    (x, weight, _, _), _ = arguments(CASES[4], torch.bfloat16)
    padded, _, _ = cuda_library._assembled(x, weight, None, (1, 1, 1), "zeros", "zeros")
    assert padded is x
    weight = torch.randn(16, 8, 1, 3, 3).bfloat16()
    padded, padding, _ = cuda_library._assembled(x, weight, None, (1, 1, 1), "zeros", "zeros")
    assert padded is x
    assert padding == (0, 1, 1)


@pytest.mark.parametrize(("cin", "cout", "wanted"), [(512, 512, "cuda"), (128, 128, "triton"), (512, 3, "triton")])
def test_the_rule_for_a_gpu_that_nobody_measured(cin, cout, wanted):
    assert choice.rule(choice.Layer("bfloat16", (3, 3, 3), cin, cout)) == wanted


def test_the_table_names_the_faster_road_of_what_was_measured(tmp_path, monkeypatch):
    def result(shape: list[int], **seconds: float) -> dict:
        variants = {f"ours:{name}": {"seconds": time} for name, time in seconds.items()}
        of_layer = {"operator": "causal_conv3d", "passes": "forward", "dtype": "bfloat16", "shape": shape}
        return {**of_layer, "variants": {"eager": {"seconds": 1.0}, **variants}}

    results = [result([96, 96, 3, 3, 3, 4, 9, 9], cuda=2.0, triton=1.0), result([8, 8, 3, 3, 3, 4, 9, 9], cpu=1.0)]
    results.append(result([512, 512, 3, 3, 3, 4, 9, 9], cuda=1.0, triton=2.0))
    table = table_of([Run(tmp_path, {"device": "some-gpu"}, {}, results)])
    path = tmp_path / "roads.json"
    path.write_text(json.dumps(table))
    monkeypatch.setattr(choice, "TABLE", path)
    choice._table.cache_clear()
    try:
        assert choice.measured("some-gpu") == {
            choice.Layer("bfloat16", (3, 3, 3), 96, 96): "triton",
            choice.Layer("bfloat16", (3, 3, 3), 512, 512): "cuda",
        }
        assert choice.measured("another") == {}
    finally:
        choice._table.cache_clear()


def test_the_shipped_table_is_readable():
    for device in choice._table():
        assert set(choice.measured(device).values()) <= {"cuda", "triton"}

"""The causal convolution's Triton kernels, compiled for GPUs that are not here: the layers of video VAEs."""

from typing import NamedTuple

import pytest
import torch

from tests import triton_aot
from vidkern.ops.conv3d import triton_kernels


class Layer(NamedTuple):
    """One convolution of a model; ``like`` has other sizes and channels, which are to compile nothing anew."""

    kernel: tuple[int, int, int]
    channels: tuple[int, int]
    like: tuple[int, int] | None = None
    dtype: torch.dtype = torch.bfloat16
    stride: tuple[int, int, int] = (1, 1, 1)
    time_pad: str = "zeros"
    cached: bool = True
    backward: bool = True
    tf32: bool = True


LAYERS = [
    Layer((3, 3, 3), (512, 512), like=(128, 384)),
    Layer((3, 3, 3), (192, 192)),
    Layer((3, 3, 3), (128, 128), time_pad="first_frame", cached=False, backward=False),
    Layer((3, 3, 3), (96, 3), backward=False),
    Layer((3, 3, 3), (3, 96), backward=False),
    Layer((3, 1, 1), (384, 768), backward=False),
    Layer((1, 3, 3), (96, 96), stride=(1, 2, 2), cached=False, backward=False),
    Layer((3, 3, 3), (96, 96), dtype=torch.float32),
    Layer((3, 3, 3), (96, 96), dtype=torch.float32, tf32=False),
]
ARCHITECTURES = {8: (80, 86), 9: (90,)}  # the targets of a major compute capability


def video(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


def launch(layer: Layer, channels: tuple[int, int], size: tuple[int, int, int, int]) -> None:
    (cin, cout), (batch, frames, height, width) = channels, size
    x = video(batch, cin, frames, height, width, dtype=layer.dtype)
    weight = video(cout, cin, *layer.kernel, dtype=layer.dtype)
    before = layer.kernel[0] - 1
    cache = video(batch, cin, before, height, width, dtype=layer.dtype) if layer.cached else None
    options = (layer.stride, (1, 1, 1), layer.time_pad, "zeros")
    torch.backends.cudnn.allow_tf32 = layer.tf32
    y = triton_kernels.causal_conv3d(x, weight, weight.new_empty(cout), cache, None, *options)
    if layer.backward:
        triton_kernels.causal_conv3d_backward(y, x, weight, cache, *options, [True] * 4)


def launches(capability: int) -> None:
    """Launch every layer as a model does on a GPU of this major compute capability."""
    triton_kernels._capability = lambda device: capability
    for layer in LAYERS:
        launch(layer, layer.channels, (1, 2, 16, 16))
        if layer.like is not None:
            launch(layer, layer.like, (3, 5, 12, 23))


def launches_8() -> None:
    launches(8)


def launches_9() -> None:
    launches(9)


@pytest.fixture(scope="module")
def facts() -> list[dict]:
    module = "tests.ops.test_conv3d_aot"
    return [
        fact
        for capability, targets in ARCHITECTURES.items()
        for fact in triton_aot.report(module, f"launches_{capability}", targets)
    ]


def is_product(fact: dict) -> bool:
    return fact["kernel"] in ("_convolve", "_weight_gradient")


def element_bytes(fact: dict) -> int:
    return 4 if fact["types"]["x"] == "*fp32" else 2


def is_aligned(fact: dict) -> bool:
    """Whether every position of what is gathered begins at a multiple of 16 bytes."""
    units = [fact["constants"].get(name) for name in ("X_UNIT", "WEIGHT_UNIT", "DY_UNIT")]
    return all(unit is None or unit * element_bytes(fact) == 16 for unit in units)


def is_turned(fact: dict) -> bool:
    """Whether wgmma wants an operand turned: tf32 whose terms are not side by side in memory."""
    across = fact["kernel"] == "_weight_gradient" or fact["constants"]["TRANSPOSED"]
    return fact["target"] == 90 and fact["constants"]["PRECISION"] == "tf32" and element_bytes(fact) == 4 and across


def test_budgets_of_every_gpu(facts):
    assert {fact["target"] for fact in facts} == {80, 86, 90}
    for fact in facts:
        assert fact["local_bytes"] == 0, f"spills: {fact}"
        assert fact["shared_bytes"] <= 99 * 1024, f"too much shared memory: {fact}"


def test_two_programs_share_a_multiprocessor(facts):
    for fact in filter(is_product, facts):
        if is_aligned(fact):
            assert fact["resident_warps"] >= 2 * fact["warps"], f"a multiprocessor holds one program: {fact}"


def test_operands_are_copied_16_bytes_at_a_time_and_ahead(facts):
    for fact in filter(is_product, facts):
        if not is_aligned(fact) or is_turned(fact):
            continue
        constants, threads = fact["constants"], 32 * fact["warps"]
        words = [constants[side] * constants["K"] * element_bytes(fact) // 16 for side in ("M", "N")]
        wide = sum(count for count in words if count >= threads)  # an operand with less than a word a thread is narrow
        assert fact["wide_copies"] * threads >= 3 * wide, f"fewer than two steps ahead: {fact}"
        assert wide < sum(words) or fact["narrow_copies"] == 0, f"narrow copies: {fact}"


def test_products_are_the_tensor_cores(facts):
    for fact in filter(is_product, facts):
        constants = fact["constants"]
        if element_bytes(fact) == 4 and constants["PRECISION"] == "ieee":
            assert not fact["products"], f"float32 on tensor cores without leave: {fact}"
            continue
        kind = "tf32.tf32" if element_bytes(fact) == 4 else "bf16.bf16"
        instruction = "wgmma" if fact["target"] == 90 and constants["M"] >= 64 and fact["warps"] >= 4 else "mma.sync"
        assert fact["products"], f"no tensor cores: {fact}"
        assert all(name.startswith(instruction) and kind in name for name in fact["products"]), fact


def test_other_sizes_and_channels_compile_nothing(facts):
    first = {"KERNEL": [3, 3, 3], "STRIDE": [1, 1, 1], "TIME_PAD": "zeros", "M": 128, "N": 128, "K": 32, "X_UNIT": 8}
    found = [fact for fact in filter(is_product, facts) if first.items() <= fact["constants"].items()]
    found = [fact for fact in found if fact["target"] != 90]  # takes other steps where 64 does not divide the channels
    assert len(found) == 3 * 2  # two products of the backward pass, and the forward one, on two targets
    assert {fact["launches"] for fact in found} == {2}
    for target in triton_aot.TARGETS:
        assert sum(fact["kernel"] == "_sum_runs" and fact["target"] == target for fact in facts) <= 4

"""Temporal attention's Triton kernels, compiled for GPUs that are not here."""

import pytest
import torch

from tests import triton_aot
from tests.ops.test_attention import rope_tables
from vidkern.ops.attention import triton_kernels

PLAIN = [  # (dtype, d, F)
    *((torch.bfloat16, 72, frames) for frames in (16, 32, 64)),
    (torch.bfloat16, 64, 16),
    (torch.bfloat16, 128, 16),
    (torch.bfloat16, 128, 64),
    (torch.float32, 64, 32),
    (torch.float32, 128, 16),
    (torch.float32, 72, 64),
]
EVERY_OPTION = [(torch.bfloat16, 72, 16), (torch.bfloat16, 72, 32)]
SIZES = [(1, 2, 2), (3, 7, 5), (2, 1, 1)]  # (B, N, H), none of which is to compile anything anew
OTHER_FRAMES = {16: 9, 32: 17, 64: 256}  # nor are these


def launch(dtype: torch.dtype, d: int, frames: int, size: tuple[int, int, int], every_option: bool) -> None:
    batch, tokens, heads = size
    qkv = torch.empty(batch, frames, tokens, 3, heads, d, dtype=dtype)
    options = (torch.empty(heads, frames, frames), *rope_tables(frames, d)) if every_option else (None, None, None)
    triton_kernels.temporal_attention_packed(qkv, *options, 0.125, every_option)
    do = torch.empty(batch, frames, tokens, heads, d, dtype=dtype)
    triton_kernels.temporal_attention_packed_backward(do, qkv, *options, 0.125, every_option, every_option)


def launches() -> None:
    """Launch every Triton kernel as training does, for tests/triton_aot.py."""
    for cases, every_option in ((PLAIN, False), (EVERY_OPTION, True)):
        for dtype, d, frames in cases:
            for size in SIZES:
                launch(dtype, d, frames, size, every_option)
            launch(dtype, d, OTHER_FRAMES[frames], SIZES[0], every_option)


@pytest.fixture(scope="module")
def facts() -> list[dict]:
    return triton_aot.report("tests.ops.test_temporal_attention_aot", "launches")


def in_one_tile(fact: dict) -> bool:
    return fact["kernel"] == "_backward_one_tile" or fact["constants"].get("ONE_TILE", False)


def test_budgets_of_every_gpu(facts):
    assert {fact["target"] for fact in facts} == {80, 86, 90}
    for fact in facts:
        assert fact["shared_bytes"] <= 99 * 1024, f"too much shared memory: {fact}"
        if in_one_tile(fact):
            assert fact["local_bytes"] == 0, f"spills: {fact}"


def test_tokens_are_loaded_in_words_of_16_bytes(facts):
    for fact in facts:
        if not in_one_tile(fact):
            continue  # more tiles are copied to shared memory by cp.async
        tensors = 3 if fact["kernel"] == "_forward" else 4
        constants = fact["constants"]
        bits = 32 if fact["types"]["q"] == "*fp32" else 16
        words = tensors * constants["TILE"] * constants["D"] * bits // 128
        assert fact["wide_loads"] * 32 * fact["warps"] >= words, f"narrow loads: {fact}"


def test_other_sizes_compile_nothing(facts):
    cases = len(PLAIN) + len(EVERY_OPTION)
    for kernels in (("_forward",), ("_backward_one_tile", "_backward")):
        found = [fact for fact in facts if fact["kernel"] in kernels]
        assert len(found) == cases * len(triton_aot.TARGETS)
        assert {fact["launches"] for fact in found} == {len(SIZES) + 1}
    assert sum(fact["kernel"] == "_sum_runs" for fact in facts) == len(triton_aot.TARGETS)

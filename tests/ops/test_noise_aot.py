"""The Triton kernels of noise and of the sampler's steps, compiled for GPUs that are not here."""

import pytest
import torch

from tests import triton_aot
from vidkern.ops.noise import triton_kernels as noise
from vidkern.ops.noise.triton_clips import NOISE_PACK
from vidkern.ops.sampling import triton_kernels as sampling

SHAPES = [(1, 1, 4, 32, 32), (2, 3, 4, 8, 9), (16, 17, 1, 8, 8)]  # none of which is to compile anything anew
CASES = [(torch.bfloat16, "independent"), (torch.float32, "mixed")]
READS = {  # clips of the shape
    "_normal": 0,
    "_add_noise": 1,
    "_add_noise_backward": 3,
    "_mse": 2,
    "_mse_backward": 1,
    "_hybrid_loss": 3,
    "_hybrid_loss_backward": 2,
    "_step": 3,
}
SUMS = "_sum_runs"


def launch_noise(shape: tuple[int, ...], dtype: torch.dtype, sharing: str) -> None:
    key, x, levels = torch.tensor([3, 5]), torch.empty(shape, dtype=dtype), torch.empty(2, *shape[:2])
    t, table = torch.zeros(shape[:2], dtype=torch.int64), torch.empty(1000)
    mode = sharing, levels[1] if sharing == "mixed" else None, 2**32 - shape[0] if shape[0] > 1 else 7
    noise.philox_normal(shape, key, *mode, dtype)
    noise.add_noise(x, *levels, key, "v", *mode)
    noise.add_noise_backward(x, x, x, *levels, key, "v", *mode)
    noise.diffusion_mse(x, x, *levels, key, "v", *mode)
    noise.diffusion_mse_backward(levels[0], x)
    out = torch.cat([x, x], dim=2)
    noise.hybrid_loss(out, x, *levels, t, table, table, table, key, "v", *mode)
    noise.hybrid_loss_backward(*levels, out, levels[1])


def launch_steps(shape: tuple[int, ...], dtype: torch.dtype, sharing: str) -> None:
    x, t = torch.empty(shape, dtype=dtype), torch.zeros(2, *shape[:2], dtype=torch.int64)
    weight = torch.empty(shape[:2]) if sharing == "mixed" else None
    step = x, torch.cat([x, x]), *t, torch.empty(1000), "v"
    options = 4.0, t[0] > 0, None
    sampling.flow_step(*step[:5], "flow", *options)
    sampling.ddim_step(*step, 0.5, torch.tensor([3, 5]), *options, sharing, weight, 0)
    sampling.ddpm_step(*step, "fixed_small", torch.tensor([3, 5]), *options, sharing, weight, 0)


def launches() -> None:
    """Launch every Triton kernel, for tests/triton_aot.py."""
    for case in CASES:
        for shape in SHAPES:
            launch_noise(shape, *case)
            launch_steps(shape, *case)


@pytest.fixture(scope="module")
def facts() -> list[dict]:
    return triton_aot.report("tests.ops.test_noise_aot", "launches")


def test_nothing_spills(facts):
    assert {fact["target"] for fact in facts} == set(triton_aot.TARGETS)
    for fact in facts:
        assert fact["local_bytes"] == 0, f"spills: {fact}"
        assert fact["resident_warps"] >= 12, f"too many registers: {fact}"


def test_no_product_is_fused_with_a_sum(facts):
    for fact in facts:
        if fact["kernel"] != "_hybrid_loss":  # whose logarithm is a library's
            assert fact["fused"] == 0, f"other bits than the definition's: {fact}"


def test_clips_are_loaded_in_wide_words(facts):
    """Of 16 bytes; beside noise in 16 bits, of the 8 that one Philox call fills."""
    for fact in facts:
        if fact["kernel"] == SUMS:
            continue
        constants, half = fact["constants"], "*bf16" in fact["types"].values()
        eight = half and constants["UNIT"] == NOISE_PACK
        words = READS[fact["kernel"]] * constants["TILE"] * (2 if half else 4) // (8 if eight else 16)
        found = fact["half_wide_loads" if eight else "wide_loads"] * 32 * fact["warps"]
        assert found >= words, f"narrow loads: {fact}"


def test_other_sizes_compile_nothing(facts):
    for fact in facts:
        if fact["kernel"] != SUMS:
            assert fact["launches"] == len(SHAPES), f"compiled for a size: {fact}"
    kernels = len(READS) - 1 + 3  # three steps are one kernel
    assert sum(fact["kernel"] != SUMS for fact in facts) == kernels * len(CASES) * len(triton_aot.TARGETS)

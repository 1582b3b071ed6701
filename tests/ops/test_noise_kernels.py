"""The noise kernels have the definition's bits: C++; Triton (interpreted) and CUDA (emulated) without a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vidkern
from tests.ops import noise_statistics
from tests.ops.backends import Kernels, kernels_of
from tests.ops.common import KERNEL_DTYPES, assert_contract, far_apart, poisoned_empty
from vidkern import _library, ops
from vidkern.ops.noise import reference

BACKENDS = ("cpu", "triton", "cuda")
OPERATORS = ("philox_normal", "add_noise", "add_noise_backward", "diffusion_mse", "diffusion_mse_backward")
SHARING = ("independent", "shared", "mixed", "progressive")
PREDICTIONS = ("epsilon", "v", "flow", "x0")

#: Ragged, a multiple of a wide load, and more than a block or a stretch of a thread takes.
SHAPES = [(2, 3, 3, 5, 7), (1, 2, 4, 8, 2), (2, 2, 5, 11, 23)]

every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
every_sharing = pytest.mark.parametrize("sharing", SHARING)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    torch.manual_seed(0)
    return kernels_of("noise", request.param)


def call(kernels: Kernels, name: str, *args: Any) -> Any:
    """Call a kernel, with every unwritten element poisoned."""
    with poisoned_empty():
        return kernels.find(name)(*args)


def assert_same_bits(ours: Tensor, wanted: Tensor) -> None:
    kind = {4: torch.int32, 2: torch.int16}[ours.element_size()]
    assert ours.is_contiguous()
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(ours.view(kind), wanted.contiguous().view(kind))


def make_key(device: str, seed: int = 20261121, offset: int = 7) -> Tensor:
    return torch.tensor([seed, offset], device=device)


def make_mode(sharing: str, shape: tuple[int, ...], device: str) -> tuple[str, Tensor | None, int]:
    """Return sharing, base_weight and sample_offset; the samples' counter comes near its end."""
    weight = torch.rand(shape[1], device=device).expand(shape[:2]) if sharing in ("mixed", "progressive") else None
    return sharing, weight, 2**32 - shape[0]


def make_clip(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def make_levels(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Return alpha, common to a sample's frames by a stride of 0, and sigma, transposed."""
    batch, frames = shape[:2]
    return torch.rand(batch, 1, device=device).expand(batch, frames), torch.rand(frames, batch, device=device).t()


def scattered(clip: Tensor) -> Tensor:
    """Return the clip with its channels last and its frames outermost."""
    return clip.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)


def upper_half(clip: Tensor) -> Tensor:
    """Return the clip as the second half of a model's channels."""
    return torch.cat([torch.full_like(clip, float("nan")), clip], dim=2)[:, :, clip.shape[2] :]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_registered(name, backend):
    assert backend in _library.operators[name].kernels


@pytest.mark.parametrize("name", OPERATORS)
def test_the_cpu_kernels_serve(name):
    assert _library.operators[name].why_not("cpu", "cpu") is None


@every_shape
@every_sharing
@every_dtype
def test_philox_normal(kernels, shape, sharing, dtype):
    args = (list(shape), make_key(kernels.device), *make_mode(sharing, shape, kernels.device), dtype)
    assert_same_bits(call(kernels, "philox_normal", *args), reference.philox_normal(*args))


@pytest.mark.parametrize("shape", [(2, 3), (3, 1, 1), (1, 2, 1023), (1, 1, 5, 1, 2, 3, 7)], ids=str)
def test_philox_normal_of_any_rank(kernels, shape):
    args = (list(shape), make_key(kernels.device), "independent", None, 5, torch.float32)
    assert_same_bits(call(kernels, "philox_normal", *args), reference.philox_normal(*args))


@pytest.mark.parametrize("key", [(-1, 1), (2**63 - 1, 2**63 - 1), (-(2**63), -5)])
def test_the_key_is_folded_and_may_be_strided(kernels, key):
    strided = torch.tensor([key, key], device=kernels.device).t().contiguous().t()[0]
    args = ("independent", None, 0, torch.float32)
    ours = call(kernels, "philox_normal", [1, 1, 9], strided, *args)
    assert_same_bits(ours, reference.philox_normal([1, 1, 9], make_key(kernels.device, *key), *args))


@every_shape
@every_sharing
@pytest.mark.parametrize("target", [None, "epsilon", "v", "flow"])
def test_add_noise(kernels, shape, sharing, target):
    dtype = KERNEL_DTYPES[SHAPES.index(shape)]
    x0, levels = make_clip(shape, kernels.device, dtype), make_levels(shape, kernels.device)
    args = (*levels, make_key(kernels.device), target, *make_mode(sharing, shape, kernels.device))
    wanted = reference.add_noise(x0, *args)
    for ours, theirs in zip(call(kernels, "add_noise", x0, *args), wanted, strict=True):
        assert_same_bits(ours, theirs)


@every_dtype
@pytest.mark.parametrize("view", [scattered, upper_half, lambda x: x[:, :, :1, :1, :1].expand(x.shape)])
def test_clips_are_read_where_they_lie(kernels, dtype, view):
    shape = (2, 3, 4, 6, 4)
    x0, levels = make_clip(shape, kernels.device, dtype), make_levels(shape, kernels.device)
    args = (*levels, make_key(kernels.device), "v", *make_mode("mixed", shape, kernels.device))
    for ours, theirs in zip(
        call(kernels, "add_noise", view(x0), *args), reference.add_noise(view(x0), *args), strict=True
    ):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dim", range(5))
def test_offsets_of_more_than_32_bits(kernels, dim):
    shape = (2, 2, 2, 2, 2)
    x0, levels = make_clip(shape, kernels.device, torch.bfloat16), make_levels(shape, kernels.device)
    args = (*levels, make_key(kernels.device), "v", *make_mode("mixed", shape, kernels.device))
    far, near = far_apart(x0, dim), x0.clone()
    pairs = [(call(kernels, "add_noise", x, *args), call(kernels, "diffusion_mse", x, x, *args)) for x in (far, near)]
    for of_far, of_near in zip(*pairs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(of_far, of_near, strict=True))


@every_shape
@every_sharing
@every_prediction
def test_diffusion_mse(kernels, shape, sharing, prediction):
    dtype = KERNEL_DTYPES[PREDICTIONS.index(prediction) % 3]
    pred, x0 = upper_half(make_clip(shape, kernels.device, dtype)), make_clip(shape, kernels.device, torch.float32)
    levels = make_levels(shape, kernels.device)
    args = (*levels, make_key(kernels.device), prediction, *make_mode(sharing, shape, kernels.device))
    mse, residual = call(kernels, "diffusion_mse", pred, x0, *args)
    plain_mse, plain_residual = reference.diffusion_mse(pred, x0, *args)
    assert_same_bits(residual, plain_residual)
    exact, _ = reference.diffusion_mse(pred.double(), x0.double(), *(v.double() for v in levels), *args[2:])
    assert mse.dtype == torch.float32
    assert_contract("mse", mse, plain_mse, exact)


@every_shape
@every_dtype
def test_diffusion_mse_backward(kernels, shape, dtype):
    residual = make_clip(shape, kernels.device, dtype)
    per_frame = torch.randn(shape[:2], device=kernels.device)
    for dmse in (per_frame, per_frame[:1, :1].expand(shape[:2])):
        ours = call(kernels, "diffusion_mse_backward", dmse, residual)
        assert_same_bits(ours, reference.diffusion_mse_backward(dmse, residual))


@pytest.mark.parametrize("given", ["x_t", "target", "both"])
@every_prediction
@every_sharing
def test_add_noise_backward(kernels, given, prediction, sharing):
    shape, dtype = SHAPES[2], KERNEL_DTYPES[SHARING.index(sharing) % 3]
    x0, levels = make_clip(shape, kernels.device, dtype), make_levels(shape, kernels.device)
    dx_t = None if given == "target" else make_clip(shape, kernels.device, dtype)[:1].expand(shape)
    dtarget = None if given == "x_t" else scattered(make_clip(shape, kernels.device, torch.bfloat16))
    args = (make_key(kernels.device), prediction, *make_mode(sharing, shape, kernels.device))
    ours = call(kernels, "add_noise_backward", dx_t, dtarget, x0, *levels, *args)
    plain = reference.add_noise_backward(dx_t, dtarget, x0, *levels, *args)
    assert_same_bits(ours[0], plain[0])
    wide = [None if grad is None else grad.double() for grad in (dx_t, dtarget)]
    exact = reference.add_noise_backward(*wide, x0.double(), *(v.double() for v in levels), *args)
    two_ulp_of_partial_sums = 2**-22 * (2 * x0[0, 0].numel()) ** 0.5
    for grad, wanted in zip(ours[1:], exact[1:], strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-6, atol=two_ulp_of_partial_sums)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6)], ids=str)
@every_sharing
def test_empty(kernels, shape, sharing):
    x0, levels, key = (
        make_clip(shape, kernels.device, torch.float32),
        make_levels(shape, kernels.device),
        make_key(kernels.device),
    )
    mode = make_mode(sharing, shape, kernels.device)
    x_t, target = call(kernels, "add_noise", x0, *levels, key, "v", *mode)
    mse, residual = call(kernels, "diffusion_mse", x0, x0, *levels, key, "v", *mode)
    dx0, *dlevels = call(kernels, "add_noise_backward", x_t, target, x0, *levels, key, "v", *mode)
    assert all(clip.shape == shape for clip in (x_t, target, residual, dx0))
    assert mse.isnan().all()  # the mean over no elements
    assert not any(grad.any() for grad in dlevels)
    assert call(kernels, "diffusion_mse_backward", mse, residual).shape == shape


def test_weights_out_of_range_and_nan_stay_where_they_are(kernels):
    shape = (1, 3, 2, 3, 4)
    x0, levels = make_clip(shape, kernels.device, torch.float32), make_levels(shape, kernels.device)
    x0[0, 1, 1, 2, 3], weight = float("inf"), torch.tensor([[0.5, 0.5, 1.5]], device=kernels.device)
    args = (x0, *levels, make_key(kernels.device), None, "mixed", weight, 0)
    ours, wanted = call(kernels, "add_noise", *args)[0], reference.add_noise(*args)[0]
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


# ---- many shapes


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    frames=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    split=st.integers(0, 4),
    sample_offset=st.sampled_from([0, 3, 2**31]),
    sharing=st.sampled_from(SHARING),
    dtype=st.sampled_from(KERNEL_DTYPES),
)
def test_bits_for_every_shape_and_batch_split(backend, batch, frames, sizes, split, sample_offset, sharing, dtype):
    shape, split = (batch, frames, *sizes), min(split, batch)
    kernels = kernels_of("noise", backend)
    x0, levels = make_clip(shape, kernels.device, dtype), make_levels(shape, kernels.device)
    key, weight = make_key(kernels.device), make_mode(sharing, shape, kernels.device)[1]
    add_noise = kernels.find("add_noise")
    parts = [
        add_noise(x0[at], *(v[at] for v in levels), key, "v", sharing, None if weight is None else weight[at], first)
        for at, first in ((slice(split), sample_offset), (slice(split, None), sample_offset + split))
    ]
    wanted = reference.add_noise(x0, *levels, key, "v", sharing, weight, sample_offset)
    for *ours, theirs in zip(*parts, wanted, strict=True):
        assert_same_bits(torch.cat(ours), theirs)


# ---- C++ alone: threads, statistics


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_sharing
def test_the_same_bits_for_every_number_of_threads(threads, sharing):
    torch.manual_seed(0)
    shape = (3, 5, 4, 40, 40)
    pred, x0 = make_clip(shape, "cpu", torch.float32), make_clip(shape, "cpu", torch.float32)
    args = (*make_levels(shape, "cpu"), make_key("cpu"), "v", *make_mode(sharing, shape, "cpu"))
    runs, find = [], kernels_of("noise", "cpu").find
    for count in (1, 2, 3, 2):
        threads(count)
        runs.append([*find("diffusion_mse")(pred, x0, *args), *find("add_noise_backward")(pred, x0, x0, *args)])
    for run in runs[1:]:
        for ours, wanted in zip(run, runs[0], strict=True):
            assert_same_bits(ours, wanted)


def test_float64_is_left_to_the_reference():
    x0 = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64)
    with vidkern.backend("cpu"), pytest.raises(vidkern.BackendError, match="float64 is the reference's"):
        ops.add_noise(x0, torch.rand(1, 2), torch.rand(1, 2), make_key("cpu"))


def test_statistics_of_a_hundred_million():
    with vidkern.backend("cpu"):
        counts = noise_statistics.count("cpu")
    assert counts.numbers > 10**8
    found = noise_statistics.statistics(counts)
    assert len(found) > 20
    assert not [statistic for statistic in found if statistic.p < 1e-3]


def test_statistics_see_what_is_wrong():
    """A shift, a scale, a shortened tail and correlated neighbours, each slight."""
    x = torch.randn(noise_statistics.SHAPE, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    spoilt = {
        "mean": x + 5e-3,
        "second moment": x * 1.005,
        "numbers beyond 4": x.clamp(-4, 4),
        "correlation: frames one apart": torch.stack([x[:, 0], x[:, 1] + 0.01 * x[:, 0]], 1),
        "correlation: lanes 0 and 1 of a Philox call": torch.where(
            torch.arange(x.shape[-1], device="cpu") % 4 == 1, x + 0.02 * x.roll(1, -1), x
        ),
    }
    for name, numbers in spoilt.items():
        counts = noise_statistics.Counts()
        counts.add(numbers)
        p = {statistic.name: statistic.p for statistic in noise_statistics.statistics(counts)}
        assert p[name] < 1e-4, name


# ---- on a GPU


@needs_cuda
def test_a_cuda_graph_draws_from_the_key_that_it_finds():
    key, like = make_key("cuda"), torch.randn(2, 3, 4, 5, 6, device="cuda")
    levels = torch.rand(2, 3, device="cuda"), torch.rand(2, 3, device="cuda")
    ops.add_noise(like, *levels, key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x_t = ops.add_noise(like, *levels, key)
    for offset in (3, 4):
        key[1] = offset
        graph.replay()
        assert_same_bits(x_t, ops.add_noise(like, *levels, make_key("cuda", offset=offset)))

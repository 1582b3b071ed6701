"""The sampler's step kernels, each against the definition: bit for bit, or in float64 where there is an exp."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vidkern
from tests.ops.backends import Kernels, kernels_of
from tests.ops.common import KERNEL_DTYPES, assert_contract, far_apart, no_synchronisation, poisoned_empty
from vidkern import _library, ops
from vidkern.diffusion import Schedule, make_schedule
from vidkern.ops.sampling import reference

BACKENDS = ("cpu", "triton", "cuda")
OPERATORS = ("ddim_step", "ddpm_step", "flow_step")
PREDICTIONS = ("epsilon", "v", "x0")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
SHARING = ("independent", "shared", "mixed", "progressive")

#: Ragged, a multiple of a wide load, and more than a block or a stretch of a thread takes.
SHAPES = [(2, 3, 3, 5, 7), (1, 4, 4, 8, 2), (2, 2, 5, 11, 23)]
DTYPES = [(dtype, dtype) for dtype in KERNEL_DTYPES] + [(torch.float32, torch.bfloat16)]  # of x_t and of the model

NUM_STEPS = 1000
ALPHAS_CUMPROD = torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float64).neg().add(1).cumprod(0).float()
SIGMA = ((torch.arange(NUM_STEPS, dtype=torch.float64) + 1) / NUM_STEPS).float()

every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]} of {pair[1]}")
every_operator = pytest.mark.parametrize("name", OPERATORS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_guidance = pytest.mark.parametrize("guidance_scale", [None, 2.5])
every_sharing = pytest.mark.parametrize("sharing", SHARING)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
compiled_backends = pytest.mark.parametrize("kernels", ["cpu", "cuda"], indirect=True)  # interpreting takes long
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    torch.manual_seed(0)
    return kernels_of("sampling", request.param)


@dataclass(frozen=True)
class Step:
    """A call of a step operator, its tensors apart from what it is told."""

    name: str
    x_t: Tensor
    model_out: Tensor
    t: Tensor
    t_prev: Tensor
    table: Tensor
    hold: Tensor | None = None
    prediction: str = "epsilon"
    guidance_scale: float | None = None
    clip_x0: float | None = None
    eta: float = 0.0
    variance: str = "learned_range"
    key: Tensor | None = None
    sharing: str = "independent"
    base_weight: Tensor | None = None
    sample_offset: int = 0

    def args(self) -> tuple[Any, ...]:
        """Return the operator's arguments in their order."""
        own = {"ddim_step": (self.eta, self.key), "ddpm_step": (self.variance, self.key), "flow_step": ()}[self.name]
        noise = () if self.name == "flow_step" else (self.sharing, self.base_weight, self.sample_offset)
        tensors = (self.x_t, self.model_out, self.t, self.t_prev, self.table)
        return (*tensors, self.prediction, *own, self.guidance_scale, self.hold, self.clip_x0, *noise)

    def plain(self) -> Tensor:
        return getattr(reference, self.name)(*self.args())

    def exact(self) -> Tensor:
        return replace(self, x_t=self.x_t.double(), model_out=self.model_out.double()).plain()


def make_step(
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    *,
    device: str = "cpu",
    prediction: str = "epsilon",
    guidance_scale: float | None = None,
    sharing: str = "independent",
    **options: Any,
) -> Step:
    """Return a step with frames under way, at their last step, waiting, clean and held, and strides of every kind."""
    batch, frames, channels, *size = shape
    doubled = batch if guidance_scale is None else 2 * batch
    model_out = torch.randn(doubled, frames, 2 * channels, *size, device=device).to(dtypes[1])
    t = torch.randint(0, NUM_STEPS, (frames, batch), device=device).t()
    t_prev = t - torch.randint(0, 300, (batch, frames), device=device)
    if batch and frames:
        t_prev[0, 0] = -1
        t[-1, -1] = -1
    flow = name == "flow_step"
    return Step(
        name,
        torch.randn(shape, device=device).to(dtypes[0]),
        model_out,
        t,
        t_prev.clamp(min=-1),
        (SIGMA if flow else ALPHAS_CUMPROD).to(device).repeat_interleave(2)[::2],
        hold=torch.rand(frames, batch, device=device).t() < 0.2,
        prediction="flow" if flow and prediction != "x0" else prediction,
        guidance_scale=guidance_scale,
        key=torch.tensor([20261121, 7], device=device),
        sharing=sharing,
        base_weight=torch.rand(frames, device=device).expand(batch, frames) if sharing in SHARING[2:] else None,
        sample_offset=2**32 - batch,
        **options,
    )


def call(kernels: Kernels, step: Step) -> Tensor:
    """Call a kernel, with every unwritten element poisoned."""
    with poisoned_empty():
        return kernels.find(step.name)(*step.args())


def bits(clip: Tensor) -> Tensor:
    return clip.contiguous().view({4: torch.int32, 2: torch.int16}[clip.element_size()])


def assert_same_bits(ours: Tensor, wanted: Tensor) -> None:
    assert ours.is_contiguous()
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(bits(ours), bits(wanted))


def assert_meets_the_contract(ours: Tensor, step: Step) -> None:
    """Frame by frame, as their magnitudes differ."""
    plain, exact = step.plain(), step.exact()
    assert ours.is_contiguous()
    assert ours.dtype == step.x_t.dtype
    for b in range(ours.shape[0]):
        for f in range(ours.shape[1]):
            assert_contract(f"frame {b}, {f}", ours[b, f], plain[b, f], exact[b, f])


# ---- values


@every_operator
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_registered(name, backend):
    assert backend in _library.operators[name].kernels


@every_operator
def test_the_cpu_kernels_serve(name):
    assert _library.operators[name].why_not("cpu", "cpu") is None


@compiled_backends
@every_shape
@every_dtype
@every_prediction
@every_guidance
@pytest.mark.parametrize("clip_x0", [None, 1.0])
def test_ddim(kernels, shape, dtypes, prediction, guidance_scale, clip_x0):
    options = {"prediction": prediction, "guidance_scale": guidance_scale, "clip_x0": clip_x0}
    for eta, sharing in [(0.0, "independent"), *((0.6, sharing) for sharing in SHARING), (1.0, "independent")]:
        step = make_step("ddim_step", shape, dtypes, device=kernels.device, eta=eta, sharing=sharing, **options)
        assert_same_bits(call(kernels, step), step.plain())


@compiled_backends
@every_shape
@every_dtype
@every_prediction
@every_guidance
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm(kernels, shape, dtypes, prediction, guidance_scale, variance):
    options = {"prediction": prediction, "guidance_scale": guidance_scale, "variance": variance}
    for sharing, clip_x0 in zip(SHARING, (None, 1.0, None, 1.0), strict=True):
        step = make_step("ddpm_step", shape, dtypes, device=kernels.device, sharing=sharing, clip_x0=clip_x0, **options)
        ours = call(kernels, step)
        if variance == "learned_range":
            assert_meets_the_contract(ours, step)
        else:
            assert_same_bits(ours, step.plain())


@every_shape
@every_dtype
@every_guidance
def test_flow(kernels, shape, dtypes, guidance_scale):
    for prediction in ("flow", "x0"):
        for clip_x0 in (None, 1.0):
            options = {"prediction": prediction, "guidance_scale": guidance_scale, "clip_x0": clip_x0}
            step = make_step("flow_step", shape, dtypes, device=kernels.device, **options)
            assert_same_bits(call(kernels, step), step.plain())


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(OPERATORS),
    shape=st.sampled_from(SHAPES),
    dtypes=st.sampled_from(DTYPES),
    prediction=st.sampled_from(PREDICTIONS),
    guidance_scale=st.sampled_from([None, 2.5]),
    clip_x0=st.sampled_from([None, 1.0]),
    sharing=st.sampled_from(SHARING),
    eta=st.sampled_from([0.0, 0.6, 1.0]),
    variance=st.sampled_from(VARIANCES),
    seed=st.integers(0, 2**31),
)
def test_triton_with_options_of_every_kind(name, shape, dtypes, seed, **options):
    torch.manual_seed(seed)
    kernels = kernels_of("sampling", "triton")
    step = make_step(name, shape, dtypes, device=kernels.device, **options)
    ours = call(kernels, step)
    if name == "ddpm_step" and step.variance == "learned_range":
        assert_meets_the_contract(ours, step)
    else:
        assert_same_bits(ours, step.plain())


@every_dtype
def test_a_learned_variance_of_any_size(kernels, dtypes):
    """With x_t and the prediction 0 a step is std * n: e^x from 0 to infinity, NaN where v is."""
    step = make_step("ddpm_step", (1, 1, 1, 20, 25), dtypes, device=kernels.device)
    v = torch.linspace(-90, 90, 500, device=kernels.device)
    v[7], v[8], v[9] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    step.model_out[:, :, 0], step.model_out[:, :, 1] = 0, v.view(20, 25)
    t = torch.full_like(step.t, 500)
    step = replace(step, x_t=torch.zeros_like(step.x_t), t=t, t_prev=t - 100, hold=None)
    ours, plain = call(kernels, step), step.plain()
    assert plain.isinf().any()
    assert (plain == 0).any()
    tolerance = max(2e-5, torch.finfo(dtypes[0]).eps)  # v / 2 + 1 / 2 rounds to 4e-6 where it is large
    smallest = torch.finfo(dtypes[0]).smallest_normal
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=smallest, equal_nan=True)


# ---- frames that are kept


@every_operator
@every_dtype
@every_sharing
def test_kept_frames_keep_their_bits(kernels, name, dtypes, sharing):
    step = make_step(name, (2, 5, 3, 5, 7), dtypes, device=kernels.device, guidance_scale=2.5, sharing=sharing, eta=0.7)
    hold = torch.tensor([[True, False, False, True, False], [False, False, True, False, True]], device=kernels.device)
    kept = hold | (step.t < 0)
    every_bit = torch.randint(-(2**15), 2**15, (kept.sum(), 3, 5, 7 * step.x_t.element_size() // 2)).short()
    step.x_t[kept] = every_bit.view(step.x_t.dtype).to(kernels.device)
    step.model_out.unflatten(0, (2, 2))[:, kept] = float("nan")
    step = replace(step, hold=hold)
    ours = call(kernels, step)
    assert torch.equal(bits(ours)[kept], bits(step.x_t)[kept])
    assert ours[~kept].isfinite().all()
    if name != "ddpm_step":
        assert torch.equal(bits(ours), bits(step.plain()))


@every_operator
def test_nothing_is_kept_without_hold(kernels, name):
    step = make_step(name, (2, 3, 3, 5, 7), device=kernels.device, eta=0.7, variance="fixed_small")
    step = replace(step, hold=None)
    ours = call(kernels, step)
    assert_same_bits(ours, step.plain())
    assert all((ours[b, f] != step.x_t[b, f]).any() == (step.t[b, f] >= 0) for b in range(2) for f in range(3))


# ---- layouts


def scattered(clip: Tensor) -> Tensor:
    """Return the clip with its channels last and its frames outermost."""
    return clip.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)


def shifted(clip: Tensor) -> Tensor:
    """Return the clip behind one element, and with another after every frame."""
    batch, frames, *rest = clip.shape
    elements = torch.Size(rest).numel()
    buffer = torch.full((1 + batch * frames * (elements + 1),), float("nan"), dtype=clip.dtype, device=clip.device)
    view = buffer[1:].view(batch, frames, elements + 1)[:, :, :elements].unflatten(2, rest)
    return view.copy_(clip)


def expanded(clip: Tensor) -> Tensor:
    return clip[:, :1, :, :1].expand(clip.shape)


@every_operator
@every_dtype
@pytest.mark.parametrize("view", [scattered, shifted, expanded])
def test_clips_are_read_where_they_lie(kernels, name, dtypes, view):
    step = make_step(name, (2, 3, 4, 6, 4), dtypes, device=kernels.device, guidance_scale=2.5, eta=0.7, sharing="mixed")
    step = replace(step, x_t=view(step.x_t), model_out=view(step.model_out), variance="fixed_large")
    assert_same_bits(call(kernels, step), step.plain())
    learned = replace(step, variance="learned_range")
    assert_meets_the_contract(call(kernels, learned), learned)


@every_operator
@pytest.mark.parametrize("dim", range(5))
def test_offsets_of_more_than_32_bits(kernels, name, dim):
    dtypes = (torch.bfloat16, torch.bfloat16)
    options = {"guidance_scale": None if dim == 0 else 2.5, "eta": 0.7, "sharing": "mixed"}
    step = make_step(name, (2, 2, 1, 2, 2), dtypes, device=kernels.device, **options)
    far = replace(step, x_t=far_apart(step.x_t, dim), model_out=far_apart(step.model_out, dim))
    assert_same_bits(call(kernels, far), call(kernels, step))


@every_operator
def test_a_model_without_variance_channels(kernels, name):
    step = make_step(name, (2, 3, 3, 5, 7), device=kernels.device, guidance_scale=2.5, eta=0.7, variance="fixed_small")
    alone = replace(step, model_out=step.model_out[:, :, :3].contiguous())
    assert_same_bits(call(kernels, alone), call(kernels, step))


@every_operator
@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6)], ids=str)
@every_sharing
def test_empty(kernels, name, shape, sharing):
    step = make_step(name, shape, device=kernels.device, guidance_scale=2.5, eta=0.7, sharing=sharing)
    assert call(kernels, step).shape == shape


@every_operator
@every_dtype
def test_infinities_and_nan_go_where_they_belong(kernels, name, dtypes):
    step = make_step(name, (1, 2, 3, 5, 7), dtypes, device=kernels.device, guidance_scale=2.5, eta=0.7)
    t = torch.full_like(step.t, 700)
    for clip_x0 in (None, 1.0):
        unusual = replace(step, t=t, t_prev=t - 100, hold=None, variance="fixed_small", clip_x0=clip_x0)
        for i, value in enumerate((float("inf"), -float("inf"), float("nan"), torch.finfo(dtypes[1]).max)):
            unusual.x_t[0, 0, 0, i, 0] = unusual.model_out[0, 0, 1, i, 1] = unusual.model_out[1, 1, 2, i, 2] = value
        ours, wanted = call(kernels, unusual), unusual.plain()
        assert not wanted.isfinite().all()
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


# ---- C++ alone: many shapes, threads


def sliced(step: Step, at: slice, first: int) -> Step:
    """Return the step of some samples."""
    doubled = step.model_out.shape[0] != step.x_t.shape[0]
    halves = step.model_out.unflatten(0, (1 + doubled, step.x_t.shape[0]))
    return replace(
        step,
        x_t=step.x_t[at],
        model_out=halves[:, at].flatten(0, 1),
        t=step.t[at],
        t_prev=step.t_prev[at],
        hold=None if step.hold is None else step.hold[at],
        base_weight=None if step.base_weight is None else step.base_weight[at],
        sample_offset=first,
    )


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(OPERATORS),
    batch=st.integers(1, 4),
    frames=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    views=st.tuples(*[st.sampled_from([torch.Tensor.contiguous, scattered, shifted])] * 2),
    split=st.integers(0, 4),
    sample_offset=st.sampled_from([0, 3, 2**31]),
    sharing=st.sampled_from(SHARING),
    dtypes=st.sampled_from(DTYPES),
    guidance_scale=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 2**31),
)
def test_bits_for_every_shape_and_batch_split(
    name, batch, frames, sizes, views, split, sample_offset, sharing, dtypes, guidance_scale, seed
):
    torch.manual_seed(seed)
    step = make_step(
        name,
        (batch, frames, *sizes),
        dtypes,
        guidance_scale=guidance_scale,
        sharing=sharing,
        prediction=PREDICTIONS[seed % 3],
        variance=VARIANCES[1 + seed % 2],
        eta=0.5,
    )
    step = replace(step, x_t=views[0](step.x_t), model_out=views[1](step.model_out), sample_offset=sample_offset)
    kernels = kernels_of("sampling", "cpu")
    assert_same_bits(call(kernels, step), step.plain())
    split = min(split, batch)
    parts = [
        call(kernels, sliced(replace(step, variance="learned_range"), at, first))
        for at, first in ((slice(split), sample_offset), (slice(split, None), sample_offset + split))
    ]
    assert_same_bits(torch.cat(parts), call(kernels, replace(step, variance="learned_range")))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_operator
@every_sharing
def test_the_same_bits_for_every_number_of_threads(threads, name, sharing):
    torch.manual_seed(0)
    step = make_step(name, (3, 5, 4, 40, 40), guidance_scale=2.5, sharing=sharing, eta=0.7)
    runs = []
    for count in (1, 2, 3, 2):
        threads(count)
        runs.append(call(kernels_of("sampling", "cpu"), step))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@every_operator
def test_float64_is_left_to_the_reference(name):
    step = make_step(name, SHAPES[0], eta=0.5)
    for part in ({"x_t": step.x_t.double()}, {"model_out": step.model_out.double()}):
        args = replace(step, **part).args()
        with vidkern.backend("cpu"), pytest.raises(vidkern.BackendError, match="float64 is the reference's"):
            getattr(torch.ops.vidkern, name)(*args)


# ---- whole steps


def whole_step(
    x: Tensor, weight: Tensor, t: Tensor, t_prev: Tensor, hold: Tensor, key: Tensor, schedule: Schedule
) -> Tensor:
    """A model on (cond, uncond), then its sampler's step."""
    both = torch.cat([x, x]).flatten(-2) @ weight
    model_out = torch.cat([both, both.tanh()], dim=2).unflatten(-1, x.shape[-2:])
    noise = {"key": key, "sharing": "shared"}
    return ops.ddpm_step(x, model_out, t, t_prev, schedule, guidance_scale=4.0, hold=hold, clip_x0=3.0, **noise)


def whole_step_args(device: str) -> tuple[Any, ...]:
    torch.manual_seed(0)
    step = make_step("ddpm_step", SHAPES[1], device=device)
    weight = torch.randn(16, 16, device=device) / 4
    return step.x_t, weight, step.t, step.t_prev, step.hold, step.key, make_schedule("linear", device=device)


def test_a_whole_step_compiles_into_one_graph():
    args = whole_step_args("cpu")
    compiled = torch.compile(whole_step, fullgraph=True)
    torch.testing.assert_close(compiled(*args), whole_step(*args), rtol=1e-5, atol=1e-5)


@needs_cuda
def test_a_cuda_graph_of_a_whole_step_needs_no_host():
    args = whole_step_args("cuda")
    with no_synchronisation():
        whole_step(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x_prev = whole_step(*args)
    key = args[-2]
    for offset in (3, 4):
        key[1] = offset
        graph.replay()
        assert_same_bits(x_prev, whole_step(*args))

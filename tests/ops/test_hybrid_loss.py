"""The hybrid loss: its definition and every kernel against the usual formulas and autograd in float64."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.backends import Kernels, kernels_of
from tests.ops.common import (
    KERNEL_DTYPES,
    assert_compiles_once,
    assert_contract,
    no_synchronisation,
    poisoned_empty,
)
from vidkern import _library, ops
from vidkern.diffusion import make_schedule
from vidkern.ops.noise import reference

BACKENDS = ("cpu", "triton", "cuda")
OPERATORS = ("hybrid_loss", "hybrid_loss_backward")
PREDICTIONS = ("epsilon", "v", "flow", "x0")
SHARING = ("independent", "shared", "mixed", "progressive")

#: Ragged, a multiple of a wide load, and more than a block or a stretch of a thread takes.
SHAPES = [(2, 3, 3, 5, 7), (1, 4, 4, 8, 2), (2, 2, 5, 11, 23)]

TABLES = ("posterior_mean_coef", "posterior_log_variance", "log_beta")
LINEAR = make_schedule("linear")

every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(params=["reference", *BACKENDS])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Return the definition or a backend's kernels, by name."""
    torch.manual_seed(0)
    if request.param == "reference":
        return Kernels(lambda name: getattr(reference, name), "cpu")
    return kernels_of("noise", request.param)


@dataclasses.dataclass
class Case:
    """A call of the operator: what the model gave, and what it is compared with."""

    model_out: Tensor  # (B, F, 2C, H, W)
    x0: Tensor
    alpha: Tensor
    sigma: Tensor
    t: Tensor
    tables: tuple[Tensor, ...]
    key: Tensor
    prediction: str
    mode: tuple[str, Tensor | None, int]  # sharing, base_weight, sample_offset

    @property
    def args(self) -> tuple[Any, ...]:
        return (
            self.model_out, self.x0, self.alpha, self.sigma, self.t, *self.tables, self.key, self.prediction, *self.mode
        )  # fmt: skip

    def noise(self) -> Tensor:
        return reference.philox_normal(list(self.x0.shape), self.key, *self.mode, torch.float32)


def make_case(
    shape: tuple[int, ...],
    prediction: str = "epsilon",
    sharing: str = "independent",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Frames at timestep 0, at 1, and up to 999; clips in [-1, 1] with both ends present, as the open bins need."""
    batch, frames = shape[:2]
    t = torch.tensor([0, 1, 400, 999, 0, 20, 700, 0], device=device).repeat(batch)[: batch * frames].view(batch, frames)
    schedule = LINEAR.to(device)
    weight = torch.rand(frames, device=device).expand(batch, frames) if sharing in ("mixed", "progressive") else None
    case = Case(
        model_out=torch.empty(0),
        x0=(2.6 * torch.rand(shape, device=device) - 1.3).clamp(-1, 1),
        alpha=schedule.alpha[t],
        sigma=schedule.sigma[t],
        t=t,
        tables=tuple(getattr(schedule, name) for name in TABLES),
        key=torch.tensor([20261121, 7], device=device),
        prediction=prediction,
        mode=(sharing, weight, 2**32 - batch),
    )
    pred = target_of(case, torch.float32) + 0.5 * torch.randn(shape, device=device)
    fraction = 1.5 * torch.randn(shape, device=device)
    case.model_out = torch.cat([pred, fraction], dim=2).to(dtype)
    return case


def beside(level: Tensor, dtype: torch.dtype) -> Tensor:
    return level[:, :, None, None, None].to(dtype)


def target_of(case: Case, dtype: torch.dtype) -> Tensor:
    a, s, x0, noise = beside(case.alpha, dtype), beside(case.sigma, dtype), case.x0.to(dtype), case.noise().to(dtype)
    return {"epsilon": noise, "v": a * noise - s * x0, "flow": noise - x0, "x0": x0}[case.prediction]


def usual_distance(case: Case, pred: Tensor) -> Tensor:
    """The two means' distance as public code takes it: by x_t and the x_0 that pred implies there."""
    dtype = pred.dtype
    a, s, x0 = beside(case.alpha, dtype), beside(case.sigma, dtype), case.x0.to(dtype)
    x_t = a * x0 + s * case.noise().to(dtype)
    guess = {
        "epsilon": (x_t - s * pred) / a,
        "v": (a * x_t - s * pred) / (a**2 + s**2),
        "flow": (x_t - s * pred) / (a + s),
        "x0": pred,
    }[case.prediction]
    return beside(case.tables[0][case.t], dtype) * (x0 - guess)


def usual_losses(case: Case, model_out: Tensor) -> tuple[Tensor, Tensor]:
    """Mse and vb of each frame by the formulas of public code, in model_out's dtype and for autograd."""
    dtype = model_out.dtype
    pred, fraction = model_out.chunk(2, dim=2)
    mse = (pred - target_of(case, dtype)).square().mean((2, 3, 4))
    distance, x0 = usual_distance(case, pred.detach()), case.x0.to(dtype)
    low, high = (beside(table[case.t], dtype) for table in case.tables[1:])
    log_variance = (fraction + 1) / 2 * high + (1 - fraction) / 2 * low
    kl = 0.5 * (log_variance - low - 1 + torch.exp(low - log_variance) + distance**2 * torch.exp(-log_variance))

    def cdf(x: Tensor) -> Tensor:
        return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))

    inverse, far = torch.exp(-0.5 * log_variance), distance.abs()
    inner = cdf(inverse * (1 / 255 - far)) - cdf(inverse * (-1 / 255 - far))
    first, last = cdf(inverse * (distance + 1 / 255)), cdf(inverse * (1 / 255 - distance))
    nll = -torch.where(x0 < -0.999, first, torch.where(x0 > 0.999, last, inner)).clamp(min=1e-12).log()
    bound = torch.where(beside(case.t, torch.int64) == 0, nll, kl)
    return mse, bound.mean((2, 3, 4)) / math.log(2)


def usual(case: Case, dtype: torch.dtype, dmse: Tensor, dvb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mse, vb and dmodel_out, computed in a dtype; the gradient is in model_out's, or in float64."""
    leaf = case.model_out.detach().clone()
    leaf = (leaf.double() if dtype == torch.float64 else leaf).requires_grad_()
    losses = usual_losses(case, leaf.to(dtype))
    (grad,) = torch.autograd.grad(losses, leaf, (dmse.to(dtype), dvb.to(dtype)))
    return losses[0].detach(), losses[1].detach(), grad


def call(kernels: Kernels, case: Case) -> tuple[Tensor, ...]:
    """Return mse, vb, factors and slope, with every unwritten element poisoned."""
    with poisoned_empty():
        return kernels.find("hybrid_loss")(*case.args)


def call_backward(kernels: Kernels, *args: Tensor) -> Tensor:
    with poisoned_empty():
        return kernels.find("hybrid_loss_backward")(*args)


def assert_meets_the_contract(kernels: Kernels, case: Case) -> None:
    """Hold mse, vb and the gradient against float64; the two losses' upstream gradients differ in every frame."""
    dmse, dvb = torch.rand(2, *case.t.shape, device=case.t.device) + 0.5
    mse, vb, factors, slope = call(kernels, case)
    dout = call_backward(kernels, dmse, dvb, factors, slope)
    assert mse.dtype == vb.dtype == slope.dtype == torch.float32
    assert factors.dtype == dout.dtype == case.model_out.dtype
    assert factors.is_contiguous()
    assert dout.is_contiguous()
    plain, exact = usual(case, torch.float32, dmse, dvb), usual(case, torch.float64, dmse, dvb)
    for name, *values in zip(("mse", "vb"), (mse, vb), plain, exact, strict=False):
        assert_contract(name, *values)
    for name, *values in zip(
        ("dpred", "dv"), *(grad.chunk(2, dim=2) for grad in (dout, plain[2], exact[2])), strict=True
    ):
        for frames in ("decoder", "divergence"):  # whose gradients differ in size
            chosen = (case.t == 0) == (frames == "decoder")
            if chosen.any():
                assert_contract(f"{name}, {frames}", *(value[chosen] for value in values))


# ---- the definition and the kernels


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_registered(name, backend):
    assert backend in _library.operators[name].kernels


@pytest.mark.parametrize("name", OPERATORS)
def test_the_cpu_kernels_serve(name):
    assert _library.operators[name].why_not("cpu", "cpu") is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@every_prediction
def test_losses_and_gradients(kernels, shape, dtype, prediction):
    sharing = SHARING[(PREDICTIONS.index(prediction) + SHAPES.index(shape)) % 4]
    assert_meets_the_contract(kernels, make_case(shape, prediction, sharing, dtype, kernels.device))


@pytest.mark.parametrize("sharing", SHARING)
def test_every_sharing(kernels, sharing):
    assert_meets_the_contract(kernels, make_case(SHAPES[2], "v", sharing, device=kernels.device))


@every_prediction
def test_the_residual_is_diffusion_mses_bit_for_bit(kernels, prediction):
    case = make_case(SHAPES[0], prediction, "mixed", torch.bfloat16, kernels.device)
    mse, _, factors, _ = call(kernels, case)
    plain_mse, residual = reference.diffusion_mse(
        case.model_out[:, :, :3], case.x0, case.alpha, case.sigma, case.key, prediction, *case.mode
    )
    assert torch.equal(factors[:, :, :3], residual)
    torch.testing.assert_close(mse, plain_mse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("t", [0, 1, 999])
def test_one_timestep_for_all(kernels, t):
    case = make_case(SHAPES[0], device=kernels.device)
    case.t = torch.full((1, 1), t, device=kernels.device).expand(2, 3)
    case.alpha, case.sigma = LINEAR.to(kernels.device).coefficients(case.t)
    assert_meets_the_contract(kernels, case)


def test_arguments_are_read_where_they_lie(kernels):
    case = make_case(SHAPES[0], "v", device=kernels.device)
    wanted = call(kernels, case)
    case.model_out = case.model_out.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)
    case.x0 = torch.cat([torch.full_like(case.x0, math.nan), case.x0], dim=2)[:, :, 3:]
    case.alpha, case.sigma, case.t = (v.t().contiguous().t() for v in (case.alpha, case.sigma, case.t))
    case.tables = tuple(torch.stack(case.tables, dim=1)[:, i] for i in range(3))
    for ours, theirs in zip(call(kernels, case), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # plain sums depend on the strides
    dmse, dvb = torch.rand(2, 1, 1, device=kernels.device).expand(2, 2, 3)
    assert torch.equal(
        call_backward(kernels, dmse, dvb, *wanted[2:]),
        call_backward(kernels, dmse.contiguous(), dvb.contiguous(), *wanted[2:]),
    )


def test_losses_do_not_depend_on_the_batch_split(kernels):
    case = make_case((3, 2, 3, 20, 20), "flow", "mixed", device=kernels.device)
    whole = call(kernels, case)
    sharing, weight, offset = case.mode
    for rows in (slice(0, 1), slice(1, 3)):
        part = dataclasses.replace(
            case, mode=(sharing, weight[rows], offset + rows.start),
            **{name: getattr(case, name)[rows] for name in ("model_out", "x0", "alpha", "sigma", "t")},
        )  # fmt: skip
        for ours, all_of_them in zip(call(kernels, part), whole, strict=True):
            assert torch.equal(ours, all_of_them[rows])


def test_a_timestep_outside_the_schedule_counts_as_the_nearest_inside(kernels):
    case = make_case(SHAPES[0], device=kernels.device)
    wanted = call(kernels, case)
    case.t = case.t.masked_fill(case.t == 0, -1).masked_fill(case.t == 999, 10**12)
    for ours, theirs in zip(call(kernels, case), wanted, strict=True):
        assert torch.equal(ours, theirs)


@every_prediction
def test_given_frames_stay_finite(kernels, prediction):
    """Alpha 1, sigma 0 at timestep 0: a given frame enters clean, and a prediction says nothing of its x_0."""
    case = make_case(SHAPES[0], prediction, device=kernels.device)
    case.alpha[:, 0], case.sigma[:, 0] = 1.0, 0.0
    case.t[:, 0] = 0
    assert_meets_the_contract(kernels, case)
    _, vb, factors, _ = call(kernels, case)
    assert vb.isfinite().all()
    assert factors.isfinite().all()
    case.model_out[:, 0, :3] *= 2
    changed = call(kernels, case)[1][:, 0] != vb[:, 0]
    assert changed.all() if prediction == "x0" else not changed.any()


def test_values_that_no_gaussian_explains_have_a_bounded_loss_and_no_gradient(kernels):
    case = make_case((1, 1, 2, 3, 4), device=kernels.device)
    case.model_out[:, :, :2] += 1000.0
    _, vb, factors, _ = call(kernels, case)
    torch.testing.assert_close(vb, torch.full_like(vb, -math.log2(1e-12)), rtol=0.5, atol=0)
    closed = case.x0.abs() < 0.999
    assert closed.any()
    assert not factors[:, :, 2:][closed].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("at", ["pred", "v", "x0"])
def test_nan_and_infinity_go_where_the_definition_sends_them(kernels, at, value):
    case = make_case(SHAPES[0], "v", device=kernels.device)
    (case.x0 if at == "x0" else case.model_out)[:, :, -1 if at == "v" else 0, 2, 3] = value
    for ours, wanted in zip(call(kernels, case), reference.hybrid_loss(*case.args), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6)], ids=str)
def test_empty(kernels, shape):
    case = make_case(shape, device=kernels.device)
    mse, vb, factors, slope = call(kernels, case)
    assert mse.shape == vb.shape == slope.shape == shape[:2]
    assert mse.isnan().all()  # the mean over no elements
    assert vb.isnan().all()
    assert call_backward(kernels, mse, vb, factors, slope).shape == factors.shape == case.model_out.shape


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_a_good_prediction_has_an_accurate_distance(prediction):
    """x_0 minus a guess of it loses the digits that the residual keeps: to be seen where a model is good."""
    case = make_case((1, 8, 4, 16, 16), prediction)
    case.t = torch.tensor([[1, 2, 5, 20, 100, 400, 700, 999]])
    case.alpha, case.sigma = LINEAR.coefficients(case.t)
    pred = target_of(case, torch.float32) + 1e-3 * torch.randn(case.x0.shape)
    exact = usual_distance(case, pred.double())
    usual_error = (usual_distance(case, pred) - exact).abs().amax((2, 3, 4))
    gain = beside(
        case.tables[0][case.t] * reference.x0_distance_per_residual(prediction, case.alpha, case.sigma), torch.float32
    )
    error = (gain * (pred - target_of(case, torch.float32)) - exact).abs().amax((2, 3, 4))
    assert (error < usual_error).all()
    if prediction == "epsilon":  # the residual is exact
        assert (error < usual_error / 20).all()


# ---- C++ alone


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_same_bits_for_every_number_of_threads(threads):
    torch.manual_seed(0)
    case, kernels = make_case((3, 5, 4, 40, 40), "v", "progressive"), kernels_of("noise", "cpu")
    runs = []
    for count in (1, 2, 3):
        threads(count)
        losses = call(kernels, case)
        runs.append([*losses, call_backward(kernels, *losses)])
    for run in runs[1:]:
        for ours, wanted in zip(run, runs[0], strict=True):
            assert torch.equal(ours, wanted)


# ---- the public operator


def public(case: Case, **changed: Any) -> tuple[Tensor, Tensor]:
    sharing, weight, offset = case.mode
    given = {name: getattr(case, name) for name in ("model_out", "x0", "alpha", "sigma", "t", "key", "prediction")}
    options = {"schedule": LINEAR.to(case.t.device), "sharing": sharing, "base_weight": weight, "sample_offset": offset}
    return ops.hybrid_loss(**{**given, **options, **changed})


@pytest.mark.parametrize("sharing", SHARING)
@every_prediction
def test_gradients(prediction, sharing):
    """By finite differences: of mse in its prediction, of vb in its variance (it does not move the mean)."""
    torch.manual_seed(0)
    case = make_case((2, 2, 1, 2, 3), prediction, sharing, torch.float64)
    case.x0, case.alpha, case.sigma = case.x0.double(), case.alpha.double(), case.sigma.double()
    pred, fraction = (half.clone().requires_grad_() for half in case.model_out.chunk(2, dim=2))
    weight = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)

    def mse(pred: Tensor, weight: Tensor) -> Tensor:
        return public(case, model_out=torch.cat([pred, fraction.detach()], 2), weight=weight)[0]

    def vb(fraction: Tensor) -> Tensor:
        return public(case, model_out=torch.cat([pred.detach(), fraction], 2))[1]

    assert torch.autograd.gradcheck(mse, (pred, weight))
    assert torch.autograd.gradcheck(vb, fraction)


def test_each_loss_alone_reaches_its_own_half():
    torch.manual_seed(0)
    case = make_case(SHAPES[0])
    out, weight = case.model_out.requires_grad_(), torch.rand(2, 3)
    mse, vb = public(case, weight=weight)
    (both,) = torch.autograd.grad(mse.sum() + vb.sum(), out, retain_graph=True)
    (of_mse,) = torch.autograd.grad(mse.sum(), out, retain_graph=True)
    (of_vb,) = torch.autograd.grad(vb.sum(), out)
    assert torch.equal(of_mse[:, :, :3], both[:, :, :3])
    assert torch.equal(of_vb[:, :, 3:], both[:, :, 3:])
    assert both.all()
    assert not of_mse[:, :, 3:].any()
    assert not of_vb[:, :, :3].any()
    torch.testing.assert_close(mse, weight * public(case)[0])


def test_gradients_survive_float16():
    """Factors are stored free of 1/(C H W) and of the log variances' range, which would take them under float16's."""
    torch.manual_seed(0)
    case = make_case((1, 4, 4, 64, 64), dtype=torch.float16)
    out = case.model_out.requires_grad_()
    mse, vb = public(case)
    (grad,) = torch.autograd.grad((mse + vb).sum() * 2.0**16, out)
    scale = torch.full((1, 4), 2.0**16)
    exact = usual(case, torch.float64, scale, scale)[2]
    torch.testing.assert_close(grad.double(), exact, rtol=3e-3, atol=1e-6)


@needs_cuda
@pytest.mark.parametrize("sharing", SHARING)
def test_a_training_step_does_not_synchronise(sharing):
    case = make_case(SHAPES[0], "v", sharing, device="cuda")
    case.model_out.requires_grad_()
    schedule = LINEAR.to("cuda")
    with no_synchronisation():
        mse, vb = public(case, schedule=schedule)
        (mse + vb).mean().backward()


def test_opcheck():
    torch.manual_seed(0)
    case = make_case(SHAPES[0], "v", "progressive")
    case.model_out.requires_grad_()
    torch.library.opcheck(torch.ops.vidkern.hybrid_loss.default, case.args)
    grads, factors = torch.rand(3, 2, 3), torch.randn(2, 3, 6, 5, 7)
    torch.library.opcheck(torch.ops.vidkern.hybrid_loss_backward.default, (*grads[:2], factors, grads[2]))


def test_compiles_once_for_every_size():
    def train(model_out, x0, alpha, sigma, t, key, sample_offset):
        return ops.hybrid_loss(model_out, x0, alpha, sigma, t, LINEAR, key, sample_offset=sample_offset)

    def make(batch, frames, size):
        case = make_case((batch, frames, 4, size, size + 1))
        return case.model_out.requires_grad_(), case.x0, case.alpha, case.sigma, case.t, case.key, batch + 10

    assert_compiles_once(train, make, [(5, 3, 10), (2, 8, 6), (3, 2, 5)])


# ---- bad input

SHAPE = SHAPES[0]
BAD = {
    "model_out type": ({"model_out": [1.0]}, TypeError, "model_out must be a torch.Tensor, got list"),
    "model_out channels": (
        {"model_out": torch.rand(SHAPE)},
        ValueError,
        r"model_out must be \(B, F, 2C, H, W\) = \(2, 3, 6, 5, 7\), got \(2, 3, 3, 5, 7\)",
    ),
    "model_out dtype": ({"model_out": torch.ones(2, 3, 6, 5, 7).long()}, TypeError, "model_out must be float32 or "),
    "model_out device": (
        {"model_out": torch.rand(2, 3, 6, 5, 7, device="meta")},
        ValueError,
        "model_out must be on the device of x0",
    ),
    "x0 rank": ({"x0": torch.rand(2, 3, 4)}, ValueError, r"x0 must be \(B, F, C, H, W\)"),
    "x0 gradient": ({"x0": torch.rand(SHAPE, requires_grad=True)}, ValueError, "x0 must not require a gradient"),
    "sigma gradient": (
        {"sigma": torch.rand(2, 3, requires_grad=True)},
        ValueError,
        "sigma must not require a gradient",
    ),
    "alpha shape": ({"alpha": torch.rand(2)}, ValueError, r"alpha must be \(B, F\) = \(2, 3\), got \(2,\)"),
    "t type": ({"t": 3}, TypeError, "t must be a torch.Tensor, got int"),
    "t shape": ({"t": torch.zeros(2).long()}, ValueError, r"t must be \(B, F\) = \(2, 3\), got \(2,\)"),
    "t dtype": ({"t": torch.zeros(2, 3).int()}, TypeError, "t must be int64, got int32"),
    "schedule": (
        {"schedule": make_schedule("flow")},
        TypeError,
        "schedule must have a tensor 'posterior_mean_coef', got Schedule without",
    ),
    "table shape": (
        {"schedule": dataclasses.replace(LINEAR, log_beta=torch.rand(7))},
        ValueError,
        r"schedule.log_beta must be \(T,\) = \(1000,\), got \(7,\)",
    ),
    "table dtype": (
        {"schedule": dataclasses.replace(LINEAR, log_beta=torch.rand(1000).double())},
        TypeError,
        "schedule.log_beta must be float32, got float64",
    ),
    "no steps": (
        {"schedule": dataclasses.replace(LINEAR, **{name: torch.rand(0) for name in TABLES})},
        ValueError,
        r"schedule must have a step, got tables of shape \(0,\)",
    ),
    "prediction": ({"prediction": "eps"}, ValueError, "prediction must be one of .*got 'eps'"),
    "weight": ({"weight": torch.rand(3)}, ValueError, r"weight must be \(B, F\)"),
    "key": ({"key": torch.tensor([1])}, ValueError, r"key must be \(seed, offset\)"),
    "sharing": ({"sharing": "common"}, ValueError, "sharing must be one of"),
    "sample_offset": ({"sample_offset": -1}, ValueError, "sample_offset must be at least 0"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD)
def test_refuses(changed, error, message):
    with pytest.raises(error, match=message):
        public(make_case(SHAPE), **changed)

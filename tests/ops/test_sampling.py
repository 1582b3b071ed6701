"""The sampler's steps: against float64 writings, ADM's chain, diffusers' schedulers and closed forms."""

import math
from types import SimpleNamespace

import diffusers
import diffusers.schedulers.scheduling_ddpm as ddpm_module
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.common import KERNEL_DTYPES, assert_compiles_once, assert_contract, no_synchronisation
from vidkern import ops
from vidkern.ops.noise.reference import noise_like

KEY = torch.tensor([11, 13])
SHAPE = (2, 3, 4, 5, 6)
NUM_STEPS = 1000
SCHEDULE = SimpleNamespace(
    alphas_cumprod=torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float64).neg().add(1).cumprod(0).float(),
    sigma=((torch.arange(NUM_STEPS, dtype=torch.float64) + 1) / NUM_STEPS).float(),
)
# frames early, late, at their last step; the second clip waits, jumps and is clean
T = torch.tensor([[999, 500, 20], [300, 700, -1]])
T_PREV = torch.tensor([[979, 480, -1], [300, 10, -1]])

PREDICTIONS = ["epsilon", "v", "x0"]
VARIANCES = ["learned_range", "fixed_small", "fixed_large"]
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_variance = pytest.mark.parametrize("variance", VARIANCES)
every_guidance = pytest.mark.parametrize("guidance_scale", [None, 3.5])
every_clip = pytest.mark.parametrize("clip_x0", [None, 1.0])


def step_inputs(dtype=torch.float32, guidance_scale=None, shape=SHAPE, seed=0) -> tuple[Tensor, Tensor]:
    """x_t, and a model output of 2C channels with a doubled batch where there is guidance."""
    torch.manual_seed(seed)
    batch, frames, channels, *size = shape
    doubled = batch if guidance_scale is None else 2 * batch
    out = torch.randn(doubled, frames, 2 * channels, *size)
    out[:, :, channels:] = out[:, :, channels:].tanh()
    return torch.randn(shape).to(dtype), out.to(dtype)


# ---- an independent writing, frame by frame with Python's scalars


def abar_at(t: int) -> float:
    return 1.0 if t < 0 else float(SCHEDULE.alphas_cumprod[t])


def plain_x0(x: Tensor, out: Tensor, abar: float, prediction: str, clip_x0: float | None) -> Tensor:
    alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    x0 = {"epsilon": (x - sigma * out) / alpha, "v": alpha * x - sigma * out, "x0": out}[prediction]
    return x0 if clip_x0 is None else x0.clamp(-clip_x0, clip_x0)


def plain_guided(out: Tensor, batch: int, channels: int, scale: float | None) -> tuple[Tensor, Tensor]:
    """The guided prediction and the variance channels."""
    if scale is None:
        return out[:, :, :channels], out[:, :, channels:]
    cond, uncond = out[:batch, :, :channels], out[batch:, :, :channels]
    return uncond + scale * (cond - uncond), out[:batch, :, channels:]


def plain_ddim(x, out, t, t_prev, noise, *, prediction="epsilon", eta=0.0, guidance_scale=None, clip_x0=None):
    guided, _ = plain_guided(out, x.shape[0], x.shape[2], guidance_scale)
    result = x.clone()
    for b, f in np.ndindex(*t.shape):
        if t[b, f] < 0:
            continue
        a, p = abar_at(int(t[b, f])), abar_at(int(t_prev[b, f]))
        x0 = plain_x0(x[b, f], guided[b, f], a, prediction, clip_x0)
        epsilon = (x[b, f] - math.sqrt(a) * x0) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - p) / (1 - a)) * math.sqrt(1 - a / p)
        result[b, f] = math.sqrt(p) * x0 + math.sqrt(max(1 - p - sigma**2, 0)) * epsilon + sigma * noise[b, f]
    return result


def plain_ddpm(
    x, out, t, t_prev, noise, *, variance="learned_range", prediction="epsilon", guidance_scale=None, clip_x0=None
):
    guided, values = plain_guided(out, x.shape[0], x.shape[2], guidance_scale)
    result = x.clone()
    for b, f in np.ndindex(*t.shape):
        if t[b, f] < 0:
            continue
        a, p = abar_at(int(t[b, f])), abar_at(int(t_prev[b, f]))
        beta = 1 - a / p
        x0 = plain_x0(x[b, f], guided[b, f], a, prediction, clip_x0)
        mean = math.sqrt(p) * beta / (1 - a) * x0 + math.sqrt(a / p) * (1 - p) / (1 - a) * x[b, f]
        small = beta * (1 - p) / (1 - a)
        if small <= 0:
            result[b, f] = mean
            continue
        fraction = {"learned_range": (values[b, f] + 1) / 2, "fixed_small": 0.0, "fixed_large": 1.0}[variance]
        log_variance = torch.as_tensor(fraction * math.log(beta) + (1 - fraction) * math.log(small)).to(x.dtype)
        result[b, f] = mean + (0.5 * log_variance).exp() * noise[b, f]
    return result


def plain_flow(x, out, t, t_prev, *, prediction="flow", guidance_scale=None, clip_x0=None):
    guided, _ = plain_guided(out, x.shape[0], x.shape[2], guidance_scale)
    result = x.clone()
    for b, f in np.ndindex(*t.shape):
        if t[b, f] < 0:
            continue
        s, p = (0.0 if i < 0 else float(SCHEDULE.sigma[i]) for i in (int(t[b, f]), int(t_prev[b, f])))
        x0 = x[b, f] - s * guided[b, f] if prediction == "flow" else guided[b, f]
        if clip_x0 is not None:
            x0 = x0.clamp(-clip_x0, clip_x0)
        result[b, f] = x[b, f] + (p - s) * (x[b, f] - x0) / s
    return result


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def step_noise(x: Tensor, t: Tensor = T, sharing="independent") -> Tensor:
    return noise_like(x, KEY, sharing, None, 0, step=t)


@every_dtype
@every_prediction
@every_guidance
@every_clip
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_meets_the_contract(dtype, prediction, guidance_scale, clip_x0, eta):
    x, out = step_inputs(dtype, guidance_scale)
    options = {"prediction": prediction, "eta": eta, "guidance_scale": guidance_scale, "clip_x0": clip_x0}
    ours = ops.ddim_step(x, out, T, T_PREV, SCHEDULE, key=KEY, **options)
    noise = step_noise(x)
    plain = plain_ddim(x, out, T, T_PREV, noise.to(dtype), **options)
    exact = plain_ddim(x.double(), out.double(), T, T_PREV, noise.double(), **options)
    assert ours.dtype == dtype
    for b, f in np.ndindex(*T.shape):  # frame by frame, as their magnitudes differ
        assert_contract(f"frame {b}, {f}", ours[b, f], plain[b, f], exact[b, f])


@every_dtype
@every_prediction
@every_guidance
@every_clip
@every_variance
def test_ddpm_meets_the_contract(dtype, prediction, guidance_scale, clip_x0, variance):
    x, out = step_inputs(dtype, guidance_scale)
    options = {
        "prediction": prediction,
        "variance": variance,
        "guidance_scale": guidance_scale,
        "clip_x0": clip_x0,
    }
    ours = ops.ddpm_step(x, out, T, T_PREV, SCHEDULE, key=KEY, **options)
    noise = step_noise(x)
    plain = plain_ddpm(x, out, T, T_PREV, noise.to(dtype), **options)
    exact = plain_ddpm(x.double(), out.double(), T, T_PREV, noise.double(), **options)
    for b, f in np.ndindex(*T.shape):
        assert_contract(f"frame {b}, {f}", ours[b, f], plain[b, f], exact[b, f])


@every_dtype
@pytest.mark.parametrize("prediction", ["flow", "x0"])
@every_guidance
@every_clip
def test_flow_meets_the_contract(dtype, prediction, guidance_scale, clip_x0):
    x, out = step_inputs(dtype, guidance_scale)
    options = {"prediction": prediction, "guidance_scale": guidance_scale, "clip_x0": clip_x0}
    ours = ops.flow_step(x, out, T, T_PREV, SCHEDULE, **options)
    plain = plain_flow(x, out, T, T_PREV, **options)
    exact = plain_flow(x.double(), out.double(), T, T_PREV, **options)
    for b, f in np.ndindex(*T.shape):
        assert_contract(f"frame {b}, {f}", ours[b, f], plain[b, f], exact[b, f])


@every_prediction
def test_float64_is_served(prediction):
    x, out = step_inputs(torch.float64)
    options = {"prediction": prediction}
    noise = step_noise(x).double()
    ours = ops.ddim_step(x, out, T, T_PREV, SCHEDULE, key=KEY, eta=0.7, **options)
    torch.testing.assert_close(ours, plain_ddim(x, out, T, T_PREV, noise, eta=0.7, **options), rtol=1e-9, atol=1e-9)
    ours = ops.ddpm_step(x, out, T, T_PREV, SCHEDULE, key=KEY, **options)
    torch.testing.assert_close(ours, plain_ddpm(x, out, T, T_PREV, noise, **options), rtol=1e-9, atol=1e-9)


# ---- other people's samplers, and closed forms


def test_ddpm_is_adms_respaced_chain():
    """ADM builds a chain of its own over the kept steps; ours reads the base schedule at two indices."""
    x, out = step_inputs(torch.float64)
    kept = np.arange(0, NUM_STEPS, 4)
    abar = SCHEDULE.alphas_cumprod.double().cpu().numpy()[kept]
    betas = 1 - abar / np.concatenate([[1.0], abar[:-1]])
    abar = np.cumprod(1 - betas)
    abar_prev = np.concatenate([[1.0], abar[:-1]])
    posterior = betas * (1 - abar_prev) / (1 - abar)
    log_clipped = np.log(np.concatenate([posterior[1:2], posterior[1:]]))
    root_x, root_epsilon = np.sqrt(1 / abar), np.sqrt(1 / abar - 1)
    mean_x0 = betas * np.sqrt(abar_prev) / (1 - abar)
    mean_x = (1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar)
    for i in (249, 100, 1, 0):
        t = torch.full((2, 3), int(kept[i]))
        t_prev = torch.full((2, 3), int(kept[i - 1]) if i else -1)
        epsilon, values = out.chunk(2, 2)
        x0 = x * root_x[i] - epsilon * root_epsilon[i]
        mean = x0 * mean_x0[i] + x * mean_x[i]
        fraction = (values + 1) / 2
        log_variance = fraction * math.log(betas[i]) + (1 - fraction) * log_clipped[i]
        wanted = mean + (i != 0) * (0.5 * log_variance).exp() * step_noise(x, t).double()
        ours = ops.ddpm_step(x, out, t, t_prev, SCHEDULE, key=KEY)
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("ours", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_diffusers(ours, theirs, clip, eta):
    x, out = step_inputs()
    out = out[:, :, :4]
    scheduler = diffusers.DDIMScheduler(prediction_type=theirs, clip_sample=clip, set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    schedule = SimpleNamespace(alphas_cumprod=scheduler.alphas_cumprod)
    for t in (980, 500, 20, 0):
        steps = torch.full((2, 3), t)
        options = {"prediction": ours, "eta": eta, "key": KEY, "clip_x0": 1.0 if clip else None}
        got = ops.ddim_step(x, out, steps, (steps - 20).clamp(min=-1), schedule, **options)
        noise = step_noise(x, steps)
        wanted = scheduler.step(out, t, x, eta, use_clipped_model_output=clip, variance_noise=noise).prev_sample
        # theirs takes 1 - abar / abar' in float32, which loses digits
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_is_diffusers(variance, clip, monkeypatch):
    x, out = step_inputs()
    if variance != "learned_range":
        out = out[:, :, :4]
    scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=clip)
    scheduler.set_timesteps(50)
    schedule = SimpleNamespace(alphas_cumprod=scheduler.alphas_cumprod)
    for t in (980, 500, 20, 0):
        steps = torch.full((2, 3), t)
        noise = step_noise(x, steps).flatten(0, 1)
        clip_x0 = 1.0 if clip else None
        t_prev = (steps - 20).clamp(min=-1)
        got = ops.ddpm_step(x, out, steps, t_prev, schedule, key=KEY, variance=variance, clip_x0=clip_x0)
        # theirs splits the variance off dimension 1: fold the frames into the batch
        monkeypatch.setattr(ddpm_module, "randn_tensor", lambda *_, n=noise, **__: n)
        wanted = scheduler.step(out.flatten(0, 1), t, x.flatten(0, 1)).prev_sample.view(SHAPE)
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


def test_ddim_with_the_true_noise_follows_the_forward_process():
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)

    def diffused(t: Tensor) -> Tensor:
        abar = torch.where(t < 0, 1.0, SCHEDULE.alphas_cumprod[t.clamp(min=0)]).double()[:, :, None, None, None]
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    got = ops.ddim_step(diffused(T).float(), noise, T, T_PREV, SCHEDULE)
    torch.testing.assert_close(got.double(), diffused(T_PREV), rtol=1e-4, atol=3e-4)


def test_flow_with_the_true_velocity_follows_the_straight_line():
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)

    def interpolated(t: Tensor) -> Tensor:
        sigma = torch.where(t < 0, 0.0, SCHEDULE.sigma[t.clamp(min=0)])[:, :, None, None, None]
        return (1 - sigma) * x0 + sigma * noise

    got = ops.flow_step(interpolated(T), noise - x0, T, T_PREV, SCHEDULE)
    torch.testing.assert_close(got, interpolated(T_PREV), rtol=1e-5, atol=1e-5)


def test_ddpm_and_ddim_with_eta_1_have_the_same_distribution():
    x, out = step_inputs(torch.float64)
    ddim = ops.ddim_step(x, out, T, T_PREV, SCHEDULE, eta=1.0, key=KEY)
    ddpm = ops.ddpm_step(x, out, T, T_PREV, SCHEDULE, variance="fixed_small", key=KEY)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


# ---- frames, holds, noise


STEPS = {
    "ddim": lambda *args, key=KEY, **options: ops.ddim_step(*args, SCHEDULE, eta=0.8, key=key, **options),
    "ddpm": lambda *args, key=KEY, **options: ops.ddpm_step(*args, SCHEDULE, key=key, **options),
    "flow": lambda *args, **options: ops.flow_step(*args, SCHEDULE, **options),
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
every_drawing_step = pytest.mark.parametrize("step", [STEPS["ddim"], STEPS["ddpm"]], ids=["ddim", "ddpm"])


@every_step
@every_dtype
@every_guidance
def test_held_frames_keep_their_bits(step, dtype, guidance_scale):
    x, out = step_inputs(dtype, guidance_scale)
    x[0, 1, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    out[0, 1, 0] = float("nan")
    hold = torch.tensor([[False, True, False], [True, False, False]])
    got = step(x, out, T, T_PREV, hold=hold, guidance_scale=guidance_scale)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for b, f in np.ndindex(*T.shape):
        kept = bool(hold[b, f]) or T[b, f] < 0
        assert torch.equal(got[b, f].view(integers), x[b, f].view(integers)) == kept or T[b, f] == T_PREV[b, f]
        assert got[b, f].isfinite().all() or (b, f) == (0, 1)


@every_step
def test_a_clip_is_its_frames(step):
    """Per-frame timesteps in one call are one call for each frame."""
    x, out = step_inputs()
    whole = step(x, out, T, T_PREV)
    for t, t_prev in {(int(t), int(p)) for t, p in zip(T.flatten(), T_PREV.flatten(), strict=True)}:
        alone = step(x, out, torch.full_like(T, t), torch.full_like(T, t_prev))
        same = (t == T) & (t_prev == T_PREV)
        assert torch.equal(whole[same], alone[same])


@every_drawing_step
@pytest.mark.parametrize("sharing", ["independent", "shared"])
def test_steps_do_not_depend_on_the_batch_split(step, sharing):
    x, out = step_inputs(shape=(5, 3, 4, 5, 6))
    t = torch.randint(21, 1000, (5, 3))
    whole = step(x, out, t, t - 20, sharing=sharing)
    parts = [step(x[i : i + 2], out[i : i + 2], t[i : i + 2], t[i : i + 2] - 20, sharing=sharing, sample_offset=i)
             for i in (0, 2, 4)]  # fmt: skip
    assert torch.equal(whole, torch.cat(parts))


@every_drawing_step
def test_one_key_gives_every_timestep_its_own_noise(step):
    x, out = step_inputs()
    still = torch.zeros_like(out)

    def drawn(t: int, **options) -> Tensor:
        steps = torch.full((2, 3), t)
        return step(torch.zeros_like(x), still, steps, steps - 20, **options)

    first, second = drawn(500), drawn(480)
    assert abs(correlation(first, second)) < 0.2
    shared = drawn(500, sharing="shared")
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    assert not torch.equal(first[:, 0], first[:, 1])
    # a step's noise is not the noise that the run started from
    start = ops.philox_normal(SHAPE, KEY)
    assert abs(correlation(first, start)) < 0.2


@every_drawing_step
def test_shared_noise_is_shared_across_timesteps(step):
    x, out = step_inputs()
    t = torch.tensor([[500, 480, 100], [300, 300, 300]])
    zeros = torch.zeros_like(x)
    latest = torch.tensor([[500] * 3, [300] * 3])
    shared = step(zeros, torch.zeros_like(out), t, t - 20, sharing="shared")
    wanted = noise_like(x, KEY, "shared", None, 0, step=latest)
    ratio = shared / wanted
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1, :1].expand_as(ratio), rtol=1e-5, atol=0)


@every_step
def test_a_prediction_without_variance_channels_and_any_strides(step):
    x, out = step_inputs()
    shuffled = x.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)
    expanded = torch.full((2, 1), 500).expand(2, 3)
    wanted = step(x, out, torch.full((2, 3), 500), torch.full((2, 3), 480))
    got = step(shuffled, out.transpose(3, 4).contiguous().transpose(3, 4), expanded, expanded - 20)
    assert got.is_contiguous()
    assert torch.equal(got, wanted)
    if step is not STEPS["ddpm"]:
        assert torch.equal(wanted, step(x, out[:, :, :4], torch.full((2, 3), 500), torch.full((2, 3), 480)))


@every_step
def test_a_16_bit_model_steps_float32_clips(step):
    x, out = step_inputs()
    low = out.bfloat16()
    got = step(x, low, T, T_PREV)
    assert got.dtype == torch.float32
    assert torch.equal(got, step(x, low.float(), T, T_PREV))


@every_step
@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 4, 0, 6)], ids=str)
def test_empty_clips(step, shape):
    x, out = step_inputs(shape=shape)
    t = torch.full(shape[:2], 500)
    assert step(x, out, t, t - 20).shape == shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_drawing_step
def test_a_step_does_not_synchronise(step, monkeypatch):
    x, out = (tensor.cuda() for tensor in step_inputs(guidance_scale=2.0))
    monkeypatch.setattr(SCHEDULE, "alphas_cumprod", SCHEDULE.alphas_cumprod.cuda())
    t, t_prev, key = T.cuda(), T_PREV.cuda(), KEY.cuda()
    with no_synchronisation():
        step(x, out, t, t_prev, hold=t > 900, guidance_scale=2.0, sharing="shared", key=key)


# ---- registration


def test_opcheck():
    x, out = step_inputs(guidance_scale=2.0)
    hold = torch.tensor([[True, False, False], [False, False, True]])
    table, vidkern, check = SCHEDULE.alphas_cumprod, torch.ops.vidkern, torch.library.opcheck
    noise = ("independent", None, 0)
    check(vidkern.ddim_step.default, (x, out, T, T_PREV, table, "v", 0.5, KEY, 2.0, hold, 1.0, *noise))
    check(vidkern.ddim_step.default, (x, out[:2], T, T_PREV, table, "v", 0.0, None, None, None, None, *noise))
    learned = ("epsilon", "learned_range")
    check(vidkern.ddpm_step.default, (x, out, T, T_PREV, table, *learned, KEY, 2.0, hold, None, *noise))
    check(vidkern.flow_step.default, (x, out, T, T_PREV, SCHEDULE.sigma, "flow", 2.0, hold, None))


@every_step
def test_compiles_once_for_every_size(step):
    def run(x, out, t, t_prev, hold):
        return step(x, out, t, t_prev, hold=hold, guidance_scale=2.0)

    def make(batch, frames, size):
        x, out = step_inputs(shape=(batch, frames, 4, size, size + 1), guidance_scale=2.0)
        t = torch.randint(21, 1000, (batch, frames))
        return x, out, t, t - 20, t > 900

    assert_compiles_once(run, make, [(7, 3, 10), (2, 9, 6), (3, 2, 5)])


@every_step
def test_a_backward_pass_raises(step):
    x, out = step_inputs()
    stepped = step(x.requires_grad_(), out, T, T_PREV)
    with pytest.raises(RuntimeError, match="no gradient: they are for inference"):
        stepped.sum().backward()


# ---- bad input

BAD = {
    "x_t type": ({"x_t": 1.0}, TypeError, "x_t must be a torch.Tensor, got float"),
    "x_t rank": ({"x_t": torch.rand(2, 3, 4)}, ValueError, r"x_t must be \(B, F, C, H, W\)"),
    "x_t dtype": ({"x_t": torch.ones(SHAPE, dtype=torch.int32)}, TypeError, r"x_t must be float32 or .*got int32"),
    "channels": (
        {"model_out": torch.rand(2, 3, 5, 5, 6)},
        ValueError,
        r"model_out must be \(B, F, C or 2C, H, W\) = .*, got \(2, 3, 5, 5, 6\)",
    ),
    "no doubled batch": ({"guidance_scale": 2.0}, ValueError, r"model_out must be \(2B, F, C or 2C, H, W\)"),
    "t shape": ({"t": torch.tensor([1, 2])}, ValueError, r"t must be \(B, F\) = \(2, 3\), got \(2,\)"),
    "t dtype": ({"t": T.float()}, TypeError, "t must be int64, got float32"),
    "t_prev dtype": ({"t_prev": T.int()}, TypeError, "t_prev must be int64, got int32"),
    "t device": ({"t": T.to("meta")}, ValueError, r"t must be on the device of x_t \(.*\), got meta"),
    "hold dtype": ({"hold": T}, TypeError, "hold must be bool, got int64"),
    "hold shape": ({"hold": T[:, :2] > 0}, ValueError, r"hold must be \(B, F\)"),
    "clip": ({"clip_x0": -1.0}, ValueError, "clip_x0 must be None or a positive number, got -1.0"),
    "schedule": ({"schedule": object()}, TypeError, "schedule must have a tensor .* got object without"),
    "schedule dtype": (
        {"schedule": SimpleNamespace(alphas_cumprod=torch.rand(9).double(), sigma=torch.rand(9).double())},
        TypeError,
        r"schedule\.\w+ must be float32, got float64",
    ),
    "prediction": ({"prediction": "noise"}, ValueError, "prediction must be one of .*got 'noise'"),
}


@pytest.mark.parametrize("operator", [ops.ddim_step, ops.ddpm_step, ops.flow_step])
@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(operator, changed, error, message):
    x, out = step_inputs()
    good = {"x_t": x, "model_out": out, "t": T, "t_prev": T_PREV, "schedule": SCHEDULE}
    if operator is ops.ddpm_step:
        good["key"] = KEY
    with pytest.raises(error, match=message):
        operator(**{**good, **changed})


def test_bad_noise_arguments_are_refused():
    x, out = step_inputs()
    args = (x, out, T, T_PREV, SCHEDULE)
    with pytest.raises(ValueError, match=r"key must be given where eta > 0, got None with eta = 0\.5"):
        ops.ddim_step(*args, eta=0.5)
    with pytest.raises(ValueError, match=r"eta must be between 0 and 1, got 2\.0"):
        ops.ddim_step(*args, eta=2.0, key=KEY)
    with pytest.raises(ValueError, match="sharing must be one of"):
        ops.ddim_step(*args, eta=0.5, key=KEY, sharing="all")
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got NoneType"):
        ops.ddpm_step(*args, key=None)
    with pytest.raises(ValueError, match=r"variance must be one of .*got 'learned'"):
        ops.ddpm_step(*args, key=KEY, variance="learned")
    with pytest.raises(ValueError, match="model_out must have 2C = 8 channels with variance='learned_range', got 4"):
        ops.ddpm_step(x, out[:, :, :4], T, T_PREV, SCHEDULE, key=KEY)

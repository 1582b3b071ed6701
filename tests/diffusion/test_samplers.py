import functools
import itertools

import pytest
import torch
from diffusers import DDIMScheduler

from tests.diffusion.common import Network, NoHostTraffic
from vidkern import ops
from vidkern.diffusion import (
    given_frames,
    image_to_video,
    interpolation,
    long_video,
    make_schedule,
    next_frame,
    progressive,
    respace,
    sample,
    sample_long_video,
    standard,
    transition,
)

B, F, C, H, W = 2, 6, 2, 4, 4
SHAPE = (B, F, C, H, W)
KEY = torch.tensor([11, 5])
LINEAR = make_schedule("linear")
FLOW = make_schedule("flow")
KNOWN = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
NETWORK = Network(C)
TASKS = {
    "image-to-video": (image_to_video, [0]),
    "interpolation": (interpolation, [0, 5]),
    "long-video": (functools.partial(long_video, given=2), [0, 1]),
    "given-frames": (functools.partial(given_frames, index=[2, -1]), [2, 5]),
    "transition": (functools.partial(transition, first=2, last=1), [0, 1, 5]),
    "next-frame": (next_frame, [0, 1, 2, 3, 4]),
    "progressive": (functools.partial(progressive, ramp=3), [0]),
}
SAMPLERS = {
    "ddim": {"schedule": LINEAR},
    "ddim-eta": {"schedule": LINEAR, "eta": 1.0},
    "ddpm": {"schedule": LINEAR, "sampler": "ddpm"},
    "flow": {"schedule": FLOW, "sampler": "flow", "prediction": "flow"},
}


class Spy:
    """Calls the network and keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y=None):
        self.calls.append((x.clone(), t.clone(), y))
        return NETWORK(x, t, y)


def test_ddim_agrees_with_diffusers():
    theirs = DDIMScheduler(num_train_timesteps=100, beta_schedule="linear", clip_sample=False)
    theirs.set_timesteps(100)
    x = ops.philox_normal(SHAPE, KEY)
    for t in theirs.timesteps:
        with torch.no_grad():
            out = NETWORK(x, t.expand(B))[:, :, :C]
        x = theirs.step(out, t, x).prev_sample
    schedule = make_schedule("linear", num_steps=100, beta_start=1e-5, beta_end=0.002)  # diffusers has no 1000 / T
    torch.testing.assert_close(sample(NETWORK, SHAPE, schedule, KEY, num_steps=100), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_ddim_with_guidance_in_float64(prediction):
    """Fifty respaced steps: x' = sqrt(bar') x_0 + sqrt(1 - bar') epsilon, with guided outputs."""
    y, scale = torch.tensor([1, 4]), 2.5
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    steps = [*reversed(respace(1000, "50").tolist()), -1]
    x = ops.philox_normal(SHAPE, KEY).double()
    for now, then in itertools.pairwise(steps):
        t = torch.full((B, F), now)
        with torch.no_grad():
            cond, null = (NETWORK(x, t, c)[:, :, :C] for c in (y, torch.full_like(y, 9)))
        out = null + scale * (cond - null)
        alpha, sigma = bar[now].sqrt(), (1 - bar[now]).sqrt()
        x0 = {"epsilon": (x - sigma * out) / alpha, "v": alpha * x - sigma * out, "x0": out}[prediction]
        bar_then = bar[then] if then >= 0 else torch.tensor(1.0, dtype=torch.float64)
        x = bar_then.sqrt() * x0 + (1 - bar_then).sqrt() * (x - alpha * x0) / sigma
    options = {"y": y, "y_null": 9, "cfg_scale": scale, "prediction": prediction}
    ours = sample(NETWORK, SHAPE, LINEAR, KEY, **options)
    torch.testing.assert_close(ours.double(), x, rtol=1e-4, atol=1e-4)
    null = {**options, "y_null": torch.tensor([9, 9])}
    assert torch.equal(sample(NETWORK, SHAPE, LINEAR, KEY, **null), ours)


def test_the_model_gets_both_conditions_in_one_batch():
    spy = Spy()
    sample(spy, SHAPE, LINEAR, KEY, num_steps=2, y=torch.tensor([1, 4]), y_null=9, cfg_scale=2.0)
    assert len(spy.calls) == 2
    x, t, y = spy.calls[0]
    assert x.shape == (2 * B, F, C, H, W)
    assert torch.equal(x[:B], x[B:])
    assert t.shape == (2 * B, F)
    assert y.tolist() == [1, 4, 9, 9]


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(("task", "held"), TASKS.values(), ids=TASKS)
def test_given_frames_are_held_exactly_and_the_others_are_not(task, held, options):
    spy = Spy()
    out = sample(spy, SHAPE, key=KEY, task=task, known=KNOWN, num_steps=4, **options)
    free = [f for f in range(F) if f not in held]
    assert torch.equal(out[:, held], KNOWN[:, held])
    assert (out[:, free] - KNOWN[:, free]).abs().amax((2, 3, 4)).min() > 1e-2
    assert out.isfinite().all()
    for x, t, _ in spy.calls:
        assert torch.equal(x[:, held], KNOWN[:, held])
        assert (t[:, held] == 0).all()


def test_every_frame_has_the_timestep_of_its_task():
    spy = Spy()
    sample(spy, SHAPE, LINEAR, KEY, task=image_to_video, known=KNOWN, num_steps=5)
    assert [t[0].tolist() for _, t, _ in spy.calls] == [[0] + [u] * 5 for u in (999, 749, 500, 250, 0)]


def test_given_frames_change_the_others():
    other = KNOWN.clone()
    other[:, 0] += 1

    def model(x, t):
        return NETWORK(x, t) + 0.1 * x.mean(1, keepdim=True).repeat(1, 1, 2, 1, 1)

    a, b = (sample(model, SHAPE, LINEAR, KEY, task=image_to_video, known=k, num_steps=4) for k in (KNOWN, other))
    assert (a[:, 1:] - b[:, 1:]).abs().min() > 1e-4


def test_progressive_starts_from_the_noised_first_frame():
    spy = Spy()
    sample(spy, SHAPE, LINEAR, KEY, task=functools.partial(progressive, ramp=3), known=KNOWN, num_steps=5)
    x, t, _ = spy.calls[0]
    assert t[0].tolist() == [0, 333, 666, 999, 999, 999]
    alpha, sigma = (v[:, 1:, None, None, None] for v in LINEAR.coefficients(t))
    expected = alpha * KNOWN[:, :1] + sigma * ops.philox_normal(SHAPE, KEY)[:, 1:]
    torch.testing.assert_close(x[:, 1:], expected)


def test_a_frame_rests_until_its_timestep_falls():
    def staircase(t, frames):
        tau, hold = standard(t, frames)
        tau[:, 1] = tau[:, 1].clamp(max=600)
        return tau, hold

    spy = Spy()
    sample(spy, SHAPE, LINEAR, KEY, task=staircase, known=KNOWN, num_steps=5)
    xs = [x for x, _, _ in spy.calls]
    assert torch.equal(xs[0][:, 1], xs[1][:, 1])  # 999 and 749 are both 600
    assert not torch.equal(xs[0][:, 0], xs[1][:, 0])
    assert not torch.equal(xs[1][:, 1], xs[2][:, 1])


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_a_clip_does_not_depend_on_the_batch_split(options):
    # a network of products only: matrix products may round differently when the batch is split
    run = functools.partial(sample, lambda x, t: torch.cat([0.9 * x, -0.3 * x], 2), key=KEY, num_steps=4, **options)
    whole = run(shape=(5, F, C, H, W))
    parts = [run(shape=(2, F, C, H, W)), run(shape=(3, F, C, H, W), sample_offset=2)]
    assert torch.equal(torch.cat(parts), whole)
    assert (whole[0] - whole[1]).abs().max() > 1e-2
    assert torch.equal(run(shape=(5, F, C, H, W)), whole)
    other = functools.partial(run, key=torch.tensor([12, 5]))
    assert (other(shape=(5, F, C, H, W)) - whole).abs().max() > 1e-2


def test_shared_noise_gives_equal_frames():
    """The network treats frames alike, so frames that share the start and every step's noise stay equal."""
    options = {"sampler": "ddpm", "num_steps": 4, "sharing": "shared"}
    out = sample(NETWORK, SHAPE, LINEAR, KEY, step_sharing="shared", **options)
    assert torch.equal(out, out[:, :1].expand_as(out))
    out = sample(NETWORK, SHAPE, LINEAR, KEY, **options)
    assert not torch.equal(out[:, 0], out[:, 1])


def test_a_start_can_be_given():
    start = ops.philox_normal(SHAPE, KEY)
    assert torch.equal(
        sample(NETWORK, start, LINEAR, KEY, num_steps=3), sample(NETWORK, SHAPE, LINEAR, KEY, num_steps=3)
    )


def test_predicted_x0_is_bounded():
    out = sample(NETWORK, SHAPE, LINEAR, KEY, num_steps=10, clip_x0=0.5)
    assert out.abs().max() <= 0.5
    assert sample(NETWORK, SHAPE, LINEAR, KEY, num_steps=10).abs().max() > 0.5


def test_long_video_chains_windows():
    spy, window = Spy(), (B, 16, C, 2, 2)
    video = sample_long_video(spy, window, LINEAR, KEY, chunks=15, num_steps=2)
    assert video.shape == (B, 128, C, 2, 2)
    assert len(spy.calls) == 30
    for chunk in range(1, 15):
        for x, t, _ in spy.calls[2 * chunk : 2 * chunk + 2]:
            assert torch.equal(x[:, :8], video[:, 8 * chunk : 8 * chunk + 8])
            assert (t[:, :8] == 0).all()
    starts = torch.stack([spy.calls[2 * chunk][0][:, 8:] for chunk in range(15)]).flatten(1)
    assert (torch.corrcoef(starts) - torch.eye(15)).abs().max() < 0.5  # every chunk has its own noise (128 numbers)


def test_long_video_from_a_known_window():
    done = []
    video = sample_long_video(
        NETWORK, SHAPE, LINEAR, KEY, chunks=3, given=5, num_steps=2, first=KNOWN, progress=lambda *p: done.append(p)
    )  # fmt: skip
    assert video.shape == (B, 8, C, H, W)
    assert torch.equal(video[:, :6], KNOWN)
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_no_host_traffic_between_the_first_call_and_the_last_step():
    schedules = {"ddim": LINEAR, "ddpm": LINEAR, "flow": FLOW}
    for sampler, schedule in schedules.items():
        watch, steps = NoHostTraffic(), []

        def model(x, t, y, watch=watch, steps=steps):
            if not steps:
                watch.__enter__()
            steps.append(t)
            return NETWORK(x, t, y)

        def progress(step, total, watch=watch):
            if step == total:
                watch.__exit__(None, None, None)

        out = sample(
            model, SHAPE, schedule, KEY, sampler=sampler, prediction="flow" if sampler == "flow" else "epsilon",
            task=image_to_video, known=KNOWN, num_steps=3, progress=progress,
            y=torch.tensor([1, 2]), y_null=3, cfg_scale=2.0,
        )  # fmt: skip
        assert len(steps) == 3
        assert out.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_no_synchronisation_on_cuda(options):
    schedule, network = options["schedule"].to("cuda"), Network(C).cuda()
    run = functools.partial(sample, shape=SHAPE, key=KEY.cuda(), num_steps=4, **{**options, "schedule": schedule})
    run(network)  # compiles and allocates

    def model(x, t):
        torch.cuda.set_sync_debug_mode("error")
        return network(x, t)

    def progress(step, total):
        if step == total:
            torch.cuda.set_sync_debug_mode("default")

    try:
        run(model, progress=progress)
    finally:
        torch.cuda.set_sync_debug_mode("default")


MEANS = torch.tensor([[1.5, -0.5], [-1.0, 0.75], [0.25, 2.0]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
STD = 0.3


def mixture(schedule, prediction):
    """The exact network of a Gaussian mixture in the plane: its posterior mean of x_0 is known at every level."""

    def model(x, t):
        alpha, sigma = (v[:, :, None, None, None, None] for v in schedule.coefficients(t))
        means = MEANS[:, :, None, None]  # offsets below are (B, F, components, 2, 1, 1)
        variance = alpha**2 * STD**2 + sigma**2
        offset = x[:, :, None] - alpha * means
        logits = WEIGHTS.log()[:, None, None, None] - (offset**2).sum(3, keepdim=True) / (2 * variance)
        x0 = (torch.softmax(logits, 2) * (means + alpha * STD**2 / variance * offset)).sum(2)
        alpha, sigma = alpha[:, :, 0], sigma[:, :, 0]
        noise = (x - alpha * x0) / sigma
        out = {"epsilon": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0, "x0": x0}[prediction]
        return torch.cat([out, torch.zeros_like(out)], 2)

    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"num_steps": 100}),
        ("linear", {"num_steps": 250, "eta": 1.0, "prediction": "v"}),
        ("linear", {"num_steps": 250, "sampler": "ddpm"}),
        ("cosine", {"num_steps": 100, "prediction": "x0"}),
        ("sde", {"num_steps": 250, "sampler": "ddpm", "prediction": "x0", "variance": "fixed_small"}),
        ("flow", {"num_steps": 100, "sampler": "flow", "prediction": "flow"}),
    ],
)
def test_a_mixture_of_gaussians_is_reached(name, options):
    schedule = make_schedule(name)
    model = mixture(schedule, options.get("prediction", "epsilon"))
    points = sample(model, (500, 8, 2, 1, 1), schedule, KEY, **options).reshape(-1, 2)
    nearest = torch.cdist(points, MEANS).argmin(1)
    for k in range(3):
        cluster = points[nearest == k]
        assert abs(len(cluster) / len(points) - WEIGHTS[k]) < 0.03
        assert (cluster.mean(0) - MEANS[k]).abs().max() < 0.04
        assert (cluster.std(0) - STD).abs().max() < 0.03


def test_refuses():
    run = functools.partial(sample, NETWORK, SHAPE, LINEAR, KEY)
    with pytest.raises(ValueError, match=r"sampler must be .* got 'euler'"):
        run(sampler="euler")
    with pytest.raises(ValueError, match=r"schedule must fit sampler 'flow', got 'linear'"):
        run(sampler="flow")
    with pytest.raises(ValueError, match=r"schedule must fit sampler 'ddim', got 'flow'"):
        sample(NETWORK, SHAPE, FLOW, KEY)
    with pytest.raises(ValueError, match=r"shape must be \(B, F, C, H, W\), got \(2, 3\)"):
        sample(NETWORK, (2, 3), LINEAR, KEY)
    with pytest.raises(ValueError, match=r"known must hold the given frames"):
        run(task=image_to_video)
    with pytest.raises(ValueError, match=r"known must be torch\.float32 of shape .* got torch\.float64"):
        run(task=image_to_video, known=KNOWN.double())
    with pytest.raises(ValueError, match=r"cfg_scale needs y and y_null"):
        run(cfg_scale=2.0, y=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"y must have 2 samples first, got shape \(3,\)"):
        run(y=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"count must be .* got 1001"):
        run(num_steps=1001)
    with pytest.raises(ValueError, match=r"chunks must be at least 1, got 0"):
        sample_long_video(NETWORK, SHAPE, LINEAR, KEY, chunks=0)
    with pytest.raises(ValueError, match=r"given must be from 1 to 5, .* got 6"):
        sample_long_video(NETWORK, SHAPE, LINEAR, KEY, given=6)

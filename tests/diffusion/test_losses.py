import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.diffusion.common import Network, NoHostTraffic
from vidkern import ops
from vidkern.diffusion import diffusion_loss, image_to_video, make_schedule, sample_timesteps

B, F, C, H, W = 4, 5, 4, 6, 6
KEY = torch.tensor([7, 3])
LINEAR = make_schedule("linear")
TIMESTEPS = {
    "clip": torch.tensor([0, 1, 500, 999]),
    "all first": torch.zeros(B, dtype=torch.int64),
    "frame": torch.tensor([[0, 3, 40, 999, 1], [500, 0, 0, 7, 998], [1, 1, 1, 1, 1], [20, 30, 40, 50, 60]]),
}


def clips(seed=0):
    """Values in [-1, 1] with both ends present, where the decoder's bins are open."""
    x = 2.6 * torch.rand(B, F, C, H, W, generator=torch.Generator().manual_seed(seed)) - 1.3
    return x.clamp(-1, 1)


def table(t, column):
    return column[t][:, :, None, None, None]


def exact_terms(out, x0, t, noise, prediction, channels=C):
    """Mse and vb of each frame, in float64 by the textbook: Gaussian products, torch's KL, the tanh CDF."""
    t = t if t.dim() == 2 else t[:, None].expand(-1, F)
    out, x0, noise = out.double(), x0.double(), noise.double()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    alpha, sigma = table(t, bar.sqrt()), table(t, (1 - bar).sqrt())
    x_t = alpha * x0 + sigma * noise
    pred, fraction = out[:, :, :channels], (out[:, :, channels:] + 1) / 2
    target = {"epsilon": noise, "v": alpha * noise - sigma * x0, "x0": x0}[prediction]
    mse = ((pred - target) ** 2).mean((2, 3, 4))

    frozen = pred.detach()
    guess = {"epsilon": (x_t - sigma * frozen) / alpha, "v": alpha * x_t - sigma * frozen, "x0": frozen}[prediction]
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = betas * (1 - before) / (1 - bar)
    variance[0] = variance[1]
    to_x0, to_xt = betas * before.sqrt() / (1 - bar), (1 - betas).sqrt() * (1 - before) / (1 - bar)
    true_mean = table(t, to_x0) * x0 + table(t, to_xt) * x_t
    mean = table(t, to_x0) * guess + table(t, to_xt) * x_t
    std = torch.exp(0.5 * (fraction * table(t, betas).log() + (1 - fraction) * table(t, variance).log()))
    kl = kl_divergence(Normal(true_mean, table(t, variance).sqrt()), Normal(mean, std))

    def cdf(x):
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    above, below = cdf((x0 - mean + 1 / 255) / std), cdf((x0 - mean - 1 / 255) / std)
    above, below = above.masked_fill(x0 > 0.999, 1), below.masked_fill(x0 < -0.999, 0)
    nll = -(above - below).clamp(min=1e-12).log()
    vb = torch.where(t[:, :, None, None, None] == 0, nll, kl).mean((2, 3, 4)) / math.log(2)
    return mse, vb


def wave(*shape, step):
    """Sines of whole numbers: the same values everywhere."""
    n = torch.Size(shape).numel()
    return torch.sin(step * torch.arange(n, dtype=torch.float64)).reshape(shape).float()


@pytest.mark.parametrize(
    ("t", "recorded"),
    [
        (torch.tensor([0, 1, 20, 999]), [1.2644993, 0.14520268, 0.0083765062, 0.0018544534]),
        (
            torch.tensor([[1, 500, 999], [7] * 3, [900, 30, 2], [0] * 3]),
            [0.05194563, 0.022359181, 0.026280235, 1.2346176],
        ),
    ],
    ids=["latte", "fvdm"],
)
def test_vb_is_the_public_codes(t, recorded):
    """The released training_losses of Latte (t of a clip) and FVDM (t of a frame) gave these numbers for each clip.

    They had other noise; the bound depends on it only through the prediction's error.
    """
    x0 = (1.2 * wave(4, 3, 2, 4, 4, step=0.7)).clamp(-1, 1)
    pred = ops.philox_normal(x0.shape, KEY) + 0.5 * wave(4, 3, 2, 4, 4, step=2.3)
    out = torch.cat([pred, wave(4, 3, 2, 4, 4, step=0.31)], dim=2)
    tau = t if t.dim() == 2 else t[:, None].expand(4, 3)
    _, vb = ops.hybrid_loss(out, x0, *LINEAR.coefficients(tau), tau, LINEAR, KEY)
    torch.testing.assert_close(vb.mean(1), torch.tensor(recorded), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("pattern", TIMESTEPS)
def test_hybrid_loss_and_gradients_in_float64(prediction, pattern):
    model, x0, t = Network(C), clips(), TIMESTEPS[pattern]
    noise = ops.philox_normal(x0.shape, KEY, dtype=torch.float32)
    tau = t if t.dim() == 2 else t[:, None].expand(-1, F)
    alpha, sigma = (v[:, :, None, None, None] for v in LINEAR.coefficients(tau))
    mse, vb = exact_terms(model(alpha * x0 + sigma * noise, t), x0, t, noise, prediction)
    expected = torch.autograd.grad((mse + vb).mean(), list(model.parameters()))

    terms = diffusion_loss(model, x0, t, LINEAR, KEY, prediction=prediction)
    grads = torch.autograd.grad(terms["loss"], list(model.parameters()))
    for got, wanted in (
        (terms["loss"], (mse + vb).mean()),
        (terms["mse"], mse.mean()),
        (terms["vb"], vb.mean()),
        (terms["per_frame"], mse + vb),
        *zip(grads, expected, strict=True),
    ):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    assert terms["loss"].dtype == terms["per_frame"].dtype == torch.float32


def test_flow_loss():
    schedule, model, x0 = make_schedule("flow"), Network(C, learned_range=False), clips()
    t = TIMESTEPS["frame"]
    sigma = ((t + 1) / 1000)[:, :, None, None, None].double()
    noise = ops.philox_normal(x0.shape, KEY, dtype=torch.float32).double()
    velocity = model((1 - sigma) * x0 + sigma * noise, t)
    expected = ((velocity - (noise - x0)) ** 2).mean((2, 3, 4))
    terms = diffusion_loss(model, x0, t, schedule, KEY, prediction="flow", learned_range=False)
    torch.testing.assert_close(terms["per_frame"].double(), expected, rtol=1e-5, atol=1e-6)
    assert terms["vb"] == 0


def test_the_mean_gets_no_gradient_from_vb():
    x0, t = clips(), TIMESTEPS["frame"]
    out = torch.randn(B, F, 2 * C, H, W, generator=torch.Generator().manual_seed(1)).tanh().requires_grad_()
    hybrid = torch.autograd.grad(diffusion_loss(lambda x, t: out, x0, t, LINEAR, KEY)["loss"], out)[0]
    pred = out.detach()[:, :, :C].clone().requires_grad_()
    plain = diffusion_loss(lambda x, t: pred, x0, t, LINEAR, KEY, learned_range=False)["loss"]
    assert torch.equal(hybrid[:, :, :C], torch.autograd.grad(plain, pred)[0])
    assert hybrid[:, :, C:].abs().amin((2, 3, 4)).min() > 0


def test_given_frames_enter_clean_and_do_not_count():
    x0 = clips()
    t, hold = image_to_video(torch.tensor([3, 300, 600, 999]), F)
    seen, changed = [], Network(C)

    def model(x, t, spoil=0.0):
        seen.append((x, t))
        return changed(x, t) + spoil * hold[:, :, None, None, None]

    terms = diffusion_loss(model, x0, t, LINEAR, KEY, hold=hold)
    x_t, told = seen[0]
    assert torch.equal(x_t[hold], x0[hold])
    assert not torch.equal(x_t[~hold], x0[~hold])
    assert torch.equal(told, t)
    torch.testing.assert_close(terms["loss"], terms["per_frame"][~hold].mean())
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    spoilt = diffusion_loss(lambda x, t: model(x, t, spoil=0.5), x0, t, LINEAR, KEY, hold=hold)
    assert torch.equal(spoilt["loss"], terms["loss"])


def test_shared_noise_reaches_the_model():
    seen = []

    def model(x, t):
        seen.append(x)
        return Network(C)(x, t)

    x0 = clips()[:, :1].expand(B, F, C, H, W).contiguous()
    diffusion_loss(model, x0, torch.full((B,), 400), LINEAR, KEY, sharing="shared")
    assert torch.equal(seen[0], seen[0][:, :1].expand_as(x0))
    diffusion_loss(model, x0, torch.full((B,), 400), LINEAR, KEY)
    assert not torch.equal(seen[1][:, 0], seen[1][:, 1])


def test_the_loss_does_not_depend_on_the_batch_split():
    model, x0, t = Network(C), clips(), TIMESTEPS["frame"]
    whole = diffusion_loss(model, x0, t, LINEAR, KEY)["per_frame"]
    part = diffusion_loss(model, x0[2:], t[2:], LINEAR, KEY, sample_offset=2)["per_frame"]
    torch.testing.assert_close(part, whole[2:], rtol=1e-6, atol=0)


def test_min_snr_weights_make_every_prediction_the_clamped_x0_loss():
    """One guess of x_0, written as epsilon, v, flow and x_0, has one loss: min(snr, 5) * (guess - x_0)^2."""
    x0, guess, t = clips(0), clips(1), torch.tensor([5, 100, 400, 990])
    tau = t[:, None].expand(B, F)
    a, s = (v[:, :, None, None, None].double() for v in LINEAR.coefficients(tau))
    noise = ops.philox_normal(x0.shape, KEY, dtype=torch.float32).double()
    x_t = a * x0 + s * noise
    epsilon = (x_t - a * guess) / s
    wanted = ((a / s) ** 2).clamp(max=5)[:, :, 0, 0, 0] * ((guess.double() - x0) ** 2).mean((2, 3, 4))
    outs = {"epsilon": epsilon, "v": a * epsilon - s * guess, "flow": epsilon - guess, "x0": guess}
    for prediction, out in outs.items():
        terms = diffusion_loss(
            lambda x, t, out=out: out.float(), x0, t, LINEAR, KEY,
            prediction=prediction, learned_range=False, min_snr=5.0,
        )  # fmt: skip
        torch.testing.assert_close(terms["per_frame"].double(), wanted, rtol=1e-4, atol=1e-7)


def test_bfloat16_model_output_under_autocast():
    x0, t, model = clips(), TIMESTEPS["frame"], Network(C)
    exact = diffusion_loss(model, x0, t, LINEAR, KEY)
    terms = diffusion_loss(lambda x, t: model(x, t).bfloat16(), x0, t, LINEAR, KEY)
    assert terms["loss"].dtype == torch.float32
    torch.testing.assert_close(terms["mse"], exact["mse"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("learned_range", [True, False], ids=["hybrid", "mse"])
def test_a_training_step_stores_nothing_of_the_noise(learned_range):
    """Beside what the model keeps, one tensor of its output's size (the gradient's factors) and numbers per frame."""
    model, x0 = Network(C, learned_range), clips()

    def kept(loss):
        saved = []

        def keep(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        return value, sorted(tensor.numel() for tensor in saved if tensor.numel() > 4 * B * F)

    output, of_the_model = kept(lambda: model(x0, TIMESTEPS["frame"]))
    terms, of_the_step = kept(
        lambda: diffusion_loss(
            model, x0, TIMESTEPS["frame"], LINEAR, KEY, sharing="shared", learned_range=learned_range
        )
    )
    assert of_the_step == sorted([*of_the_model, output.numel()])
    terms["loss"].backward()


def test_no_host_traffic_in_a_training_step():
    model, x0 = Network(C), clips()
    schedule, y = make_schedule("linear"), torch.arange(B)
    generator = torch.Generator().manual_seed(0)
    with NoHostTraffic():
        t = sample_timesteps(B, F, 1000, mode="ptss", generator=generator)
        terms = diffusion_loss(model, x0, t, schedule, KEY, y=y, min_snr=5.0)
        terms["loss"].backward()
        t, hold = image_to_video(sample_timesteps(B, F, 1000, generator=generator), F)
        diffusion_loss(model, x0, t, schedule, KEY, y=y, hold=hold)["loss"].backward()
    assert model.weight.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_synchronisation_on_cuda():
    model, x0, key = Network(C).cuda(), clips().cuda(), KEY.cuda()
    schedule, generator = make_schedule("linear", device="cuda"), torch.Generator("cuda").manual_seed(0)

    def step():
        t = sample_timesteps(B, F, 1000, mode="ptss", generator=generator)
        diffusion_loss(model, x0, t, schedule, key)["loss"].backward()

    step()  # compiles and allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_whole_and_once():
    model, schedule = Network(C), make_schedule("linear")
    torch._dynamo.reset()

    def loss(x0, t, key):
        return diffusion_loss(model, x0, t, schedule, key)["loss"]

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (b, f) in enumerate(((3, 5), (5, 7), (7, 3))):  # no size equal to another one: dynamo would tie the two
        x0, t = torch.rand(b, f, C, H, W), sample_timesteps(b, f, 1000, mode="frame")
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(x0, t, KEY), loss(x0, t, KEY), rtol=1e-6, atol=0)


def test_refuses():
    x0, t, model = clips(), TIMESTEPS["clip"], Network(C)
    with pytest.raises(ValueError, match=r"prediction must be .* got 'noise'"):
        diffusion_loss(model, x0, t, LINEAR, KEY, prediction="noise")
    with pytest.raises(ValueError, match=r"learned_range needs .* got 'flow'"):
        diffusion_loss(model, x0, t, make_schedule("flow"), KEY, prediction="flow")
    with pytest.raises(ValueError, match="x0 must not require a gradient"):
        diffusion_loss(model, clips().requires_grad_(), t, LINEAR, KEY)
    with pytest.raises(ValueError, match=r"model must return shape \(4, 5, 4, 6, 6\), got \(4, 5, 8, 6, 6\)"):
        diffusion_loss(model, x0, t, LINEAR, KEY, learned_range=False)

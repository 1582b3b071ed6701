"""The noise operators: the generator's bits, accuracy and statistics; forward diffusion and its loss."""

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import philox_oracle
from tests.ops.common import KERNEL_DTYPES, assert_compiles_once, assert_contract, no_synchronisation
from vidkern import ops
from vidkern.ops import noise
from vidkern.ops.noise import generator

KEY = torch.tensor([20261121, 7])
SHARING = [("independent", None), ("shared", None), ("mixed", 0.3), ("progressive", 0.6)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
every_sharing = pytest.mark.parametrize(("sharing", "base_weight"), SHARING, ids=[mode for mode, _ in SHARING])
every_prediction = pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "x0"])
every_target = pytest.mark.parametrize("target", [None, "epsilon", "v", "flow"])


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


# ---- the generator


# Random123 1.09's known answers for philox4x32 with 10 rounds: counter, key, result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert tuple(int(word) for word in generator.philox4x32(words(*counter), words(*key))) == answer
    assert philox_oracle.philox4x32_10(counter, key) == answer


@pytest.mark.parametrize("key", [(0, 0), (-1, 1), (2**63 - 1, 2**63 - 1), (-(2**63), -5), (12, 2**40 + 3)])
def test_key_folds_modulo_2_to_the_64(key):
    folded = (key[0] + key[1] * 0x9E3779B97F4A7C15) % 2**64
    low, high = generator.philox_key(torch.tensor(key))
    assert (int(low), int(high)) == (folded % 2**32, folded >> 32)


@pytest.mark.parametrize("key", [(3, 0), (-17, 2**35 + 1)])
@pytest.mark.parametrize("sample_offset", [0, 1000, 2**32 - 2])
def test_every_number_is_the_one_that_its_counter_says(key, sample_offset):
    noise = ops.philox_normal((2, 3, 2, 5), torch.tensor(key), sample_offset=sample_offset)
    for b, f, e in np.ndindex(2, 3, 10):
        wanted = philox_oracle.normal(*key, sample_offset + b, f, e)
        assert noise[b, f].flatten()[e].item() == pytest.approx(wanted, abs=2e-6)


def test_the_bits_never_change():
    """Noise that was drawn with an earlier version must be drawn again by this one."""
    noise = ops.philox_normal((1, 2, 5), torch.tensor([1234, 5678]), sample_offset=9)
    assert [value & 0xFFFFFFFF for value in bits(noise).flatten().tolist()] == [
        0x3F47ABFE,
        0x3F5C88D9,
        0xBFE9AD3A,
        0x3E5C8981,
        0xBEFEC88A,
        0xBF18959A,
        0x3D229BE9,
        0xBFA310B6,
        0x3FC160E4,
        0x3F55B109,
    ]


def test_readme_has_the_coefficients():
    """Other backends are written from README.md."""
    text = (Path(noise.__file__).parent / "README.md").read_text()
    for name in ("LOG", "SIN", "COS"):
        (line,) = re.findall(rf"^    {name}  (.*)$", text, flags=re.MULTILINE)
        wanted = torch.tensor(getattr(generator, name), dtype=torch.float32)
        assert torch.equal(bits(wanted), torch.tensor([int(word, 16) for word in line.split()]).int())
        assert wanted.double().tolist() == list(getattr(generator, name))


def test_bits_are_those_of_an_independent_writing():
    torch.manual_seed(0)
    p, q = torch.randint(2**32, (2, 2**18))
    p[: 2**12] >>= torch.arange(2**12) % 32  # the tail, which random words hardly reach
    p[:4] = torch.tensor([0, 1, 2**31 - 1, 2**32 - 1])
    wanted = philox_oracle.box_muller(*(word.cpu().numpy().astype(np.uint32) for word in (p, q)))
    for ours, theirs in zip(generator.box_muller(p, q), wanted, strict=True):
        assert torch.equal(bits(ours), bits(torch.tensor(theirs)))


def test_sqrt_is_correctly_rounded():
    x = torch.rand(2**18) * 45
    assert np.array_equal(generator.sqrt(x).cpu().numpy(), np.sqrt(x.cpu().numpy()))


def test_radius_is_accurate_over_its_range():
    """README.md states 5.8e-7 over all words; here every exponent with the ends and a sample of its fractions."""
    exponents = torch.arange(31)
    fractions = torch.cat([torch.arange(64), torch.randint(2**23, (4000,)), 2**23 - 1 - torch.arange(64)])
    word = (((1 << 23) + fractions)[:, None] << 8 >> (31 - exponents)).flatten()
    scaled = ((word & 0x7FFFFFFF) | 1).to(torch.float32).double()
    exact = (-2 * (scaled.log() - 31 * np.log(2))).clamp(min=0).sqrt()
    error = (generator.radius(word).double() - exact).abs()
    assert error.max() < 6e-7
    assert generator.radius(torch.tensor([0])).item() == pytest.approx(np.sqrt(62 * np.log(2)), rel=1e-6)
    assert generator.radius(torch.tensor([0x7FFFFFFF])).item() == 0.0


def test_direction_is_accurate_for_every_word():
    word = torch.arange(2**23)
    cosine, sine = generator.direction(word)
    angle = np.pi * (word.double() / 2**23 - 0.5)
    assert (cosine.double() - angle.cos()).abs().max() < 2e-7
    assert (sine.double() - angle.sin()).abs().max() < 2e-7
    opposite = generator.direction(word[::97] + 2**31)
    assert torch.equal(opposite[0], -cosine[::97])
    assert torch.equal(opposite[1], -sine[::97])


def test_normals_are_within_2e_6_of_exact_box_muller():
    torch.manual_seed(0)
    radius_word, angle_word = torch.randint(2**32, (2, 2**18))
    radius_word[:4096] >>= torch.arange(4096) % 32  # the tail, which random words hardly reach
    u = ((radius_word & 0x7FFFFFFF) | 1).to(torch.float32).double() / 2**31
    angle = np.pi * ((angle_word & 0x7FFFFF).double() / 2**23 - 0.5 + (angle_word >> 31))
    distance = (-2 * u.log()).sqrt()
    cosine, sine = generator.box_muller(radius_word, angle_word)
    for ours, exact in ((cosine, distance * angle.cos()), (sine, distance * angle.sin())):
        assert (ours.double() - exact).abs().max() < 2e-6


# ---- its statistics


@pytest.fixture(scope="module")
def draws() -> Tensor:
    """(4, 16, 2^14): a million numbers."""
    return ops.philox_normal((4, 16, 4, 64, 64), KEY).flatten(2).double().cpu()


def test_moments_to_order_4(draws):
    n = draws.numel()
    for order, (wanted, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(draws.pow(order).mean().item() - wanted) < 4 * np.sqrt(variance / n), f"moment {order}"


def test_kolmogorov_smirnov(draws):
    assert scipy.stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    for lane in range(4):
        assert scipy.stats.kstest(draws[..., lane::4].flatten().numpy(), "norm").pvalue > 1e-3


def test_chi_square_of_values_and_of_neighbours(draws):
    quantile = scipy.stats.norm.cdf(draws.flatten().numpy())
    counts = np.bincount((quantile * 1024).astype(int), minlength=1024)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    cell = (quantile * 32).astype(int)
    for distance in (1, 2, 4):
        pairs = np.bincount(cell[:-distance:4] * 32 + cell[distance::4][: len(cell[:-distance:4])], minlength=1024)
        assert scipy.stats.chisquare(pairs).pvalue > 1e-3, f"numbers {distance} apart"


def test_nothing_is_correlated(draws):
    shape, plain = (4, 16, 4, 64, 64), draws
    others = {
        "lanes": (plain[..., 0::4], plain[..., 1::4]),
        "cosine and sine squared": (plain[..., 0::4] ** 2, plain[..., 1::4] ** 2),
        "groups": (plain[..., :-4], plain[..., 4:]),
        "frames": (plain[:, :-1], plain[:, 1:]),
        "samples": (plain[:-1], plain[1:]),
        "seeds": (plain, ops.philox_normal(shape, KEY + torch.tensor([1, 0]))),
        "offsets": (plain, ops.philox_normal(shape, KEY + torch.tensor([0, 1]))),
        "frame and base noise": (plain, ops.philox_normal(shape, KEY, sharing="shared")),
    }
    for name, (a, b) in others.items():
        a, b = a.flatten().double().cpu().numpy(), b.flatten().double().cpu().numpy()
        n = len(a) if "base" not in name else len(a) // shape[1]
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(n), name


def test_streams_of_a_sampler_are_other_noise():
    t = torch.full((4, 16), 500)

    def draw(sharing: str, step: Tensor | None) -> np.ndarray:
        return generator.normal(4, 16, 4096, KEY, sharing, None, 0, step).flatten().double().cpu().numpy()

    drawn = [draw("independent", None), draw("independent", t), draw("independent", t - 20)]
    drawn += [draw("shared", None), draw("shared", t), draw("shared", t - 20)]
    correlation = np.corrcoef(np.stack(drawn)) - np.eye(6)
    assert np.abs(correlation[:3, :3]).max() < 4.5 / np.sqrt(2**18)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(2**14)


# ---- philox_normal


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 5),
    frames=st.integers(1, 4),
    elements=st.integers(1, 19),
    split=st.integers(0, 5),
    sample_offset=st.sampled_from([0, 3, 2**31]),
    mode=st.sampled_from(SHARING),
)
def test_noise_does_not_depend_on_the_batch_split(batch, frames, elements, split, sample_offset, mode):
    sharing = {"sharing": mode[0], "base_weight": mode[1]}
    split = min(split, batch)
    whole = ops.philox_normal((batch, frames, elements), KEY, sample_offset=sample_offset, **sharing)
    head = ops.philox_normal((split, frames, elements), KEY, sample_offset=sample_offset, **sharing)
    tail = ops.philox_normal((batch - split, frames, elements), KEY, sample_offset=sample_offset + split, **sharing)
    assert torch.equal(bits(whole), bits(torch.cat([head, tail])))


@every_sharing
def test_noise_does_not_depend_on_later_frames_or_elements(sharing, base_weight):
    mode = {"sharing": sharing, "base_weight": base_weight}
    whole = ops.philox_normal((2, 5, 3, 11), KEY, **mode)
    assert torch.equal(bits(whole[:, :3]), bits(ops.philox_normal((2, 3, 33), KEY, **mode).view(2, 3, 3, 11)))
    assert torch.equal(bits(whole.flatten(2)[..., :7]), bits(ops.philox_normal((2, 5, 7), KEY, **mode)))


def test_sharing_modes_are_their_equations():
    shape, w = (2, 4, 3, 5), torch.tensor([[0.1, 0.2, 0.3, 0.9], [0.5, 0.0, 1.0, 0.7]])
    own, base = ops.philox_normal(shape, KEY), ops.philox_normal(shape, KEY, sharing="shared")
    assert torch.equal(base, base[:, :1].expand(shape))
    for b, e in np.ndindex(2, 15):
        wanted = philox_oracle.normal(20261121, 7, b, 0, e, philox_oracle.BASE)
        assert base[b, 3].flatten()[e].item() == pytest.approx(wanted, abs=2e-6)

    common, alone = w.double().sqrt()[..., None, None], (1 - w.double()).sqrt()[..., None, None]
    mixed = ops.philox_normal(shape, KEY, sharing="mixed", base_weight=w)
    torch.testing.assert_close(mixed.double(), common * base + alone * own, rtol=1e-6, atol=1e-6)

    progressive = ops.philox_normal(shape, KEY, sharing="progressive", base_weight=w).double()
    assert torch.equal(progressive[:, 0], own[:, 0].double())
    for f in range(1, 4):
        wanted = common[:, f] * progressive[:, f - 1] + alone[:, f] * own[:, f]
        torch.testing.assert_close(progressive[:, f], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sharing", ["mixed", "progressive"])
def test_base_weight_has_three_forms_and_two_limits(sharing):
    shape = (2, 3, 7)
    drawn = [
        ops.philox_normal(shape, KEY, sharing=sharing, base_weight=weight)
        for weight in (0.4, torch.full((3,), 0.4), torch.full((2, 3), 0.4))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    own = ops.philox_normal(shape, KEY)
    assert torch.equal(ops.philox_normal(shape, KEY, sharing=sharing, base_weight=0.0), own)
    whole = ops.philox_normal(shape, KEY, sharing=sharing, base_weight=1.0)
    first = ops.philox_normal(shape, KEY, sharing="shared") if sharing == "mixed" else own[:, :1].expand(shape)
    assert torch.equal(whole, first)


@pytest.mark.parametrize("sharing", ["mixed", "progressive"])
def test_frames_are_standard_normal_and_correlated_as_said(sharing):
    w = 0.6
    noise = ops.philox_normal((1, 5, 2**17), KEY, sharing=sharing, base_weight=w)[0].double()
    covariance = torch.cov(noise)
    lag = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    wanted = w**0.5**lag if sharing == "mixed" else torch.full((5, 5), w**0.5).double() ** lag
    if sharing == "mixed":
        wanted = torch.full((5, 5), w).fill_diagonal_(1.0).double()
    torch.testing.assert_close(covariance, wanted.double(), rtol=0, atol=5 * np.sqrt(2) / np.sqrt(2**17))


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
def test_other_dtypes_round_the_float32_noise_once(dtype):
    noise = ops.philox_normal((2, 3, 4, 5, 3), KEY, dtype=dtype)
    assert noise.dtype == dtype
    assert noise.is_contiguous()
    assert torch.equal(noise, ops.philox_normal((2, 3, 4, 5, 3), KEY).to(dtype))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3), (2, 0, 4, 0)], ids=str)
@every_sharing
def test_noise_of_empty_and_least_shapes(shape, sharing, base_weight):
    noise = ops.philox_normal(shape, KEY, sharing=sharing, base_weight=base_weight)
    assert noise.shape == shape
    assert noise.isfinite().all()


@needs_cuda
@every_sharing
def test_noise_has_the_same_bits_on_the_gpu(sharing, base_weight):
    shape = (3, 5, 4, 17, 31)
    here, there = (
        ops.philox_normal(shape, key, sharing=sharing, base_weight=base_weight) for key in (KEY.cpu(), KEY.cuda())
    )
    assert torch.equal(bits(there.cpu()), bits(here))


@needs_cuda
@every_sharing
def test_a_training_step_does_not_synchronise(sharing, base_weight):
    x0, alpha, sigma = (tensor.cuda() for tensor in clips())
    key, pred = KEY.cuda(), torch.randn(x0.shape, device="cuda", requires_grad=True)
    mode = {"sharing": sharing, "base_weight": base_weight}
    with no_synchronisation():
        ops.add_noise(x0, alpha, sigma, key, target="v", **mode)
        ops.diffusion_mse(pred, x0, alpha, sigma, key, prediction="v", **mode).mean().backward()


# ---- add_noise and diffusion_mse


def clips(shape=(2, 3, 4, 5, 6), dtype=torch.float32, requires_grad=False) -> tuple[Tensor, Tensor, Tensor]:
    """x0, alpha, sigma, with a level per frame; alpha and sigma in float64 for float64 clips, else float32."""
    level = torch.float64 if dtype == torch.float64 else torch.float32
    x0 = torch.randn(shape, dtype=torch.float64).to(dtype)
    sigma = torch.rand(shape[:2], dtype=torch.float64) * 0.9 + 0.05
    alpha = (1 - sigma**2).sqrt()
    return tuple(tensor.requires_grad_(requires_grad) for tensor in (x0, alpha.to(level), sigma.to(level)))


def plain_target(kind: str, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    alpha, sigma = alpha[:, :, None, None, None], sigma[:, :, None, None, None]
    return {"epsilon": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0, "x0": x0}[kind]


def plain_add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    return alpha[:, :, None, None, None] * x0 + sigma[:, :, None, None, None] * noise


def plain_mse(pred: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor, prediction: str) -> Tensor:
    return (pred - plain_target(prediction, x0, alpha, sigma, noise)).square().mean((2, 3, 4))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@every_sharing
@pytest.mark.parametrize("target", ["epsilon", "v", "flow"])
def test_add_noise_is_its_equation_rounded_once(dtype, sharing, base_weight, target):
    torch.manual_seed(0)
    x0, alpha, sigma = clips(dtype=dtype)
    mode = {"sharing": sharing, "base_weight": base_weight, "sample_offset": 5}
    noise = ops.philox_normal(x0.shape, KEY, **mode)
    x_t, regressed = ops.add_noise(x0, alpha, sigma, KEY, target=target, **mode)
    assert x_t.dtype == regressed.dtype == dtype
    assert torch.equal(x_t, plain_add_noise(x0.float(), alpha, sigma, noise).to(dtype))
    assert torch.equal(regressed, plain_target(target, x0.float(), alpha, sigma, noise).to(dtype))
    assert torch.equal(x_t, ops.add_noise(x0, alpha, sigma, KEY, **mode))
    exact = plain_add_noise(x0.double(), alpha.double(), sigma.double(), noise.double())
    assert_contract("x_t", x_t, plain_add_noise(x0, alpha.to(dtype), sigma.to(dtype), noise.to(dtype)), exact)


def test_add_noise_reads_any_strides():
    x0, alpha, sigma = clips((2, 3, 4, 5, 6))
    shuffled = x0.permute(2, 4, 0, 3, 1).contiguous().permute(2, 4, 0, 3, 1)
    wanted = ops.add_noise(x0, alpha[:, :1].repeat(1, 3), sigma, KEY, target="v")
    got = ops.add_noise(shuffled, alpha[:, :1].expand(2, 3), sigma.t().contiguous().t(), KEY, target="v")
    for ours, plain in zip(got, wanted, strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, plain)


def test_clean_frames_stay_bit_for_bit():
    x0, alpha, sigma = clips()
    alpha[0, 1], sigma[0, 1] = 1.0, 0.0
    assert torch.equal(ops.add_noise(x0, alpha, sigma, KEY)[0, 1], x0[0, 1])


@every_target
@every_sharing
def test_add_noise_gradients(target, sharing, base_weight):
    torch.manual_seed(0)
    inputs = clips((2, 3, 1, 2, 3), torch.float64, requires_grad=True)

    def function(x0, alpha, sigma):
        return ops.add_noise(x0, alpha, sigma, KEY, target=target, sharing=sharing, base_weight=base_weight)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_add_noise_gradients_meet_the_contract(dtype):
    torch.manual_seed(0)
    x0, alpha, sigma = clips(dtype=dtype, requires_grad=True)
    noise = ops.philox_normal(x0.shape, KEY)
    upstream = torch.randn(x0.shape).to(dtype)
    ours = torch.autograd.grad(ops.add_noise(x0, alpha, sigma, KEY), (x0, alpha, sigma), upstream)
    assert [grad.dtype for grad in ours] == [dtype, torch.float32, torch.float32]

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x0, alpha, sigma)]
        return torch.autograd.grad(plain_add_noise(*inputs, noise.to(dtype)), inputs, upstream.to(dtype))

    for name, *grads in zip(("dx0", "dalpha", "dsigma"), ours, plain(dtype), plain(torch.float64), strict=True):
        assert_contract(name, *grads)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@every_prediction
@every_sharing
def test_diffusion_mse_and_its_gradient_meet_the_contract(dtype, prediction, sharing, base_weight):
    torch.manual_seed(0)
    x0, alpha, sigma = clips((2, 3, 4, 9, 11), dtype)
    pred = torch.randn(x0.shape).to(dtype).requires_grad_()
    weight, upstream = torch.rand(2, 3), torch.rand(2, 3)
    mode = {"sharing": sharing, "base_weight": base_weight, "sample_offset": 2}
    noise = ops.philox_normal(x0.shape, KEY, **mode)
    loss = ops.diffusion_mse(pred, x0, alpha, sigma, KEY, prediction=prediction, weight=weight, **mode)
    (grad,) = torch.autograd.grad(loss, pred, upstream)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = pred.detach().to(dtype).requires_grad_()
        inputs = [tensor.to(dtype) for tensor in (x0, alpha, sigma, noise)]
        value = weight.to(dtype) * plain_mse(leaf, *inputs, prediction)
        return value.detach(), torch.autograd.grad(value, leaf, upstream.to(dtype))[0]

    (plain_loss, plain_grad), (exact_loss, exact_grad) = plain(dtype), plain(torch.float64)
    assert_contract("loss", loss.detach(), plain_loss.float(), exact_loss)
    assert_contract("dpred", grad, plain_grad, exact_grad)


def test_diffusion_mse_is_zero_at_add_noises_target():
    x0, alpha, sigma = clips()
    for kind in ("epsilon", "v", "flow"):
        _, target = ops.add_noise(x0, alpha, sigma, KEY, target=kind, sample_offset=4)
        assert not ops.diffusion_mse(target, x0, alpha, sigma, KEY, prediction=kind, sample_offset=4).any()
        assert ops.diffusion_mse(target, x0, alpha, sigma, KEY, prediction=kind).all()


def test_diffusion_mse_takes_a_16_bit_prediction_of_float32_clips():
    torch.manual_seed(0)
    x0, alpha, sigma = clips()
    pred = torch.randn(2, 3, 8, 5, 6).bfloat16()[:, :, :4]  # the first half of a learned-range output
    mixed = ops.diffusion_mse(pred, x0, alpha, sigma, KEY)
    torch.testing.assert_close(mixed, ops.diffusion_mse(pred.float().contiguous(), x0, alpha, sigma, KEY))


def test_diffusion_mse_gradient_survives_float16():
    """A large frame's 2/CHW would underflow in float16 if it were taken before the loss scale."""
    x0, alpha, sigma = clips((1, 1, 4, 128, 128), torch.float16)
    pred = torch.randn(x0.shape).half().requires_grad_()
    (grad,) = torch.autograd.grad(ops.diffusion_mse(pred, x0, alpha, sigma, KEY).sum() * 65536, pred)
    exact = 65536 * 2 / x0[0, 0].numel() * (pred - ops.philox_normal(x0.shape, KEY)).detach()
    torch.testing.assert_close(grad.float(), exact, rtol=2e-3, atol=1e-4)


@every_prediction
@every_sharing
def test_diffusion_mse_gradients(prediction, sharing, base_weight):
    torch.manual_seed(0)
    x0, alpha, sigma = clips((2, 2, 1, 2, 3), torch.float64, requires_grad=True)
    pred = torch.randn(x0.shape, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)

    def function(pred, x0, alpha, sigma, weight):
        mode = {"prediction": prediction, "sharing": sharing, "base_weight": base_weight}
        return ops.diffusion_mse(pred, x0, alpha, sigma, KEY, weight=weight, **mode)

    assert torch.autograd.gradcheck(function, (pred, x0, alpha, sigma, weight))


@pytest.mark.parametrize("wanted", range(4), ids=["pred", "x0", "alpha", "sigma"])
def test_diffusion_mse_gradient_of_one_input_alone(wanted):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 4, 5, 6), *clips((2, 3, 4, 5, 6))]
    every = [tensor.clone().requires_grad_() for tensor in inputs]
    all_grads = torch.autograd.grad(ops.diffusion_mse(*every, KEY, prediction="v").sum(), every)
    inputs[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(ops.diffusion_mse(*inputs, KEY, prediction="v").sum(), inputs[wanted])
    assert torch.equal(alone, all_grads[wanted])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6)], ids=str)
def test_empty_clips(shape):
    x0, alpha, sigma = clips(shape, requires_grad=True)
    x_t, target = ops.add_noise(x0, alpha, sigma, KEY, target="v")
    assert x_t.shape == target.shape == shape
    loss = ops.diffusion_mse(x_t, x0, alpha, sigma, KEY, prediction="v")
    assert loss.shape == shape[:2]
    grads = torch.autograd.grad(loss.sum(), (x0, alpha, sigma))
    assert [grad.shape for grad in grads] == [x0.shape, alpha.shape, sigma.shape]


def test_nan_stays_in_its_element():
    x0, alpha, sigma = clips()
    x0[0, 0, 0, 0, 0] = float("nan")
    x0[1, 1, 1, 1, 1] = float("inf")
    finite = ops.add_noise(x0, alpha, sigma, KEY).isfinite()
    assert torch.equal(finite, x0.isfinite())


# ---- registration


def test_opcheck():
    torch.manual_seed(0)
    vidkern = torch.ops.vidkern
    x0, alpha, sigma = clips(requires_grad=True)
    pred = torch.randn(x0.shape, requires_grad=True)
    w = torch.rand(2, 3)
    check = torch.library.opcheck
    check(vidkern.philox_normal.default, ((2, 3, 5), KEY, "mixed", w, 3, torch.bfloat16))
    check(vidkern.add_noise.default, (x0, alpha, sigma, KEY, None, "independent", None, 0))
    check(vidkern.add_noise.default, (x0, alpha, sigma, KEY, "v", "progressive", w, 1))
    check(vidkern.diffusion_mse.default, (pred, x0, alpha, sigma, KEY, "flow", "shared", None, 0))
    detached = [tensor.detach() for tensor in (x0, alpha, sigma)]
    grad = torch.randn(x0.shape)
    check(vidkern.add_noise_backward.default, (grad, None, *detached, KEY, None, "independent", None, 0))
    check(vidkern.diffusion_mse_backward.default, (torch.rand(2, 3), grad))


# with dynamic=True torch takes equal sizes of the first call for one symbol: there all differ, and from the key's 2
SIZES = [(5, 3, 7), (2, 8, 6), (3, 2, 5)]


def test_compiles_once_for_every_size():
    def train(x0, alpha, sigma, pred, key, sample_offset):
        x_t, target = ops.add_noise(x0, alpha, sigma, key, target="v", sample_offset=sample_offset)
        loss = ops.diffusion_mse(pred, x0, alpha, sigma, key, prediction="v", sample_offset=sample_offset)
        return x_t, target, loss

    def make(batch, frames, size):
        x0, alpha, sigma = clips((batch, frames, 4, size, size + 1), requires_grad=True)
        return x0, alpha, sigma, torch.randn(x0.shape, requires_grad=True), KEY, batch + 10

    assert_compiles_once(train, make, SIZES)


def test_philox_normal_compiles_once_for_every_size():
    def draw(key, like, sample_offset):
        mixed = ops.philox_normal(like.shape, key, sharing="mixed", base_weight=0.5, sample_offset=sample_offset)
        return mixed, ops.philox_normal(like.shape, key, dtype=torch.bfloat16)

    def make(batch, frames, size):
        return KEY + batch, torch.empty(batch, frames, size), 3 * batch

    assert_compiles_once(draw, make, SIZES)


# ---- bad input

SHAPE = (2, 3, 4, 5, 6)

BAD_NOISE = {
    "rank": ({"shape": (3,)}, ValueError, r"shape must be \(B, F, ...\)"),
    "size": ({"shape": (2, -1)}, ValueError, "shape must be"),
    "key type": ({"key": (1, 2)}, TypeError, "key must be a torch.Tensor, got tuple"),
    "key dtype": ({"key": torch.tensor([1, 2], dtype=torch.int32)}, TypeError, "key must be int64, got int32"),
    "key shape": ({"key": torch.tensor([1, 2, 3])}, ValueError, r"key must be \(seed, offset\) = \(2,\), got \(3,\)"),
    "sharing": ({"sharing": "common"}, ValueError, "sharing must be one of 'independent', .*got 'common'"),
    "weight missing": ({"sharing": "mixed"}, ValueError, "base_weight must be given"),
    "weight given": ({"base_weight": 0.5}, ValueError, "base_weight must be None with sharing='independent'"),
    "weight range": ({"sharing": "mixed", "base_weight": 1.5}, ValueError, "between 0 and 1, got 1.5"),
    "weight shape": (
        {"sharing": "mixed", "base_weight": torch.rand(4)},
        ValueError,
        r"base_weight must be \(F,\) = \(3,\), got \(4,\)",
    ),
    "weight dtype": ({"sharing": "mixed", "base_weight": torch.rand(3).double()}, TypeError, "must be float32"),
    "weight gradient": (
        {"sharing": "mixed", "base_weight": torch.rand(3, requires_grad=True)},
        ValueError,
        "must not require a gradient",
    ),
    "offset type": ({"sample_offset": 1.0}, TypeError, "sample_offset must be an int, got float"),
    "offset range": ({"sample_offset": -1}, ValueError, "sample_offset must be at least 0"),
    "offset end": ({"sample_offset": 2**32 - 1}, ValueError, "at most 2\\^32 - B"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype must be float32"),
    "device": ({"device": "meta"}, ValueError, r"device must be None or the key's \(.*\), got meta"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD_NOISE.values(), ids=BAD_NOISE)
def test_philox_normal_refuses(changed, error, message):
    with pytest.raises(error, match=message):
        ops.philox_normal(**{"shape": (2, 3, 4), "key": KEY, **changed})


BAD_CLIPS = {
    "x0 type": ({"x0": [1.0]}, TypeError, "x0 must be a torch.Tensor, got list"),
    "x0 rank": ({"x0": torch.rand(2, 3, 4)}, ValueError, r"x0 must be \(B, F, C, H, W\)"),
    "x0 dtype": ({"x0": torch.ones(SHAPE, dtype=torch.int64)}, TypeError, "x0 must be float32 or .*got int64"),
    "alpha shape": ({"alpha": torch.rand(2)}, ValueError, r"alpha must be \(B, F\) = \(2, 3\), got \(2,\)"),
    "sigma dtype": ({"sigma": torch.rand(2, 3).half()}, TypeError, "sigma must be float32, got float16"),
    "alpha dtype": ({"alpha": torch.rand(2, 3).double()}, TypeError, "alpha must be float32, got float64"),
    "sigma device": ({"sigma": torch.rand(2, 3, device="meta")}, ValueError, "sigma must be on the device of x0"),
    "key device": ({"key": KEY.to("meta")}, ValueError, "key must be on the device of x0"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD_CLIPS.values(), ids=BAD_CLIPS)
def test_clips_are_refused(changed, error, message):
    good = {"x0": torch.rand(SHAPE), "alpha": torch.rand(2, 3), "sigma": torch.rand(2, 3), "key": KEY}
    with pytest.raises(error, match=message):
        ops.add_noise(**{**good, **changed})
    with pytest.raises(error, match=message):
        ops.diffusion_mse(torch.rand(SHAPE), **{**good, **changed})


def test_choices_and_predictions_are_refused():
    x0, alpha, sigma = clips(SHAPE)
    with pytest.raises(ValueError, match="target must be one of 'epsilon', 'v', 'flow', got 'x0'"):
        ops.add_noise(x0, alpha, sigma, KEY, target="x0")
    with pytest.raises(ValueError, match=r"prediction must be one of .*got 'eps'"):
        ops.diffusion_mse(x0, x0, alpha, sigma, KEY, prediction="eps")
    with pytest.raises(ValueError, match=r"pred must be \(B, F, C, H, W\) as x0 = \(2, 3, 4, 5, 6\)"):
        ops.diffusion_mse(torch.rand(2, 3, 8, 5, 6), x0, alpha, sigma, KEY)
    with pytest.raises(ValueError, match=r"weight must be \(B, F\)"):
        ops.diffusion_mse(x0, x0, alpha, sigma, KEY, weight=torch.rand(3))

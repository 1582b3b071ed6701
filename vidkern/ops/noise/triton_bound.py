"""The variational bound in Triton: an element's term in nats, and its derivative by the log standard deviation of p."""

import triton
import triton.language as tl

from vidkern.ops.noise import reference

HALF_BIN = tl.constexpr(reference.HALF_BIN)
LAST_BIN = tl.constexpr(reference.LAST_BIN)
LEAST_PROBABILITY = tl.constexpr(reference.LEAST_PROBABILITY)


@triton.jit
def _power(x):
    """Return (2^n, q) with e^x = 2^n (1 + q) and |q| < 0.42, for -87 < x < 88.37; the polynomial is Cephes' expf."""
    shift = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, left in the lowest bits
    shifted = x * 1.44269504 + shift
    n = shifted - shift
    r = (x - n * 0.693359375) - n * -2.12194440e-4  # ln 2 in two parts
    q = r * 1.9875691500e-4 + 1.3981999507e-3
    q = q * r + 8.3334519073e-3
    q = q * r + 4.1665795894e-2
    q = q * r + 1.6666665459e-1
    q = q * r + 5.0000001201e-1
    q = q * (r * r) + r
    exponent = tl.add(shifted.to(tl.uint32, bitcast=True) << 23, 0x3F800000, sanitize_overflow=False)
    return exponent.to(tl.float32, bitcast=True), q


@triton.jit
def _exp(x):
    power, q = _power(x)
    return tl.where(x < -87.0, 0.0, tl.where(x > 88.37, float("inf"), power * q + power))


@triton.jit
def _exp_minus_1(x):
    power, q = _power(x)
    return tl.where(x < -87.0, -1.0, tl.where(x > 88.37, float("inf"), power * q + (power - 1.0)))


@triton.jit
def distance_per_residual(alpha, sigma, KIND: tl.constexpr):
    """Return what takes pred - target to x_0 minus the x_0 that pred implies."""
    if KIND == "epsilon":
        ratio = tl.div_rn(sigma, alpha)
    elif KIND == "v":
        ratio = tl.div_rn(sigma, alpha * alpha + sigma * sigma)
    elif KIND == "flow":
        ratio = tl.div_rn(sigma, alpha + sigma)
    else:
        ratio = -1.0
    return ratio


@triton.jit
def divergence(distance, low, excess):
    """Return KL(q || p) and its slope; ``excess`` is p's log variance over ``low``, q's."""
    surplus = distance * distance * _exp(-low)
    growth = _exp_minus_1(-excess)
    slope = -growth - surplus * (growth + 1.0)
    return (excess - slope) * 0.5, slope


@triton.jit
def _normal_cdf(x):
    """Return the distribution function as ADM and DiT train with it (Page 1977), and its derivative."""
    scale, cubic = 1.5957691216057308, 0.044715  # 2 sqrt(2 / pi)
    square = x * x
    value = tl.div_rn(1.0, 1.0 + _exp(-(scale * x * (1.0 + cubic * square))))
    return value, value * (1.0 - value) * (scale * (1.0 + 3.0 * cubic * square))


@triton.jit
def decoder(x0, distance, log_std):
    """Return -log p of x0, an 8-bit value in [-1, 1], and its slope; the first and the last bin extend to infinity."""
    inverse, far = _exp(-log_std), tl.abs(distance)
    first, last = x0 < -LAST_BIN, x0 > LAST_BIN
    # the bin's ends on the side where the distribution function is small, so that float32 resolves their difference
    upper = inverse * (HALF_BIN + tl.where(first, distance, -tl.where(last, distance, far)))
    lower = inverse * (-HALF_BIN - far)
    above, above_slope = _normal_cdf(upper)
    below, below_slope = _normal_cdf(lower)
    opens = first | last
    probability = above - tl.where(opens, 0.0, below)
    slope = tl.div_rn(upper * above_slope - tl.where(opens, 0.0, lower * below_slope), probability)
    impossible = probability < LEAST_PROBABILITY
    term = -tl.log(tl.where(impossible, LEAST_PROBABILITY, probability))
    return term, tl.where(impossible, 0.0, slope)

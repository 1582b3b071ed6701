"""The noise generator in Triton: Philox4x32-10 and Box-Muller, the bits that README.md fixes; how frames share noise.

Launch with ``enable_fp_fusion=False``: every product and every sum is rounded by itself.
"""

import triton
import triton.language as tl

from vidkern.ops.noise import generator

LANES = tl.constexpr(generator.LANES)
ROUNDS = tl.constexpr(generator.ROUNDS)
MULTIPLIER_0 = tl.constexpr(generator.MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(generator.MULTIPLIERS[1])
INCREMENT_0 = tl.constexpr(generator.KEY_INCREMENTS[0])
INCREMENT_1 = tl.constexpr(generator.KEY_INCREMENTS[1])
OFFSET_MULTIPLIER = tl.constexpr(generator.OFFSET_MULTIPLIER)
STREAM_BITS = tl.constexpr(generator.STREAM_BITS)
STEP_MASK = tl.constexpr(generator.STEP_MASK)
FRAME = tl.constexpr(generator.FRAME)
BASE = tl.constexpr(generator.BASE)
STEP_FRAME = tl.constexpr(generator.STEP_FRAME)
STEP_BASE = tl.constexpr(generator.STEP_BASE)

LOG = tl.constexpr(generator.LOG)
SIN = tl.constexpr(generator.SIN)
COS = tl.constexpr(generator.COS)
SQRT_HALF = tl.constexpr(generator.SQRT_HALF)
EXPONENT_31 = tl.constexpr(generator.EXPONENT_31)
FRACTION = tl.constexpr(generator.FRACTION)
EXPONENT_SCALE = tl.constexpr(generator.EXPONENT_SCALE)


@triton.jit
def _halves(word, multiplier):
    product = word.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox4x32(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(ROUNDS):
        high0, low0 = _halves(c0, MULTIPLIER_0)
        high1, low1 = _halves(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, INCREMENT_0, sanitize_overflow=False)  # modulo 2^32
        k1 = tl.add(k1, INCREMENT_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.constexpr_function
def _degree(coefficients):
    return len(coefficients) - 1


@triton.constexpr_function
def _coefficient(coefficients, power):
    return coefficients[power]


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr):
    value = tl.full(x.shape, _coefficient(COEFFICIENTS, _degree(COEFFICIENTS)), tl.float32)
    for power in tl.static_range(_degree(COEFFICIENTS) - 1, -1, -1):
        value = value * x
        value = value + _coefficient(COEFFICIENTS, power)
    return value


@triton.jit
def _radius(word):
    """Return sqrt(-2 ln u), u = ((word mod 2^31) | 1) / 2^31."""
    scaled = ((word & 0x7FFFFFFF) | 1).to(tl.int32).to(tl.float32)
    bits = scaled.to(tl.int32, bitcast=True) - (SQRT_HALF + EXPONENT_31)
    fraction = bits & FRACTION
    gap = 1.0 - (fraction + SQRT_HALF).to(tl.float32, bitcast=True)
    log_mantissa = gap * _polynomial(gap, LOG)
    log_exponent = (bits - fraction).to(tl.float32) * EXPONENT_SCALE
    return tl.sqrt_rn(log_mantissa + log_exponent)


@triton.jit
def _negated(x, sign):
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _box_muller(radius_word, angle_word):
    radius = _radius(radius_word)
    x = ((angle_word & FRACTION).to(tl.int32) - (1 << 22)).to(tl.float32) * 2.0**-23  # half turns
    square = x * x
    sine = x * _polynomial(square, SIN)
    cosine = _polynomial(square, COS)
    opposite = angle_word & (1 << 31)
    return radius * _negated(cosine, opposite), radius * _negated(sine, opposite)


@triton.jit
def fold_key(key, stride):
    """Return Philox's two key words of a key (seed, offset) in memory."""
    folded = (tl.load(key) + tl.load(key + stride) * OFFSET_MULTIPLIER).to(tl.uint64)
    return folded.to(tl.uint32), (folded >> 32).to(tl.uint32)


@triton.jit
def groups_of(start, TILE: tl.constexpr):
    """Return the first counter word of each four of TILE elements from ``start``, a multiple of four, on."""
    return (start // LANES + tl.arange(0, TILE // LANES)).to(tl.uint32)


@triton.jit
def _draw(groups, frame, sample, stream, k0, k1):
    """Return float32 normals, four to a group."""
    w0, w1, w2, w3 = _philox4x32(groups, frame, sample, stream, k0, k1)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (groups.shape[0] * LANES,))


@triton.jit
def _stream(step, OF_FRAME: tl.constexpr, OF_STEP: tl.constexpr):
    """Return the last counter word; ``step`` is None, or the timestep at which a sampler's step draws."""
    if step is None:
        word = tl.full((), OF_FRAME, tl.uint32)
    else:
        word = ((step & STEP_MASK) << STREAM_BITS | OF_STEP).to(tl.uint32)
    return word


@triton.jit
def base_noise(groups, sample, step, k0, k1, SHARING: tl.constexpr):
    """Return the noise that a sample's frames have in common, None where they have none."""
    if SHARING == "shared" or SHARING == "mixed":
        noise = _draw(groups, tl.full((), 0, tl.uint32), sample, _stream(step, BASE, STEP_BASE), k0, k1)
    else:
        noise = None
    return noise


@triton.jit
def frame_noise(previous, base, groups, f, sample, step, k0, k1, share, SHARING: tl.constexpr):
    """Return the noise of frame f; ``previous`` is frame f - 1's, ``share`` the frame's base_weight."""
    if SHARING == "shared":
        noise = base
    else:
        own = _draw(groups, f.to(tl.uint32), sample, _stream(step, FRAME, STEP_FRAME), k0, k1)
        if SHARING == "independent":
            noise = own
        else:
            common, alone = tl.sqrt_rn(share), tl.sqrt_rn(1.0 - share)
            if SHARING == "mixed":
                noise = common * base + alone * own
            else:
                noise = tl.where(f == 0, own, common * previous + alone * own)
    return noise

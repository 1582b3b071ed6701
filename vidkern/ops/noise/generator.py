"""The noise generator's definition: Philox4x32-10, and Box-Muller in correctly rounded float32 operations.

Every backend reproduces these bits (README.md writes the algorithm down). Each line of floating-point arithmetic
is one operation that IEEE 754 rounds correctly, in the order written: +, -, *, sqrt, never fused, never divided.
"""

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LANES = 4  # normals of one Philox call

#: 2^64 / golden ratio, odd, as a signed 64-bit integer: spreads the key's offset over the seed.
OFFSET_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)

#: The streams, counter word 3's low 8 bits: noise of a frame, noise common to a sample's frames, and the same two
#: for the noise that a sampler's step adds (whose timestep fills the word's other 24 bits).
FRAME, BASE, STEP_FRAME, STEP_BASE = range(4)
STREAM_BITS = 8
STEP_MASK = 0xFFFFFF

#: -2 ln(1 - g) / g on [1 - sqrt 2, 1 - sqrt 1/2], relative error 1.7e-7; powers ascending.
LOG = (
    1.9999998807907104,
    1.0000072717666626,
    0.6667011976242065,
    0.4993981719017029,
    0.39800336956977844,
    0.3450166583061218,
    0.324451208114624,
    0.2021370828151703,
)
#: sin(pi x) / x in powers of x^2 on [0, 1/4], relative error 5.3e-9.
SIN = (3.1415927410125732, -5.167709827423096, 2.550069808959961, -0.5982421040534973, 0.07756038755178452)
#: cos(pi x) in powers of x^2 on [0, 1/4], error 1.1e-7.
COS = (1.0, -4.934792995452881, 4.058412075042725, -1.3318802118301392, 0.2196968048810959)

SQRT_HALF = 0x3F3504F3  # float32 bits of sqrt(1/2)
EXPONENT_31 = 31 << 23
FRACTION = 0x7FFFFF
#: -2 ln 2 in units of a float32 exponent's lowest bit, 2^-23.
EXPONENT_SCALE = -1.3862943649291992 * 2.0**-23


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Return Philox4x32-10's four words (Salmon et al. 2011), each a 32-bit number held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0 = c0 * MULTIPLIERS[0]  # modulo 2^64, so that both halves are right whatever the sign
        product1 = c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) & MASK) ^ c1 ^ k0
        c2 = ((product0 >> 32) & MASK) ^ c3 ^ k1
        c1 = product1 & MASK
        c3 = product0 & MASK
        k0 = (k0 + KEY_INCREMENTS[0]) & MASK
        k1 = (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def philox_key(key: Tensor) -> tuple[Tensor, Tensor]:
    """Fold (seed, offset) into Philox's key: seed + offset * OFFSET_MULTIPLIER modulo 2^64, as (low, high) words."""
    folded = key[0] + key[1] * OFFSET_MULTIPLIER
    return folded & MASK, (folded >> 32) & MASK


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x
        value = value + coefficient
    return value


def sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded float32 square root, which torch.sqrt is not on every CPU (MKL's is an ulp off).

    float64 has more than twice float32's digits, so that rounding its root again gives float32's own.
    """
    return x.to(torch.float64).sqrt().to(torch.float32)


def radius(word: Tensor) -> Tensor:
    """Return sqrt(-2 ln u), float32, for u = ((word mod 2^31) | 1) / 2^31 rounded to float32."""
    scaled = ((word & 0x7FFFFFFF) | 1).to(torch.float32)  # u * 2^31
    bits = scaled.view(torch.int32).to(torch.int64) - (SQRT_HALF + EXPONENT_31)
    fraction = bits & FRACTION
    exponent = (bits - fraction).to(torch.float32)  # u = 2^e * m, sqrt(1/2) <= m < sqrt(2): this is e * 2^23, e <= 0
    mantissa = (fraction + SQRT_HALF).to(torch.int32).view(torch.float32)
    gap = 1.0 - mantissa
    log_mantissa = gap * _polynomial(LOG, gap)  # -2 ln m
    log_exponent = exponent * EXPONENT_SCALE  # -2 ln 2^e
    return sqrt(log_mantissa + log_exponent)


def direction(word: Tensor) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), float32, of one of 2^24 equally spaced angles: the word's low 23 bits and its highest."""
    x = ((word & FRACTION) - (1 << 22)).to(torch.float32) * 2.0**-23  # half turns, in [-1/2, 1/2)
    square = x * x
    sine = x * _polynomial(SIN, square)
    cosine = _polynomial(COS, square)
    opposite = word >= 1 << 31
    return torch.where(opposite, -cosine, cosine), torch.where(opposite, -sine, sine)


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent standard normals, float32, from two 32-bit words (Box & Muller 1958)."""
    distance = radius(radius_word)
    cosine, sine = direction(angle_word)
    return distance * cosine, distance * sine


def _stream(key: Tensor, batch: int, frames: int, elements: int, sample_offset: int, stream: Tensor | int) -> Tensor:
    """Return (batch, frames, elements) float32 normals; ``stream`` is an int or broadcasts with (batch, frames, 1)."""

    def count(size: int) -> Tensor:
        return torch.arange(size, device=key.device)

    counter = torch.broadcast_tensors(
        count(-(-elements // LANES)),  # group
        count(frames)[:, None],
        sample_offset + count(batch)[:, None, None],
        stream if isinstance(stream, Tensor) else key.new_full((), stream),  # filled there: nothing is copied over
    )
    w0, w1, w2, w3 = philox4x32(counter, philox_key(key))
    lanes = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=-1)
    return lanes.flatten(2)[..., :elements].contiguous()


def normal(
    batch: int,
    frames: int,
    elements: int,
    key: Tensor,
    sharing: str,
    base_weight: Tensor | None,
    sample_offset: int,
    step: Tensor | None = None,
) -> Tensor:
    """Return the noise of a batch of clips: (batch, frames, elements) float32, contiguous.

    Args:
        batch: samples; the first one's global index is ``sample_offset``.
        frames: frames of a sample.
        elements: numbers in a frame.
        key: int64 (2,) = (seed, offset).
        sharing: "independent", "shared", "mixed" or "progressive", as in README.md.
        base_weight: float32 (batch, frames), for "mixed" and "progressive".
        sample_offset: added to the sample's index in the batch.
        step: int64 (batch, frames) timesteps when a sampler's step draws; another timestep is other noise.
    """
    if batch * frames * elements == 0:
        return torch.empty((batch, frames, elements), dtype=torch.float32, device=key.device)

    def draw(frames_drawn: int, stream: int, timestep: Tensor | None) -> Tensor:
        word = torch.full((1, 1, 1), stream, device=key.device)
        if timestep is not None:
            word = word | ((timestep & STEP_MASK) << STREAM_BITS).unsqueeze(-1)
        return _stream(key, batch, frames_drawn, elements, sample_offset, word)

    def own_noise() -> Tensor:
        return draw(frames, FRAME if step is None else STEP_FRAME, step)

    def base_noise() -> Tensor:  # (batch, 1, elements); frames at different timesteps take the latest one's
        return draw(1, BASE if step is None else STEP_BASE, None if step is None else step.amax(1, keepdim=True))

    if sharing == "independent":
        return own_noise()
    if sharing == "shared":
        return base_noise().expand(batch, frames, elements).contiguous()
    assert base_weight is not None
    common = sqrt(base_weight).unsqueeze(-1)
    alone = sqrt(1.0 - base_weight).unsqueeze(-1)
    if sharing == "mixed":
        return common * base_noise() + alone * own_noise()
    own = own_noise()
    noise = [own[:, 0]]
    for f in range(1, frames):
        noise.append(common[:, f] * noise[-1] + alone[:, f] * own[:, f])
    return torch.stack(noise, dim=1)

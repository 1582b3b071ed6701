// The variational bound on host and device: what it takes of a frame, and its term and slope for an element.
#pragma once

#include <cmath>

#include "common/noise.h"

namespace vidkern {

constexpr float kNatsPerBit = 0.693147181f;

// What the bound takes of a frame, whose residuals are pred - target.
struct Bound {
  bool decodes;      // t = 0: -log p(x_0 | x_1), elsewhere KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
  float distance;    // between the means of q and p, per residual
  float gain;        // its square over the variance of q
  float low;         // log variance of q
  float half_range;  // to log beta; v = -1 .. 1 goes through all of it

  // d (log of p's standard deviation) / dv in bits
  VIDKERN_HOST_DEVICE float bits_per_v() const { return half_range * (0.5f / kNatsPerBit); }
};

struct BoundTables {
  Timesteps t;
  Table mean_coef, low, high;
  int64_t steps;
  Target prediction;

  // The x_0 that a prediction implies is off by this many residuals.
  VIDKERN_HOST_DEVICE float x0_distance(Level level) const {
    const float a = level.alpha, s = level.sigma;
    switch (prediction) {
      case Target::v: return s / (a * a + s * s);
      case Target::flow: return s / (a + s);
      case Target::x0: return -1.0f;
      default: return s / a;
    }
  }

  VIDKERN_HOST_DEVICE Bound at(int64_t b, int64_t f, Level level) const {
    const int64_t given = t.at(b, f), step = given < 0 ? 0 : given < steps ? given : steps - 1;
    const float distance = mean_coef[step] * x0_distance(level), variance = expf(low[step]);
    return {step == 0, distance, distance * distance / variance, low[step], 0.5f * (high[step] - low[step])};
  }
};

// The arithmetic of an element is written once for V = float and for vectors of floats, with as many Bits.

// e^x = power * (rest + 1). x = n ln 2 + r, |r| <= ln 2 / 2, -87 <= x <= 88.37; the polynomial is Cephes' expf.
template <typename V, typename Bits>
struct Exponential {
  V power, rest;

  VIDKERN_PHILOX explicit Exponential(V x) {
    constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the lowest bits
    const V shifted = x * kLog2e + kShift, n = shifted - kShift;
    const V r = (x - n * kLn2High) - n * kLn2Low;
    rest = r * 1.9875691500e-4f + 1.3981999507e-3f;
    rest = rest * r + 8.3334519073e-3f;
    rest = rest * r + 4.1665795894e-2f;
    rest = rest * r + 1.6666665459e-1f;
    rest = rest * r + 5.0000001201e-1f;
    rest = rest * (r * r) + r;
    power = philox::bits_as<V>((philox::bits_as<Bits>(shifted) << 23) + 0x3f800000u);
  }
};

// e^x, 0 below -87 and infinite above 88.37; NaN stays.
template <typename V, typename Bits>
VIDKERN_PHILOX V exponential(V x) {
  const Exponential<V, Bits> e(x);
  return x < -87.0f ? V{} : x > 88.37f ? V{} + INFINITY : e.power * e.rest + e.power;
}

// e^x - 1 within 1 ulp of the larger of it and 1, infinite above 88.37; NaN stays.
template <typename V, typename Bits>
VIDKERN_PHILOX V growth(V x) {
  const Exponential<V, Bits> e(x);
  return x < -87.0f ? V{} - 1.0f : x > 88.37f ? V{} + INFINITY : e.power * e.rest + (e.power - 1.0f);
}

// ln x of normal numbers from 2^-63 on; the polynomial is Cephes' logf. NaN stays.
template <typename V, typename Bits>
VIDKERN_PHILOX V logarithm(V x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u, kLift = 64u << 23, kFraction = 0x7fffffu;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Bits bits = philox::bits_as<Bits>(x) + (kLift - kSqrtHalf);
  const V exponent = philox::bits_as<V>((bits >> 23) + 0x4b000000u) - (8388608.0f + 64.0f);
  const V m = philox::bits_as<V>((bits & kFraction) + kSqrtHalf) - 1.0f, square = m * m;  // sqrt 1/2 .. sqrt 2, less 1
  V p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const V result = (m + (p * m * square + exponent * kLn2Low - 0.5f * square)) + exponent * kLn2High;
  return x == x ? result : x;
}

template <typename V>
struct Term {  // of the bound, in nats, and its derivative by the log of p's standard deviation
  V value, slope;
};

template <typename V, typename Bits>
VIDKERN_PHILOX Term<V> divergence(const Bound& bound, V residual, V v) {
  const V surplus = bound.gain * (residual * residual), excess = (v + 1.0f) * bound.half_range;
  const V grown = growth<V, Bits>(-excess), slope = -grown - surplus * (grown + 1.0f);
  return {0.5f * (excess - slope), slope};
}

// The normal distribution function as ADM and DiT train with it (Page 1977), and its derivative.
template <typename V, typename Bits>
VIDKERN_PHILOX Term<V> normal_cdf(V x) {
  constexpr float kScale = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
  const V square = x * x, u = kScale * x * (1.0f + kCubic * square);
  const V e = exponential<V, Bits>(u < 0.0f ? u : -u), share = 1.0f / (1.0f + e);
  return {u < 0.0f ? e * share : share, e * share * share * (kScale * (1.0f + 3.0f * kCubic * square))};
}

// Of 8-bit values in [-1, 1]; the first and the last bin extend to infinity.
template <typename V, typename Bits>
VIDKERN_PHILOX Term<V> decoder(const Bound& bound, V x0, V residual, V v) {
  constexpr float kHalfBin = 1.0f / 255.0f, kLastBin = 0.999f, kLeastProbability = 1e-12f, kMost = 27.6310211f;
  const V distance = bound.distance * residual, far = distance < 0.0f ? -distance : distance;
  const V inverse = exponential<V, Bits>(-0.5f * (bound.low + (v + 1.0f) * bound.half_range));
  // the bin's ends on the side where the distribution function is small, so that their difference is resolved
  const V end = x0 < -kLastBin ? distance : x0 > kLastBin ? -distance : -far;
  const V upper = inverse * (kHalfBin + end), lower = inverse * (-kHalfBin - far);
  const Term<V> above = normal_cdf<V, Bits>(upper), below = normal_cdf<V, Bits>(lower);
  const auto open = x0 < -kLastBin || x0 > kLastBin;
  const V probability = above.value - (open ? V{} : below.value);
  const V slope = (upper * above.slope - (open ? V{} : lower * below.slope)) / probability;
  return {probability < kLeastProbability ? V{} + kMost : -logarithm<V, Bits>(probability),
          probability < kLeastProbability ? V{} : slope};
}

inline BoundTables bound_tables_of(const Tensor& t, const Tensor& mean_coef, const Tensor& low, const Tensor& high,
                                   Target prediction) {
  return {timesteps_of(t), table_of(mean_coef), table_of(low), table_of(high), high.size(0), prediction};
}

}  // namespace vidkern

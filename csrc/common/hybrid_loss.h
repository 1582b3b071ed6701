// The variational bound on host and device: what it takes of a frame, and its term and slope for an element.
#pragma once

#include <cmath>

#include "common/noise.h"

namespace vidkern {

constexpr float kNatsPerBit = 0.693147181f;

struct Table {  // float32 (T,), any stride
  const float* data;
  int64_t stride;

  VIDKERN_HOST_DEVICE float operator[](int64_t step) const { return data[step * stride]; }
};

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

template <typename V>
struct TermOf {  // of the bound, in nats, and its derivative by the log of p's standard deviation
  V value, slope;
};
using Term = TermOf<float>;

// e^x - 1 within 1 ulp of the larger of it and 1, infinite above 88.37; NaN stays. x = n ln 2 + r, |r| <= ln 2 / 2; the
// polynomial is Cephes' expf. V: float, or a vector of them with as many Bits.
template <typename V, typename Bits>
VIDKERN_PHILOX V growth(V x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the lowest bits
  const V shifted = x * kLog2e + kShift, n = shifted - kShift;
  const V r = (x - n * kLn2High) - n * kLn2Low;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  const V power = philox::bits_as<V>((philox::bits_as<Bits>(shifted) << 23) + 0x3f800000u);
  const V result = power * p + (power - 1.0f);
  return x < -87.0f ? V{} - 1.0f : x > 88.37f ? V{} + INFINITY : result;
}

template <typename V, typename Bits>
VIDKERN_PHILOX TermOf<V> divergence(const Bound& bound, V residual, V v) {
  const V surplus = bound.gain * (residual * residual), excess = (v + 1.0f) * bound.half_range;
  const V grown = growth<V, Bits>(-excess), slope = -grown - surplus * (grown + 1.0f);
  return {0.5f * (excess - slope), slope};
}

// The normal distribution function as ADM and DiT train with it (Page 1977).
VIDKERN_HOST_DEVICE inline Term normal_cdf(float x) {
  constexpr float kScale = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
  const float value = 1.0f / (1.0f + expf(-kScale * x * (1.0f + kCubic * x * x)));
  return {value, value * (1.0f - value) * (kScale * (1.0f + 3.0f * kCubic * x * x))};
}

// Of 8-bit values in [-1, 1]; the first and the last bin extend to infinity.
VIDKERN_HOST_DEVICE inline Term decoder(const Bound& bound, float x0, float residual, float v) {
  constexpr float kHalfBin = 1.0f / 255.0f, kLastBin = 0.999f, kLeastProbability = 1e-12f;
  const float distance = bound.distance * residual, far = fabsf(distance);
  const float inverse = expf(-0.5f * (bound.low + (v + 1.0f) * bound.half_range));
  const bool first = x0 < -kLastBin, last = x0 > kLastBin;
  // the bin's ends on the side where the distribution function is small, so that their difference is resolved
  const float upper = inverse * (kHalfBin + (first ? distance : last ? -distance : -far));
  const float lower = inverse * (-kHalfBin - far);
  const Term above = normal_cdf(upper), below = first || last ? Term{0.0f, 0.0f} : normal_cdf(lower);
  const float probability = above.value - below.value;
  if (probability < kLeastProbability) return {-logf(kLeastProbability), 0.0f};
  return {-logf(probability), (upper * above.slope - lower * below.slope) / probability};
}

inline Table table_of(const Tensor& t) { return {t.const_data_ptr<float>(), t.stride(0)}; }

inline BoundTables bound_tables_of(const Tensor& t, const Tensor& mean_coef, const Tensor& low, const Tensor& high,
                                   Target prediction) {
  return {timesteps_of(t), table_of(mean_coef), table_of(low), table_of(high), high.size(0), prediction};
}

}  // namespace vidkern

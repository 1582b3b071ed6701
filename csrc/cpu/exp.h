// e^x of floats, one or eight at a time.
#pragma once

#include "cpu/vec.h"

namespace vidkern::cpu {

// e^x = 2^n * (rest + 1), x = n ln 2 + r, |r| <= ln 2 / 2; the polynomial is Cephes' expf. V: float or Vec.
template <typename V>
struct Exponential {
  static constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the lowest bits
  V shifted, rest;                              // shifted = n + kShift

  VIDKERN_INLINE explicit Exponential(V x) {
    constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    shifted = x * kLog2e + kShift;
    const V n = shifted - kShift, r = (x - n * kLn2High) - n * kLn2Low;
    rest = r * 1.9875691500e-4f + 1.3981999507e-3f;
    rest = rest * r + 8.3334519073e-3f;
    rest = rest * r + 4.1665795894e-2f;
    rest = rest * r + 1.6666665459e-1f;
    rest = rest * r + 5.0000001201e-1f;
    rest = rest * (r * r) + r;
  }
};

// e^x for x <= 0, within 1 ulp; 0 below -87, where results would be subnormal; NaN stays.
VIDKERN_INLINE Vec exp_of_negative(Vec x) {
  const Exponential<Vec> e(x);
  const Vec result = bit_cast<Vec>(bit_cast<VecBits>(e.rest + 1.0f) + (bit_cast<VecBits>(e.shifted) << 23));
  return x < -87.0f ? Vec{} : result;
}

}  // namespace vidkern::cpu

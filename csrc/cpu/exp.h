// e^x of eight floats at a time.
#pragma once

#include "cpu/vec.h"

namespace vidkern::cpu {

// e^x for x <= 0, within 1 ulp; 0 below -87, where results would be subnormal; NaN stays. x = n ln 2 + r, |r| <=
// ln 2 / 2; the polynomial is Cephes' expf.
VIDKERN_INLINE Vec exp_of_negative(Vec x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the lowest bits
  const Vec shifted = x * kLog2e + kShift, n = shifted - kShift;
  const Vec r = (x - n * kLn2High) - n * kLn2Low;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec result = bit_cast<Vec>(bit_cast<VecBits>(p) + (bit_cast<VecBits>(shifted) << 23));
  return x < -87.0f ? Vec{} : result;
}

}  // namespace vidkern::cpu

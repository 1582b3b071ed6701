// Eight floats at a time, on any instruction set: loads and stores of every dtype, sums in a fixed order.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/layout.h"

// One clone of a function for each level of x86-64; the loader picks one. What it calls must be VIDKERN_INLINE.
#ifdef __x86_64__
#define VIDKERN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VIDKERN_CLONES
#endif
#define VIDKERN_INLINE inline __attribute__((always_inline))
#define VIDKERN_INLINE_LAMBDA __attribute__((always_inline))

namespace vidkern::cpu {

constexpr int64_t kLanes = 8;

using Vec = float __attribute__((vector_size(32)));
using VecBits = uint32_t __attribute__((vector_size(32)));
using VecHalf = uint16_t __attribute__((vector_size(16)));

// 16-bit floats as they lie in memory.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename To, typename From>
VIDKERN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Raw, typename T>
VIDKERN_INLINE Raw load_raw(const T* p) {
  Raw raw;
  std::memcpy(&raw, p, sizeof(raw));
  return raw;
}

VIDKERN_INLINE Vec load(const float* p) { return load_raw<Vec>(p); }

VIDKERN_INLINE Vec load(const bfloat16* p) {
  return bit_cast<Vec>(__builtin_convertvector(load_raw<VecHalf>(p), VecBits) << 16);
}

VIDKERN_INLINE Vec load(const float16* p) {
  const VecBits bits = __builtin_convertvector(load_raw<VecHalf>(p), VecBits);
  const VecBits sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const VecBits scaled = bit_cast<VecBits>(bit_cast<Vec>(magnitude) * 0x1p112f);  // the exponents' biases differ by 112
  const VecBits special = magnitude | 0x7f800000u;                               // Inf and NaN
  return bit_cast<Vec>(sign | (magnitude >= 0x0f800000u ? special : scaled));
}

VIDKERN_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

VIDKERN_INLINE void store(bfloat16* p, Vec v) {
  const VecBits bits = bit_cast<VecBits>(v);
  const VecBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const VecBits quiet = (bits >> 16) | 0x40u;
  const VecHalf half = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, VecHalf);
  std::memcpy(p, &half, sizeof(half));
}

VIDKERN_INLINE void store(float16* p, Vec v) {
  const VecBits bits = bit_cast<VecBits>(v), magnitude = bits & 0x7fffffffu;
  const VecBits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const VecBits subnormal = bit_cast<VecBits>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;  // rounds at 2^-24
  const VecBits overflow = VecBits{} + 0x7c00u, nan = VecBits{} + 0x7e00u;
  VecBits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? overflow : half;
  half = magnitude > 0x7f800000u ? nan : half;
  const VecHalf result = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), VecHalf);
  std::memcpy(p, &result, sizeof(result));
}

VIDKERN_INLINE float sum(Vec v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// A sum over a row: four chains of additions in flight, joined in a fixed order.
struct Sum {
  Vec chain[4] = {};

  VIDKERN_INLINE float total() const { return sum((chain[0] + chain[1]) + (chain[2] + chain[3])); }
};

// Calls f(i, k) for i = 0, 8, 16, ... < d, with k = 0, 1, 2, 3, 0, ... the chain that a sum may use.
template <typename F>
VIDKERN_INLINE void for_each_vec(int64_t d, F f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    f(i, 0);
    f(i + kLanes, 1);
    f(i + 2 * kLanes, 2);
    f(i + 3 * kLanes, 3);
  }
  for (; i < d; i += kLanes) f(i, 0);
}

template <typename T>
VIDKERN_INLINE void widen(const void* p, int64_t offset, float addend, float* out, int64_t d) {
  const T* values = static_cast<const T*>(p) + offset;
  for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA { store(out + i, load(values + i) + addend); });
}

// The vector of frame (b, f) in float32, plus an addend: 1 makes a gain of a scale.
VIDKERN_INLINE void load_vector(const FrameVector& v, int64_t b, int64_t f, float addend, float* out, int64_t d) {
  switch (v.dtype) {
    case Dtype::float32: return widen<float>(v.data, v.offset(b, f), addend, out, d);
    case Dtype::bfloat16: return widen<bfloat16>(v.data, v.offset(b, f), addend, out, d);
    case Dtype::float16: return widen<float16>(v.data, v.offset(b, f), addend, out, d);
  }
}

}  // namespace vidkern::cpu

// Eight floats at a time, on any instruction set: loads and stores of every dtype, sums in a fixed order.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

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
using VecHalves = uint16_t __attribute__((vector_size(32)));

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

// Shuffles with zeros widen in one or two instructions; __builtin_convertvector takes six.
VIDKERN_INLINE Vec load(const bfloat16* p) {
  const VecHalf bits = load_raw<VecHalf>(p), zeros = {};
  return bit_cast<Vec>(__builtin_shufflevector(zeros, bits, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
}

VIDKERN_INLINE Vec load(const float16* p) {
  const VecHalf half = load_raw<VecHalf>(p), zeros = {};
  const VecBits bits = bit_cast<VecBits>(
      __builtin_shufflevector(half, zeros, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  const VecBits sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const VecBits scaled = bit_cast<VecBits>(bit_cast<Vec>(magnitude) * 0x1p112f);  // the exponents' biases differ by 112
  const VecBits special = magnitude | 0x7f800000u;                               // Inf and NaN
  return bit_cast<Vec>(sign | (magnitude >= 0x0f800000u ? special : scaled));
}

VIDKERN_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

VIDKERN_INLINE Vec plain_nan(Vec v) { return v == v ? v : bit_cast<Vec>(VecBits{} + 0x7fc00000u); }

// Rounds to nearest, ties to even; a NaN with bits in its lower half could become Inf or 0.
VIDKERN_INLINE void store_plain(bfloat16* p, Vec v) {
  const VecBits bits = bit_cast<VecBits>(v);
  const VecHalves halves = bit_cast<VecHalves>(bits + 0x7fffu + ((bits >> 16) & 1u));
  const VecHalf upper = __builtin_shufflevector(halves, halves, 1, 3, 5, 7, 9, 11, 13, 15);
  std::memcpy(p, &upper, sizeof(upper));
}

VIDKERN_INLINE void store(bfloat16* p, Vec v) { store_plain(p, plain_nan(v)); }

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

#ifdef __x86_64__
// float16 where the processor converts it. By asm: intrinsics cannot be inlined into a clone for processors without.
struct float16_f16c {
  uint16_t bits;
};

using Quad = float __attribute__((vector_size(16)));

VIDKERN_INLINE Quad load_quad(const float16_f16c* p) {
  Quad quad;
  asm("vcvtph2ps %1, %0" : "=x"(quad) : "m"(*reinterpret_cast<const uint16_t(*)[4]>(p)));
  return quad;
}

VIDKERN_INLINE void store_quad(float16_f16c* p, Quad quad) {
  asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<uint16_t(*)[4]>(p)) : "x"(quad));  // 0: ties to even
}

VIDKERN_INLINE Vec load(const float16_f16c* p) {
  return __builtin_shufflevector(load_quad(p), load_quad(p + 4), 0, 1, 2, 3, 4, 5, 6, 7);
}

VIDKERN_INLINE void store(float16_f16c* p, Vec v) {
  store_quad(p, __builtin_shufflevector(v, v, 0, 1, 2, 3));
  store_quad(p + 4, __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
#endif

// A store of values whose NaNs are plain, or come from T: what arithmetic on such values gives, too.
template <typename T>
VIDKERN_INLINE void store_plain(T* p, Vec v) {
  store(p, v);
}

// Calls f with a value of the type that holds a dtype.
template <typename F>
VIDKERN_INLINE void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::bfloat16: return f(bfloat16{});
    case Dtype::float16:
#ifdef __x86_64__
      if (__builtin_cpu_supports("f16c")) return f(float16_f16c{});
#endif
      return f(float16{});
  }
}

VIDKERN_INLINE float sum(Vec v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Rows of D floats that one thread works in.
class Scratch {
 public:
  Scratch(int64_t rows, int64_t d) : lines_(std::make_unique_for_overwrite<Line[]>((rows * d + 15) / 16)), d_(d) {}

  float* row(int64_t index) const { return lines_[0].values + index * d_; }

 private:
  struct alignas(64) Line {
    float values[16];
  };
  std::unique_ptr<Line[]> lines_;
  int64_t d_;
};

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

}  // namespace vidkern::cpu

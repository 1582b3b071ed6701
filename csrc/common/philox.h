// The noise generator on host and device: Philox4x32-10 and Box-Muller, the bits that vidkern/ops/noise/README.md fixes.
//
// It is written for one group of four numbers; on the host a loop over groups vectorises. The host is compiled with
// -ffp-contract=off, the device uses operations that no compiler fuses.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// (GCC unrolls short loops after it vectorises the one around them, unless it is told to)
#ifdef __CUDACC__
#define VIDKERN_PHILOX __host__ __device__ __forceinline__
#define VIDKERN_UNROLL _Pragma("unroll")
#else
#define VIDKERN_PHILOX inline __attribute__((always_inline))
#define VIDKERN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace vidkern::philox {

constexpr int kLanes = 4;  // normals of one Philox call
constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kIncrement0 = 0x9E3779B9, kIncrement1 = 0xBB67AE85;
constexpr uint64_t kOffsetMultiplier = 0x9E3779B97F4A7C15;

enum Stream : uint32_t { kFrameStream, kBaseStream, kStepFrameStream, kStepBaseStream };
constexpr int kStreamBits = 8;  // of word 3; a sampler's timestep has the others

struct Words {  // of a counter (group, frame or 0, sample, stream + 256 * step), or of what Philox makes of it
  uint32_t w0, w1, w2, w3;
};

struct Key {
  uint32_t k0, k1;

  VIDKERN_PHILOX static Key fold(int64_t seed, int64_t offset) {
    const uint64_t folded = static_cast<uint64_t>(seed) + static_cast<uint64_t>(offset) * kOffsetMultiplier;
    return {static_cast<uint32_t>(folded), static_cast<uint32_t>(folded >> 32)};
  }
};

// --- operations that are rounded one by one ---

#ifdef __CUDA_ARCH__
VIDKERN_PHILOX float add(float a, float b) { return __fadd_rn(a, b); }
VIDKERN_PHILOX float multiply(float a, float b) { return __fmul_rn(a, b); }
VIDKERN_PHILOX float root(float a) { return __fsqrt_rn(a); }
#else
VIDKERN_PHILOX float add(float a, float b) { return a + b; }
VIDKERN_PHILOX float multiply(float a, float b) { return a * b; }
VIDKERN_PHILOX float root(float a) { return std::sqrt(a); }
#endif

template <typename To, typename From>
VIDKERN_PHILOX To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// --- the generator ---

// Word holds a word in its low 32 bits. Without narrowing to uint32_t the products' low halves come for nothing where a
// vector of 64-bit products takes one instruction (AVX-512).
template <typename Word = uint32_t>
VIDKERN_PHILOX Words philox4x32(Words counter, Key key) {
  Word c0 = counter.w0, c1 = counter.w1, c2 = counter.w2, c3 = counter.w3;
  VIDKERN_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(static_cast<uint32_t>(c0)) * kMultiplier0;
    const uint64_t product1 = static_cast<uint64_t>(static_cast<uint32_t>(c2)) * kMultiplier1;
    c0 = static_cast<Word>(product1 >> 32) ^ c1 ^ key.k0;
    c2 = static_cast<Word>(product0 >> 32) ^ c3 ^ key.k1;
    c1 = static_cast<Word>(product1);
    c3 = static_cast<Word>(product0);
    key = {key.k0 + kIncrement0, key.k1 + kIncrement1};
  }
  return {static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2), static_cast<uint32_t>(c3)};
}

VIDKERN_PHILOX float horner(float, float last) { return last; }

template <typename... Coefficients>
VIDKERN_PHILOX float horner(float x, float first, Coefficients... rest) {  // powers ascending
  return add(multiply(horner(x, rest...), x), first);
}

// sqrt(-2 ln u), u = ((word mod 2^31) | 1) / 2^31
VIDKERN_PHILOX float radius(uint32_t word) {
  constexpr int32_t kSqrtHalf = 0x3F3504F3, kExponent31 = 31 << 23, kFraction = 0x7FFFFF;
  const float scaled = static_cast<float>(static_cast<int32_t>((word & 0x7FFFFFFFu) | 1u));
  const int32_t bits = bits_as<int32_t>(scaled) - (kSqrtHalf + kExponent31);
  const int32_t fraction = bits & kFraction;
  const float gap = add(1.0f, -bits_as<float>(fraction + kSqrtHalf));
  const float log_mantissa = multiply(
      gap, horner(gap, 1.9999998807907104f, 1.0000072717666626f, 0.6667011976242065f, 0.4993981719017029f,
                  0.39800336956977844f, 0.3450166583061218f, 0.324451208114624f, 0.2021370828151703f));
  const float log_exponent = multiply(static_cast<float>(bits - fraction), -0x1.62e43p-23f);
  return root(add(log_mantissa, log_exponent));
}

struct Pair {
  float cosine, sine;
};

// One of 2^24 equally spaced angles.
VIDKERN_PHILOX Pair direction(uint32_t word) {
  const float x = multiply(static_cast<float>(static_cast<int32_t>(word & 0x7FFFFFu) - 0x400000), 0x1p-23f);
  const float square = multiply(x, x);
  const float sine = multiply(x, horner(square, 3.1415927410125732f, -5.167709827423096f, 2.550069808959961f,
                                        -0.5982421040534973f, 0.07756038755178452f));
  const float cosine = horner(square, 1.0f, -4.934792995452881f, 4.058412075042725f, -1.3318802118301392f,
                              0.2196968048810959f);
  const uint32_t opposite = word & 0x80000000u;
  return {bits_as<float>(bits_as<uint32_t>(cosine) ^ opposite), bits_as<float>(bits_as<uint32_t>(sine) ^ opposite)};
}

VIDKERN_PHILOX Pair box_muller(uint32_t radius_word, uint32_t angle_word) {
  const float distance = radius(radius_word);
  const Pair unit = direction(angle_word);
  return {multiply(distance, unit.cosine), multiply(distance, unit.sine)};
}

struct Normals {  // of a group, lane by lane
  float n0, n1, n2, n3;
};

VIDKERN_PHILOX Normals box_muller(Words words) {
  const Pair first = box_muller(words.w0, words.w1), second = box_muller(words.w2, words.w3);
  return {first.cosine, first.sine, second.cosine, second.sine};
}

}  // namespace vidkern::philox

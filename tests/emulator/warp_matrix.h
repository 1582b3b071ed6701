// Stands in for the tensor cores' instructions of csrc/common/mma.h: each lane brings its words and takes its part.
#pragma once

#include <array>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace vidkern::cuda {

template <typename T>
double element(uint32_t word, int i) {
  const auto bits = static_cast<uint16_t>(word >> 16 * i);
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

template <typename T, int kSteps>  // words of a: rows g, g + 8 of each step of 8 columns; then those of b
void mma(float (&c)[4], const std::array<uint32_t, 6>& words) {
  const auto warp = emulator::gather(words);
  const int lane = threadIdx.x % emulator::kWarp;
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 8 * kSteps; ++k) {
      const int step = k / 8, t = k % 8 / 2;
      const auto& a = warp[lane / 4 * 4 + t];
      const auto& b = warp[(lane % 4 * 2 + i % 2) * 4 + t];
      sum += element<T>(a[2 * step + i / 2], k % 2) * element<T>(b[4 + step], k % 2);
    }
    c[i] = static_cast<float>(sum);
  }
}

template <typename T>
void mma_k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<T, 2>(c, {a[0], a[1], a[2], a[3], b0, b1});
}

template <typename T>
void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  mma<T, 1>(c, {a0, a1, 0, 0, b, 0});
}

inline uint32_t transpose(uint32_t word) {
  const auto warp = emulator::gather(word);
  const int lane = threadIdx.x % emulator::kWarp, row = lane / 4, column = lane % 4 * 2;
  const auto at = [&](int g, int i) { return warp[g * 4 + i / 2] >> 16 * (i % 2) & 0xffffu; };
  return at(column, row) | at(column + 1, row) << 16;
}

}  // namespace vidkern::cuda

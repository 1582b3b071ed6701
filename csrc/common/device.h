// What CUDA kernels share: eight elements at a time, sums over a block in a fixed order, launches on torch's stream.
//
// Special instructions are reached through NVIDIA's headers alone, so that tests/emulator can stand in for them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/layout.h"

namespace vidkern::cuda {

constexpr int kWarp = 32;
constexpr int kPack = 8;  // elements that a thread loads at a time: 16 bytes of a 16-bit type, twice 16 of float

#ifndef VIDKERN_EMULATOR  // the emulator's checks every access
template <typename T, int kSize>
struct alignas(16) Shared {
  T values[kSize];

  __device__ T& operator[](int i) { return values[i]; }
};
#endif

// --- eight elements: v[0..8) = p[0..8) and back, p aligned to 16 bytes ---

__device__ inline void load(const float* p, float (&v)[kPack]) {
  const float4 low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

__device__ inline void store(float* p, const float (&v)[kPack]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  __device__ static float2 widen(type pair) { return __bfloat1622float2(pair); }
  __device__ static type round(float a, float b) { return __floats2bfloat162_rn(a, b); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  __device__ static float2 widen(type pair) { return __half22float2(pair); }
  __device__ static type round(float a, float b) { return __floats2half2_rn(a, b); }
};

template <typename T>
union Pack {  // eight 16-bit elements
  uint4 raw;
  typename Pair<T>::type pairs[kPack / 2];

  __device__ Pack() : raw{} {}
};

template <typename T>
__device__ inline void load(const T* p, float (&v)[kPack]) {
  Pack<T> pack;
  pack.raw = *reinterpret_cast<const uint4*>(p);
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) {
    const float2 pair = Pair<T>::widen(pack.pairs[i]);
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}

template <typename T>
__device__ inline void store(T* p, const float (&v)[kPack]) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) pack.pairs[i] = Pair<T>::round(v[2 * i], v[2 * i + 1]);
  *reinterpret_cast<uint4*>(p) = pack.raw;
}

// --- rows: a block holds a row of D elements, thread t the packs t, t + blockDim.x, ... ---

__device__ inline int column(int pack) { return (threadIdx.x + pack * blockDim.x) * kPack; }

template <int kPacks, typename F>
__device__ inline void for_each_element(F f) {  // f(pack, element of the pack)
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) f(p, i);
  }
}

template <int kPacks, typename F>
__device__ inline void for_each_element_below(int d, F f) {  // the elements of columns < d
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (column(p) >= d) continue;
#pragma unroll
    for (int i = 0; i < kPack; ++i) f(p, i);
  }
}

template <typename T, int kPacks>
__device__ inline void load_row(const T* row, int d, float (&v)[kPacks][kPack]) {  // zeros at d and beyond
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (column(p) < d) {
      load(row + column(p), v[p]);
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i) v[p][i] = 0.0f;
    }
  }
}

template <typename T, int kPacks>
__device__ inline void store_row(T* row, int d, const float (&v)[kPacks][kPack]) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
    if (column(p) < d) store(row + column(p), v[p]);
}

template <int kPacks>
__device__ inline void load_vector(const FrameVector& vector, const Run& run, int d, float (&v)[kPacks][kPack]) {
  const int64_t offset = vector.offset(run.b, run.f);
  switch (vector.dtype) {
    case Dtype::float32: return load_row(static_cast<const float*>(vector.data) + offset, d, v);
    case Dtype::bfloat16: return load_row(static_cast<const __nv_bfloat16*>(vector.data) + offset, d, v);
    case Dtype::float16: return load_row(static_cast<const __half*>(vector.data) + offset, d, v);
  }
}

// --- sums ---

// Sums kValues numbers over a warp at once. Lane l gets the total of number l / (32 / kValues): at each of the first
// steps a lane keeps one half of the numbers and sends the other half away.
template <int kValues>
__device__ inline float warp_sum(float (&v)[kValues]) {
  const int lane = threadIdx.x % kWarp;
  int width = kWarp / 2;
#pragma unroll
  for (int half = kValues / 2; half > 0; half /= 2, width /= 2) {
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? v[i + half] : v[i], send = upper ? v[i] : v[i + half];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, send, width);
    }
  }
#pragma unroll
  for (; width > 0; width /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], width);
  return v[0];
}

// Replaces kValues numbers (a power of two) by their sums over the block, in every thread. One barrier: a block must
// alternate between two scratches, so that nobody writes to one that another still reads.
template <int kValues, int kSize>
__device__ inline void block_sum(float (&v)[kValues], Shared<float, kSize>& scratch) {
  constexpr int kLanesPerValue = kWarp / kValues;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const float total = warp_sum(v);
  if (lane % kLanesPerValue == 0) scratch[warp * kValues + lane / kLanesPerValue] = total;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) v[i] = 0.0f;
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] += scratch[w * kValues + i];
  }
}

}  // namespace vidkern::cuda

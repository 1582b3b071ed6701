// What CUDA kernels share: eight elements at a time, sums over a block in a fixed order, launches on torch's stream.
//
// Special instructions are reached through NVIDIA's headers alone, so that tests/emulator can stand in for them.
#pragma once

#include <cstring>

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

// --- packs: eight elements as they lie in memory, in 16-byte words, and as floats ---
// (__stwb is a plain store that the compiler cannot split)

template <typename To, typename From>
__device__ inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
struct Pair;  // two 16-bit elements in 32 bits
template <>
struct Pair<__nv_bfloat16> {
  __device__ static float2 widen(uint32_t bits) { return __bfloat1622float2(bit_cast<__nv_bfloat162>(bits)); }
  __device__ static uint32_t round(float a, float b) { return bit_cast<uint32_t>(__floats2bfloat162_rn(a, b)); }
};
template <>
struct Pair<__half> {
  __device__ static float2 widen(uint32_t bits) { return __half22float2(bit_cast<__half2>(bits)); }
  __device__ static uint32_t round(float a, float b) { return bit_cast<uint32_t>(__floats2half2_rn(a, b)); }
};

template <typename T>
struct Pack {
  uint4 raw = {};

  __device__ static Pack aligned(const T* p) { return {*reinterpret_cast<const uint4*>(p)}; }  // to 16 bytes

  __device__ static Pack round(const float (&v)[kPack]) {
    return {make_uint4(Pair<T>::round(v[0], v[1]), Pair<T>::round(v[2], v[3]), Pair<T>::round(v[4], v[5]),
                       Pair<T>::round(v[6], v[7]))};
  }

  __device__ static Pack unaligned(const T* p) {
    const auto* half = reinterpret_cast<const uint16_t*>(p);
    const auto word = [&](int i) { return half[2 * i] | static_cast<uint32_t>(half[2 * i + 1]) << 16; };
    return {make_uint4(word(0), word(1), word(2), word(3))};
  }

  __device__ void widen(float (&v)[kPack]) const {
    const float2 a = Pair<T>::widen(raw.x), b = Pair<T>::widen(raw.y);
    const float2 c = Pair<T>::widen(raw.z), d = Pair<T>::widen(raw.w);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
  }

  __device__ void store(T* p) const { __stwb(reinterpret_cast<uint4*>(p), raw); }
};

template <>
struct Pack<float> {
  float4 low = {}, high = {};

  __device__ static Pack aligned(const float* p) {
    return {reinterpret_cast<const float4*>(p)[0], reinterpret_cast<const float4*>(p)[1]};
  }

  __device__ static Pack unaligned(const float* p) {
    return {make_float4(p[0], p[1], p[2], p[3]), make_float4(p[4], p[5], p[6], p[7])};
  }

  __device__ static Pack round(const float (&v)[kPack]) {
    return {make_float4(v[0], v[1], v[2], v[3]), make_float4(v[4], v[5], v[6], v[7])};
  }

  __device__ void widen(float (&v)[kPack]) const {
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }

  __device__ void store(float* p) const {
    __stwb(reinterpret_cast<float4*>(p), low);
    __stwb(reinterpret_cast<float4*>(p) + 1, high);
  }
};

template <typename T>
__device__ inline Pack<T> load_at(const T* p, bool aligned) {
  return aligned ? Pack<T>::aligned(p) : Pack<T>::unaligned(p);
}

template <typename T>
__device__ inline void load_floats_of(const void* data, int64_t first, bool aligned, float (&v)[kPack]) {
  load_at(static_cast<const T*>(data) + first, aligned).widen(v);
}

// Eight elements of any dtype, from one on.
__device__ inline void load_floats(Dtype dtype, const void* data, int64_t first, bool aligned, float (&v)[kPack]) {
  switch (dtype) {
    case Dtype::float32: return load_floats_of<float>(data, first, aligned, v);
    case Dtype::bfloat16: return load_floats_of<__nv_bfloat16>(data, first, aligned, v);
    case Dtype::float16: return load_floats_of<__half>(data, first, aligned, v);
  }
}

// --- rows: a block holds a row of D elements, thread t the packs t, t + blockDim.x, ... ---

__device__ inline int column(int pack) { return (threadIdx.x + pack * blockDim.x) * kPack; }

template <typename F>
__device__ inline void for_each(F f) {  // f(element of a pack)
#pragma unroll
  for (int i = 0; i < kPack; ++i) f(i);
}

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

// The part that a thread owns of kTokens rows; zeros from column d on, and in rows from `count` on. To have many loads
// under way at once, load everything before widening anything.
template <typename T, int kTokens, int kPacks>
__device__ inline void load_rows(
    const T* rows, int64_t stride, bool aligned, int count, int d, Pack<T> (&packs)[kTokens][kPacks]) {
  if (aligned) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        packs[t][p] = t < count && column(p) < d ? Pack<T>::aligned(rows + t * stride + column(p)) : Pack<T>{};
    }
  } else {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        packs[t][p] = t < count && column(p) < d ? Pack<T>::unaligned(rows + t * stride + column(p)) : Pack<T>{};
    }
  }
}

template <typename T, int kPacks>
__device__ inline void widen(const Pack<T> (&packs)[kPacks], float (&v)[kPacks][kPack]) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p) packs[p].widen(v[p]);
}

template <typename T, int kTokens, int kPacks>
__device__ inline void widen(const Pack<T> (&packs)[kTokens][kPacks], float (&v)[kTokens][kPacks][kPack]) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) widen(packs[t], v[t]);
}

template <typename T>
__device__ inline Pack<T> load_pack(const T* row, bool aligned, int p, int d) {  // zeros from column d on
  if (column(p) >= d) return {};
  return load_at(row + column(p), aligned);
}

template <typename T>
__device__ inline void store_pack(T* row, int p, int d, const float (&v)[kPack]) {
  if (column(p) < d) Pack<T>::round(v).store(row + column(p));
}

template <typename T, int kPacks>
__device__ inline void store_row(T* row, int d, const float (&v)[kPacks][kPack]) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p) store_pack(row, p, d, v[p]);
}

template <typename T, int kPacks>
__device__ inline void load_vector_of(const FrameVector& vector, const Run& run, int d, float (&v)[kPacks][kPack]) {
  Pack<T> packs[1][kPacks];
  load_rows(static_cast<const T*>(vector.data) + vector.offset(run.b, run.f), 0, vector.aligned, 1, d, packs);
  widen(packs[0], v);
}

template <int kPacks>
__device__ inline void load_vector(const FrameVector& vector, const Run& run, int d, float (&v)[kPacks][kPack]) {
  switch (vector.dtype) {
    case Dtype::float32: return load_vector_of<float>(vector, run, d, v);
    case Dtype::bfloat16: return load_vector_of<__nv_bfloat16>(vector, run, d, v);
    case Dtype::float16: return load_vector_of<__half>(vector, run, d, v);
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
#pragma unroll 1  // short, and its length is not known
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] += scratch[w * kValues + i];
  }
}

// --- launches ---

// Calls f(T{}), on the host, with the type that holds a dtype.
template <typename F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::bfloat16: return f(__nv_bfloat16{});
    case Dtype::float16: return f(__half{});
  }
}

}  // namespace vidkern::cuda

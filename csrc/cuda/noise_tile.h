// What the noise and sampling kernels share: the eight elements that a thread owns, and the noise that it draws for them.
//
// A block takes a run of a sample's elements through some of its frames: through all where a frame needs the one
// before, through more than one where frames share noise that is then drawn once. No result depends on how many.
#pragma once

#include <algorithm>

#include "common/device.h"
#include "common/noise.h"

namespace vidkern::cuda {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int64_t kRun = kThreads * kPack;  // elements

struct Work {
  Frames frames;
  int64_t runs, frames_per_block, blocks_per_run;

  Work(const Frames& frames, int64_t frames_per_block)
      : frames(frames),
        runs((frames.elements + kRun - 1) / kRun),
        frames_per_block(frames_per_block),
        blocks_per_run((frames.f + frames_per_block - 1) / frames_per_block) {}

  int64_t blocks() const { return frames.b * blocks_per_run * runs; }
};

// Frames share the base's numbers best in one block; 1000 blocks are two to three rounds of those that an A100 holds.
inline Work work_of(const Frames& frames, Sharing sharing) {
  constexpr int64_t kBlocks = 1000;
  const int64_t all = std::max<int64_t>(frames.f, 1);
  if (sharing == Sharing::progressive) return {frames, all};
  if (sharing == Sharing::independent) return {frames, 1};
  int64_t together = all;
  while (together > 1 && Work(frames, together).blocks() < kBlocks) together /= 2;
  return {frames, together};
}

// What a thread owns: `count` elements of sample b from element e on, in frames first <= f < last.
struct Part {
  int64_t b, run, first, last, e;
  int count;

  __device__ explicit Part(const Work& work) {
    const auto runs = static_cast<unsigned>(work.runs), blocks = static_cast<unsigned>(work.blocks_per_run);
    const unsigned block = blockIdx.x / runs;  // 64-bit divisions are slow
    run = blockIdx.x % runs;
    e = run * kRun + threadIdx.x * kPack;
    b = block / blocks;
    first = block % blocks * work.frames_per_block;
    last = first + work.frames_per_block < work.frames.f ? first + work.frames_per_block : work.frames.f;
    const int64_t left = work.frames.elements - e;
    count = left >= kPack ? kPack : left > 0 ? static_cast<int>(left) : 0;
  }
};

// --- eight elements of a frame ---

struct Words8 {  // as they lie in memory; 16-bit elements are all in `low`
  uint4 low = {}, high = {};
};

template <typename T>
__device__ inline uint32_t element_bits(const T* p) {
  if constexpr (sizeof(T) == 4) return *reinterpret_cast<const uint32_t*>(p);
  else return *reinterpret_cast<const uint16_t*>(p);
}

template <typename T>
__device__ inline Words8 load_words(const Clip& clip, const Part& part, int64_t f) {
  const T* frame = static_cast<const T*>(clip.data) + clip.offset(part.b, f);
  if (clip.aligned && part.count == kPack) {
    const auto* words = reinterpret_cast<const uint4*>(frame + part.e);
    return {words[0], sizeof(T) == 4 ? words[1] : uint4{}};
  }
  uint32_t bits[kPack];
  Walk walk(clip, part.e);
  for_each([&](int i) {
    bits[i] = i < part.count ? element_bits(frame + walk.offset) : 0;
    walk.step(clip);
  });
  if constexpr (sizeof(T) == 4)
    return {make_uint4(bits[0], bits[1], bits[2], bits[3]), make_uint4(bits[4], bits[5], bits[6], bits[7])};
  else
    return {make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
                       bits[6] | bits[7] << 16)};
}

__device__ inline Words8 load(const Clip& clip, const Part& part, int64_t f) {
  if (clip.dtype == Dtype::float32) return load_words<float>(clip, part, f);
  return load_words<__half>(clip, part, f);
}

__device__ inline void widen(Dtype dtype, const Words8& words, float (&v)[kPack]) {
  switch (dtype) {
    case Dtype::float32:
      return Pack<float>{bit_cast<float4>(words.low), bit_cast<float4>(words.high)}.widen(v);
    case Dtype::bfloat16: return Pack<__nv_bfloat16>{words.low}.widen(v);
    case Dtype::float16: return Pack<__half>{words.low}.widen(v);
  }
}

template <typename T>
__device__ inline void store_rounded(const Clip& clip, const Part& part, int64_t f, const float (&v)[kPack]) {
  T* to = static_cast<T*>(clip.data) + clip.offset(part.b, f) + part.e;
  if (clip.aligned && part.count == kPack) return Pack<T>::round(v).store(to);
  for_each([&](int i) {
    if (i >= part.count) return;
    if constexpr (sizeof(T) == 4) to[i] = v[i];
    else *reinterpret_cast<uint16_t*>(to + i) = static_cast<uint16_t>(Pair<T>::round(v[i], 0.0f));
  });
}

__device__ inline void store(const Clip& clip, const Part& part, int64_t f, const float (&v)[kPack]) {  // contiguous
  switch (clip.dtype) {
    case Dtype::float32: return store_rounded<float>(clip, part, f, v);
    case Dtype::bfloat16: return store_rounded<__nv_bfloat16>(clip, part, f, v);
    case Dtype::float16: return store_rounded<__half>(clip, part, f, v);
  }
}

// --- noise ---

// a * x + b * y, nothing fused
__device__ inline float combine(float a, float x, float b, float y) {
  return philox::add(philox::multiply(a, x), philox::multiply(b, y));
}

// The noise that a thread owns, frame after frame. Source: Noise or StepNoise.
template <typename Source>
class PartNoise {
 public:
  float n[kPack];

  __device__ PartNoise(const Source& noise, const Part& part) : noise_(noise), part_(part), key_(noise.key()) {
    if (noise.draws_base()) draw(noise.base_stream(part.b), 0, base_);
  }

  __device__ void draw_frame(int64_t f) {
    if (noise_.sharing == Sharing::shared) {
      for_each([&](int i) { n[i] = base_[i]; });
      return;
    }
    float own[kPack];
    draw(noise_.own_stream(part_.b, f), f, own);
    if (noise_.sharing == Sharing::independent || (noise_.sharing == Sharing::progressive && f == 0)) {
      for_each([&](int i) { n[i] = own[i]; });
      return;
    }
    const float w = noise_.base_weight.at(part_.b, f);
    const float common = philox::root(w), alone = philox::root(philox::add(1.0f, -w));
    const bool mixed = noise_.sharing == Sharing::mixed;
    for_each([&](int i) { n[i] = combine(common, mixed ? base_[i] : n[i], alone, own[i]); });
  }

 private:
  __device__ void draw(uint32_t stream, int64_t f, float (&v)[kPack]) const {
    constexpr int k = philox::kLanes;
#pragma unroll
    for (int g = 0; g < kPack / k; ++g) {
      const philox::Normals normals = philox::box_muller(philox::philox4x32(
          {static_cast<uint32_t>(part_.e / k) + g, static_cast<uint32_t>(f),
           noise_.first_sample + static_cast<uint32_t>(part_.b), stream}, key_));
      v[g * k] = normals.n0, v[g * k + 1] = normals.n1, v[g * k + 2] = normals.n2, v[g * k + 3] = normals.n3;
    }
  }

  const Source& noise_;
  const Part& part_;
  philox::Key key_;
  float base_[kPack];
};

}  // namespace vidkern::cuda

// Stretches of a clip on the CPU: the generator in vectors, and rows of any dtype and strides.
#include "cpu/noise_stretch.h"

#include <type_traits>

#include "cpu/vec.h"

namespace vidkern::cpu {
namespace {

// --- noise ---

// Two loops: the coefficients of Box-Muller would push Philox out of the registers.
template <typename Word>
VIDKERN_INLINE void draw_groups(philox::Words counter, philox::Key key, float* out, int64_t groups) {
  constexpr int64_t kGroups = kStretch / philox::kLanes;
  alignas(64) uint32_t w0[kGroups], w1[kGroups], w2[kGroups], w3[kGroups];
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t group = counter.w0 + static_cast<uint32_t>(g);
    const philox::Words words = philox::philox4x32<Word>({group, counter.w1, counter.w2, counter.w3}, key);
    w0[g] = words.w0, w1[g] = words.w1, w2[g] = words.w2, w3[g] = words.w3;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const philox::Normals normals = philox::box_muller({w0[g], w1[g], w2[g], w3[g]});
    out[4 * g] = normals.n0;
    out[4 * g + 1] = normals.n1;
    out[4 * g + 2] = normals.n2;
    out[4 * g + 3] = normals.n3;
  }
}

VIDKERN_CLONES void draw(philox::Words counter, philox::Key key, float* out, int64_t groups) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512dq")) return draw_groups<uint64_t>(counter, key, out, groups);
#endif
  draw_groups<uint32_t>(counter, key, out, groups);
}

VIDKERN_CLONES void mix(float w, const float* common, const float* own, float* out, int64_t count) {
  const float common_part = philox::root(w), own_part = philox::root(1.0f - w);
  for (int64_t i = 0; i < count; ++i) out[i] = common_part * common[i] + own_part * own[i];
}

// --- rows of a clip in float32 ---

// (GCC makes 16 bfloat16 at a time of a plain loop)
VIDKERN_INLINE void widen(const bfloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = bit_cast<float>(static_cast<uint32_t>(from[i].bits) << 16);
}

VIDKERN_INLINE void round(const float* from, bfloat16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(from[i]), even = (bits >> 16) & 1u;
    const uint32_t rounded = from[i] == from[i] ? bits + 0x7fffu + even : 0x7fc00000u;  // a plain NaN
    to[i].bits = static_cast<uint16_t>(rounded >> 16);
  }
}

template <typename T>
VIDKERN_INLINE void widen(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) {
    T last[kLanes] = {};
    std::copy(from + i, from + count, last);
    store(to + i, load(last));
  }
}

template <typename T>
VIDKERN_INLINE void round(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) {
    T last[kLanes];
    store(last, load(from + i));
    std::copy(last, last + count - i, to + i);
  }
}

template <typename T>
VIDKERN_INLINE void gather(const Clip& clip, const T* frame, const Stretch& stretch, T* to) {
  Walk walk(clip, stretch.first);
  for (int64_t i = 0; i < stretch.count; ++i, walk.step(clip)) to[i] = frame[walk.offset];
}

}  // namespace

template <typename Source>
const float* StretchNoise<Source>::frame(int64_t f) {
  switch (noise_.sharing) {
    case Sharing::independent: break;
    case Sharing::shared: return base_.values;
    case Sharing::mixed:
      draw_row(noise_.own_stream(stretch_.b, f), f, own_);
      mix(noise_.base_weight.at(stretch_.b, f), base_.values, own_.values, own_.values, stretch_.count);
      return own_.values;
    case Sharing::progressive:
      if (f == 0) break;
      draw_row(noise_.own_stream(stretch_.b, f), f, base_);
      mix(noise_.base_weight.at(stretch_.b, f), own_.values, base_.values, own_.values, stretch_.count);
      return own_.values;
  }
  draw_row(noise_.own_stream(stretch_.b, f), f, own_);
  return own_.values;
}

template <typename Source>
void StretchNoise<Source>::draw_row(uint32_t stream, int64_t f, Row& row) const {
  constexpr int64_t k = philox::kLanes;
  const philox::Words counter{static_cast<uint32_t>(stretch_.first / k), static_cast<uint32_t>(f),
                              noise_.first_sample + static_cast<uint32_t>(stretch_.b), stream};
  draw(counter, key_, row.values, (stretch_.count + k - 1) / k);
}

template class StretchNoise<Noise>;
template class StretchNoise<StepNoise>;

VIDKERN_CLONES const float* read(const Clip& clip, const Stretch& stretch, int64_t f, Row& row) {
  const float* where = row.values;
  with_type(clip.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    using T = decltype(element);
    const T* from = static_cast<const T*>(clip.data) + clip.offset(stretch.b, f);
    T copied[kStretch];
    if (clip.dense) {
      from += stretch.first;
    } else {
      gather(clip, from, stretch, copied);
      from = copied;
    }
    if constexpr (std::is_same_v<T, float>) {
      if (clip.dense) where = from;
      else std::copy_n(from, stretch.count, row.values);
    } else {
      widen(from, row.values, stretch.count);
    }
  });
  return where;
}

float* place(const Clip& clip, const Stretch& stretch, int64_t f, Row& row) {
  if (clip.dtype != Dtype::float32) return row.values;
  return static_cast<float*>(clip.data) + clip.offset(stretch.b, f) + stretch.first;
}

VIDKERN_CLONES void write(const Clip& clip, const Stretch& stretch, int64_t f, const float* row) {
  with_type(clip.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    using T = decltype(element);
    T* to = static_cast<T*>(clip.data) + clip.offset(stretch.b, f) + stretch.first;
    if (static_cast<const void*>(to) != row) round(row, to, stretch.count);
  });
}

void copy(const Clip& from, const Clip& to, const Stretch& stretch, int64_t f) {
  const auto bits = [&](auto word) {
    using Word = decltype(word);
    const Word* source = static_cast<const Word*>(from.data) + from.offset(stretch.b, f);
    Word* target = static_cast<Word*>(to.data) + to.offset(stretch.b, f) + stretch.first;
    if (from.dense) std::copy_n(source + stretch.first, stretch.count, target);
    else gather(from, source, stretch, target);
  };
  if (from.dtype == Dtype::float32) bits(uint32_t{});
  else bits(uint16_t{});
}

}  // namespace vidkern::cpu

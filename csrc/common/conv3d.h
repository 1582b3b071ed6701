// The padded input of a causal convolution, on host and device: where each position is copied from, and the operators
// of a compiled library that write it, with or without a norm and SiLU on the way.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace vidkern {

enum class PadNorm { none, rms, group };
enum class PadMode { zeros, edge, reflect };

// One axis of the video: `size` positions, and padding before and after them.
struct Axis {
  int64_t before, size, after;
  PadMode mode;

  VIDKERN_HOST_DEVICE int64_t padded() const { return before + size + after; }
  VIDKERN_HOST_DEVICE bool inside(int64_t i) const { return i >= before && i < before + size; }

  // The position that padded position i is a copy of; -1 for a zero.
  VIDKERN_HOST_DEVICE int64_t source(int64_t i) const {
    const int64_t at = i - before, last = size - 1;
    if (inside(i)) return at;
    if (mode == PadMode::zeros) return -1;
    if (mode == PadMode::edge) return at < 0 ? 0 : last;
    return at < 0 ? -at : 2 * last - at;
  }

  // Padded positions that are copies of position s: its own place, and those of its edge or its mirror images.
  VIDKERN_HOST_DEVICE int64_t copies(int64_t s) const { return 1 + copies_before(s) + copies_after(s); }

  VIDKERN_HOST_DEVICE int64_t copy(int64_t s, int64_t k) const {  // 0 <= k < copies(s)
    if (k == 0) return before + s;
    const bool in_front = k <= copies_before(s);
    if (mode == PadMode::reflect) return in_front ? before - s : before + 2 * (size - 1) - s;
    return in_front ? k - 1 : before + size + k - 1 - copies_before(s);
  }

 private:
  VIDKERN_HOST_DEVICE int64_t copies_before(int64_t s) const {
    if (mode == PadMode::edge) return s == 0 ? before : 0;
    return mode == PadMode::reflect && s >= 1 && s <= before ? 1 : 0;
  }

  VIDKERN_HOST_DEVICE int64_t copies_after(int64_t s) const {
    const int64_t away = size - 1 - s;
    if (mode == PadMode::edge) return away == 0 ? after : 0;
    return mode == PadMode::reflect && away >= 1 && away <= after ? 1 : 0;
  }
};

// (B, C, F, H, W) with unit stride in C.
struct Video {
  void* data;
  int64_t stride_b, stride_f, stride_h, stride_w;
  bool aligned;  // every position starts at a multiple of 16 bytes

  VIDKERN_HOST_DEVICE int64_t offset(int64_t b, int64_t f, int64_t h, int64_t w) const {
    return b * stride_b + f * stride_f + h * stride_h + w * stride_w;
  }
};

// The frames of axis t are those of the cache followed by those of x.
struct Padding {
  int64_t b, c, cached;
  Axis t, h, w;

  VIDKERN_HOST_DEVICE int64_t frames() const { return t.size - cached; }               // of x
  VIDKERN_HOST_DEVICE int64_t rows() const { return b * t.size * h.size; }             // of the cache and x
  VIDKERN_HOST_DEVICE int64_t padded_rows() const { return b * t.padded() * h.padded(); }
};

struct ChannelVector {  // (C,), contiguous; no data where there is none
  const void* data;
  Dtype dtype;
};

// What a kind of norm does not have stays null. Statistics: (B, G) of a group, rstd (B, F, H, W) of rms.
struct PadForward {
  Padding padding;
  Dtype dtype;
  Video x = {}, cache = {}, padded = {};
  ChannelVector weight = {}, bias = {};
  int64_t groups = 1;
  float eps = 0.0f;
  float *mean = nullptr, *rstd = nullptr;
};

struct PadBackward {
  Padding padding;
  Dtype dtype;
  Video dpadded = {}, x = {}, dx = {}, dcache = {};
  ChannelVector weight = {}, bias = {};
  int64_t groups = 1;
  const float *mean = nullptr, *rstd = nullptr;
  float *dweight = nullptr, *dbias = nullptr;  // (C,)
};

inline Video video_of(const Tensor& t) {
  const auto bytes = static_cast<int64_t>(t.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (const int64_t dim : {0, 2, 3, 4}) aligned = aligned && t.stride(dim) * bytes % 16 == 0;
  return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(3), t.stride(4), aligned};
}

inline ChannelVector channel_vector(const std::optional<Tensor>& t) {
  return t ? ChannelVector{t->data_ptr(), dtype_of(*t)} : ChannelVector{};
}

// An uninitialised video in channels_last_3d on the device of another.
inline Tensor empty_video(const Tensor& like, int64_t b, int64_t c, int64_t f, int64_t h, int64_t w) {
  const Tensor rows = empty_beside(like, {b, f, h, w, c}, like.scalar_type());
  return torch::stable::transpose(torch::stable::transpose(torch::stable::transpose(rows, 3, 4), 2, 3), 1, 2);
}

// The kind of an absent gradient: no elements.
inline Tensor nothing(const Tensor& like) { return empty_beside(like, {0}, like.scalar_type()); }

inline PadMode space_mode(const std::string& name) {
  if (name == "replicate") return PadMode::edge;
  if (name == "reflect") return PadMode::reflect;
  STD_TORCH_CHECK(name == "zeros", "no such space_pad: ", name);
  return PadMode::zeros;
}

inline Axis around(int64_t size, int64_t kernel, int64_t dilation, PadMode mode) {
  const int64_t total = (kernel - 1) * dilation;
  return {total / 2, size, total - total / 2, mode};
}

using Sizes = std::vector<int64_t>;
using Cache = std::optional<Tensor>;

inline Padding padding_of(int64_t frames, int64_t height, int64_t width, const Tensor& like, const Cache& cache,
                          const Sizes& kernel, const Sizes& dilation, const std::string& time_pad,
                          const std::string& space_pad) {
  const int64_t cached = cache ? cache->size(2) : 0, before = cache ? 0 : (kernel[0] - 1) * dilation[0];
  const PadMode time = time_pad == "first_frame" ? PadMode::edge : PadMode::zeros, space = space_mode(space_pad);
  return {like.size(0), like.size(1), cached, {before, cached + frames, 0, time},
          around(height, kernel[1], dilation[1], space), around(width, kernel[2], dilation[2], space)};
}

inline Padding padding_of(const Tensor& x, const Cache& cache, const Sizes& kernel, const Sizes& dilation,
                          const std::string& time_pad, const std::string& space_pad) {
  return padding_of(x.size(2), x.size(3), x.size(4), x, cache, kernel, dilation, time_pad, space_pad);
}

// Backend has pad<norm>(on, PadForward), which also fills the statistics, and pad_backward<norm>(on, PadBackward).
template <typename Backend>
struct PadOperators {
  static Tensor empty_padded(const Tensor& x, const Padding& p) {
    return empty_video(x, p.b, p.c, p.t.padded(), p.h.padded(), p.w.padded());
  }

  static Tensor causal_pad(const Tensor& x, Cache cache, Sizes kernel, Sizes dilation, std::string time_pad,
                           std::string space_pad) {
    const Padding padding = padding_of(x, cache, kernel, dilation, time_pad, space_pad);
    const Tensor padded = empty_padded(x, padding);
    Backend::template pad<PadNorm::none>(x, {
        .padding = padding, .dtype = dtype_of(x), .x = video_of(x), .cache = cache ? video_of(*cache) : Video{},
        .padded = video_of(padded)});
    return padded;
  }

  static std::tuple<Tensor, Tensor> causal_pad_backward(
      const Tensor& dpadded, Cache cache, Sizes kernel, Sizes dilation, std::string time_pad, std::string space_pad) {
    const auto inside = [&](int axis) { return dpadded.size(2 + axis) - (kernel[axis] - 1) * dilation[axis]; };
    const int64_t frames = cache ? dpadded.size(2) - cache->size(2) : inside(0);
    const Padding p =
        padding_of(frames, inside(1), inside(2), dpadded, cache, kernel, dilation, time_pad, space_pad);
    const Tensor dx = empty_video(dpadded, p.b, p.c, frames, p.h.size, p.w.size);
    const Tensor dcache = cache ? empty_video(dpadded, p.b, p.c, p.cached, p.h.size, p.w.size) : nothing(dpadded);
    Backend::template pad_backward<PadNorm::none>(dpadded, {
        .padding = p, .dtype = dtype_of(dpadded), .dpadded = video_of(dpadded), .dx = video_of(dx),
        .dcache = cache ? video_of(dcache) : Video{}});
    return {dx, dcache};
  }

  static std::tuple<Tensor, Tensor, Tensor> norm_silu_pad(
      const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, Cache cache, std::string norm, int64_t groups,
      double eps, Sizes kernel, Sizes dilation, std::string time_pad, std::string space_pad) {
    const Padding padding = padding_of(x, cache, kernel, dilation, time_pad, space_pad);
    const Tensor padded = empty_padded(x, padding);
    const bool rms = norm == "rms";
    const Tensor mean = rms ? empty_beside(x, {0}, ScalarType::Float)
                            : empty_beside(x, {x.size(0), groups}, ScalarType::Float);
    const Tensor rstd = rms ? empty_beside(x, {x.size(0), x.size(2), x.size(3), x.size(4)}, ScalarType::Float)
                            : empty_beside(x, {x.size(0), groups}, ScalarType::Float);
    const PadForward a{
        .padding = padding, .dtype = dtype_of(x), .x = video_of(x), .cache = cache ? video_of(*cache) : Video{},
        .padded = video_of(padded), .weight = channel_vector(weight), .bias = channel_vector(bias), .groups = groups,
        .eps = float(eps), .mean = mean.mutable_data_ptr<float>(), .rstd = rstd.mutable_data_ptr<float>()};
    if (rms) Backend::template pad<PadNorm::rms>(x, a);
    else Backend::template pad<PadNorm::group>(x, a);
    return {padded, mean, rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> norm_silu_pad_backward(
      const Tensor& dpadded, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, Cache cache,
      const Tensor& mean, const Tensor& rstd, std::string norm, int64_t groups, Sizes kernel, Sizes dilation,
      std::string time_pad, std::string space_pad) {
    const Padding p = padding_of(x, cache, kernel, dilation, time_pad, space_pad);
    const Tensor dx = empty_video(x, p.b, p.c, p.frames(), p.h.size, p.w.size);
    const Tensor dcache = cache ? empty_video(x, p.b, p.c, p.cached, p.h.size, p.w.size) : nothing(x);
    const Tensor dweight = empty_beside(x, {p.c}, ScalarType::Float), dbias = empty_beside(x, {p.c}, ScalarType::Float);
    const PadBackward a{
        .padding = p, .dtype = dtype_of(x), .dpadded = video_of(dpadded), .x = video_of(x), .dx = video_of(dx),
        .dcache = cache ? video_of(dcache) : Video{}, .weight = channel_vector(weight), .bias = channel_vector(bias),
        .groups = groups, .mean = mean.const_data_ptr<float>(), .rstd = rstd.const_data_ptr<float>(),
        .dweight = dweight.mutable_data_ptr<float>(), .dbias = dbias.mutable_data_ptr<float>()};
    if (norm == "rms") Backend::template pad_backward<PadNorm::rms>(x, a);
    else Backend::template pad_backward<PadNorm::group>(x, a);
    return {dx, dweight, dbias, dcache};
  }

  template <typename Library>
  static void define(Library& m) {
    m.def("causal_pad(Tensor x, Tensor? cache, int[] kernel, int[] dilation, str time_pad, str space_pad) -> Tensor");
    m.def("causal_pad_backward(Tensor dpadded, Tensor? cache, int[] kernel, int[] dilation, str time_pad,"
          " str space_pad) -> (Tensor, Tensor)");
    m.def("norm_silu_pad(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, str norm, int groups, float eps,"
          " int[] kernel, int[] dilation, str time_pad, str space_pad) -> (Tensor, Tensor, Tensor)");
    m.def("norm_silu_pad_backward(Tensor dpadded, Tensor x, Tensor weight, Tensor? bias, Tensor? cache, Tensor mean,"
          " Tensor rstd, str norm, int groups, int[] kernel, int[] dilation, str time_pad, str space_pad)"
          " -> (Tensor, Tensor, Tensor, Tensor)");
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("causal_pad", TORCH_BOX(&causal_pad));
    m.impl("causal_pad_backward", TORCH_BOX(&causal_pad_backward));
    m.impl("norm_silu_pad", TORCH_BOX(&norm_silu_pad));
    m.impl("norm_silu_pad_backward", TORCH_BOX(&norm_silu_pad_backward));
  }
};

}  // namespace vidkern

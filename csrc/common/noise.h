// What the noise operators are told, on host and device: clips (B, F, C, H, W), a level per frame, how frames share noise.
#pragma once

#include <optional>
#include <string>

#include "common/philox.h"
#include "common/tensor.h"

namespace vidkern {

// A clip tensor; element e of a frame counts row-major over (C, H, W). Elements that lie one after another
// are one row, whatever H and W.
struct Clip {
  void* data;
  Dtype dtype;
  int64_t stride_b, stride_f, stride_c, stride_h, stride_w, h, w;
  bool dense;    // a frame's elements lie one after another
  bool aligned;  // and every frame starts at a multiple of 16 bytes

  VIDKERN_HOST_DEVICE int64_t offset(int64_t b, int64_t f) const { return b * stride_b + f * stride_f; }
};

// Goes through the elements of a frame in order.
struct Walk {
  int64_t offset, row, column;

  VIDKERN_HOST_DEVICE Walk(const Clip& clip, int64_t e) : row(e / clip.w), column(e % clip.w) {
    offset = row / clip.h * clip.stride_c + row % clip.h * clip.stride_h + column * clip.stride_w;
    row %= clip.h;
  }

  VIDKERN_HOST_DEVICE void step(const Clip& clip) {
    offset += clip.stride_w;
    if (++column < clip.w) return;
    offset += clip.stride_h - clip.w * clip.stride_w;
    column = 0;
    if (++row < clip.h) return;
    offset += clip.stride_c - clip.h * clip.stride_h;
    row = 0;
  }
};

struct Levels {  // float32 (B, F), any strides
  const float* data;
  int64_t stride_b, stride_f;

  VIDKERN_HOST_DEVICE float at(int64_t b, int64_t f) const { return data[b * stride_b + f * stride_f]; }
};

struct Level {  // of a frame
  float alpha, sigma;
};

enum class Sharing { independent, shared, mixed, progressive };

struct Noise {
  const int64_t* seed_and_offset;  // where the tensors are
  int64_t key_stride;
  Sharing sharing;
  Levels base_weight;  // for mixed and progressive
  uint32_t first_sample;

  VIDKERN_HOST_DEVICE philox::Key key() const {
    return philox::Key::fold(seed_and_offset[0], seed_and_offset[key_stride]);
  }

  // The counter's last word: of a frame's own numbers, of those that the frames of a sample share.
  VIDKERN_HOST_DEVICE uint32_t own_stream(int64_t, int64_t) const { return philox::kFrameStream; }
  VIDKERN_HOST_DEVICE uint32_t base_stream(int64_t) const { return philox::kBaseStream; }

  VIDKERN_HOST_DEVICE bool draws_base() const { return sharing == Sharing::shared || sharing == Sharing::mixed; }
};

struct Timesteps {  // int64 (B, F), any strides
  const int64_t* data;
  int64_t stride_b, stride_f;

  VIDKERN_HOST_DEVICE int64_t at(int64_t b, int64_t f) const { return data[b * stride_b + f * stride_f]; }
};

struct StepNoise : Noise {  // of a sampler's step: another timestep is other noise
  Timesteps t;
  int64_t frames;

  VIDKERN_HOST_DEVICE uint32_t own_stream(int64_t b, int64_t f) const {
    return philox::kStepFrameStream | step_word(t.at(b, f));
  }

  VIDKERN_HOST_DEVICE uint32_t base_stream(int64_t b) const {
    int64_t latest = t.at(b, 0);
    for (int64_t f = 1; f < frames; ++f) latest = t.at(b, f) > latest ? t.at(b, f) : latest;
    return philox::kStepBaseStream | step_word(latest);
  }

  VIDKERN_HOST_DEVICE static uint32_t step_word(int64_t step) {
    return static_cast<uint32_t>(step) << philox::kStreamBits;
  }
};

struct Table {  // a schedule's, float32 (T,), any stride
  const float* data;
  int64_t stride;

  VIDKERN_HOST_DEVICE float operator[](int64_t step) const { return data[step * stride]; }
};

// What a model regresses on, of clean x, noise n and the frame's levels.
enum class Target { none, epsilon, v, flow, x0 };

struct Frames {
  int64_t b, f, elements;  // samples, frames of a sample, elements of a frame
};

inline Frames frames_of(const Tensor& clip) {
  int64_t elements = 1;
  for (int64_t dim = 2; dim < clip.dim(); ++dim) elements *= clip.size(dim);
  return {clip.size(0), clip.size(1), elements};
}

// Channels first <= c < first + channels of a tensor (B, F, C, H, W), any strides.
inline Clip clip_of(const Tensor& t, int64_t first, int64_t channels) {
  const int64_t h = t.size(3), w = t.size(4), step = t.stride(4);
  const auto size = static_cast<int64_t>(t.element_size());
  char* data = static_cast<char*>(t.data_ptr()) + first * t.stride(2) * size;
  const bool dense = (w < 2 || step == 1) && (h < 2 || t.stride(3) == w) && (channels < 2 || t.stride(2) == h * w);
  const auto in_16_bytes = [&](int64_t bytes) { return bytes % 16 == 0; };
  const bool aligned = dense && in_16_bytes(reinterpret_cast<intptr_t>(data)) &&
                       (t.size(0) < 2 || in_16_bytes(t.stride(0) * size)) &&
                       (t.size(1) < 2 || in_16_bytes(t.stride(1) * size));
  Clip clip{data, dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3), step, h, w, dense, aligned};
  if (dense) clip.h = 1, clip.w = channels * h * w, clip.stride_w = 1;
  return clip;
}

inline Clip clip_of(const Tensor& t) { return clip_of(t, 0, t.size(2)); }

// Half 0 or 1 of a tensor's channels.
inline Clip half_of(const Tensor& t, int half) {
  const int64_t channels = t.size(2) / 2;
  return clip_of(t, half * channels, channels);
}

inline Clip contiguous_clip(const Tensor& t) {  // (B, F, ...), contiguous
  const Frames frames = frames_of(t);
  const int64_t n = frames.elements;
  const bool aligned = n * static_cast<int64_t>(t.element_size()) % 16 == 0;
  return {t.data_ptr(), dtype_of(t), frames.f * n, n, n, n, 1, 1, n, true, aligned};
}

inline Timesteps timesteps_of(const Tensor& t) { return {t.const_data_ptr<int64_t>(), t.stride(0), t.stride(1)}; }

inline Levels levels_of(const Tensor& t) { return {t.const_data_ptr<float>(), t.stride(0), t.stride(1)}; }

inline Table table_of(const Tensor& t) { return {t.const_data_ptr<float>(), t.stride(0)}; }

inline Sharing sharing_of(const std::string& name) {
  if (name == "independent") return Sharing::independent;
  if (name == "shared") return Sharing::shared;
  if (name == "mixed") return Sharing::mixed;
  STD_TORCH_CHECK(name == "progressive", "no such sharing: ", name);
  return Sharing::progressive;
}

inline Target target_of(const std::optional<std::string>& name) {
  if (!name) return Target::none;
  if (*name == "epsilon") return Target::epsilon;
  if (*name == "v") return Target::v;
  if (*name == "flow") return Target::flow;
  STD_TORCH_CHECK(*name == "x0", "no such target: ", *name);
  return Target::x0;
}

inline Noise noise_of(
    const Tensor& key, const std::string& sharing, const std::optional<Tensor>& base_weight, int64_t sample_offset) {
  return {key.const_data_ptr<int64_t>(), key.stride(0), sharing_of(sharing), base_weight ? levels_of(*base_weight) : Levels{},
          static_cast<uint32_t>(sample_offset)};
}

inline Tensor empty_clip(const Tensor& like) {
  return empty_beside(like, {like.size(0), like.size(1), like.size(2), like.size(3), like.size(4)}, like.scalar_type());
}

inline Tensor empty_levels(const Tensor& clip) {  // float32 (B, F)
  return empty_beside(clip, {clip.size(0), clip.size(1)}, ScalarType::Float);
}

// The operators' schemas, the same in every compiled library.
template <typename Library>
void define_noise(Library& m) {
  m.def("philox_normal(int[] shape, Tensor key, str sharing, Tensor? base_weight, int sample_offset,"
        " ScalarType dtype) -> Tensor");
  m.def("add_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor key, str? target, str sharing, Tensor? base_weight,"
        " int sample_offset) -> (Tensor, Tensor)");
  m.def("add_noise_backward(Tensor? dx_t, Tensor? dtarget, Tensor x0, Tensor alpha, Tensor sigma, Tensor key,"
        " str? target, str sharing, Tensor? base_weight, int sample_offset) -> (Tensor, Tensor, Tensor)");
  m.def("diffusion_mse(Tensor pred, Tensor x0, Tensor alpha, Tensor sigma, Tensor key, str prediction, str sharing,"
        " Tensor? base_weight, int sample_offset) -> (Tensor, Tensor)");
  m.def("diffusion_mse_backward(Tensor dmse, Tensor residual) -> Tensor");
  m.def("hybrid_loss(Tensor model_out, Tensor x0, Tensor alpha, Tensor sigma, Tensor t, Tensor posterior_mean_coef,"
        " Tensor posterior_log_variance, Tensor log_beta, Tensor key, str prediction, str sharing, Tensor? base_weight,"
        " int sample_offset) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("hybrid_loss_backward(Tensor dmse, Tensor dvb, Tensor factors, Tensor slope) -> Tensor");
}

}  // namespace vidkern

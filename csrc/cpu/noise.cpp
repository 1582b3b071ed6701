// The noise family on the CPU: a thread takes a stretch of a sample's elements through all frames, so that noise which
// frames share is drawn once.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/noise.h"
#include "cpu/vec.h"

namespace vidkern::cpu {
namespace {

constexpr int64_t kStretch = 1024;            // elements: a few rows of floats in the first cache
constexpr int64_t kElementsPerThread = 8192;  // below this a second thread costs more than it brings

// Elements first <= e < first + count of every frame of sample b.
struct Stretch {
  int64_t b, first, count;
};

struct Stretches {
  Frames frames;
  int64_t per_sample;

  explicit Stretches(const Frames& frames)
      : frames(frames), per_sample((frames.elements + kStretch - 1) / kStretch) {}

  Stretch operator[](int64_t index) const {
    const int64_t first = index % per_sample * kStretch;
    return {index / per_sample, first, std::min(kStretch, frames.elements - first)};
  }
};

template <typename F>
void for_each_stretch(const Stretches& stretches, F f) {
  const int64_t elements = kStretch * stretches.frames.f, count = stretches.frames.b * stretches.per_sample;
  torch::stable::parallel_for(0, count, (kElementsPerThread + elements - 1) / std::max<int64_t>(elements, 1),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t index = begin; index < end; ++index) f(stretches[index]);
                              });
}

struct alignas(64) Row {
  float values[kStretch];
};

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

// The noise of a stretch, frame after frame.
class StretchNoise {
 public:
  StretchNoise(const Noise& noise, const Stretch& stretch)
      : noise_(noise), stretch_(stretch), key_(noise.key()) {
    if (noise.draws_base()) draw_row(philox::kBaseStream, 0, base_);
  }

  const float* frame(int64_t f) {
    switch (noise_.sharing) {
      case Sharing::independent: break;
      case Sharing::shared: return base_.values;
      case Sharing::mixed:
        draw_row(philox::kFrameStream, f, own_);
        mix(noise_.base_weight.at(stretch_.b, f), base_.values, own_.values, own_.values, stretch_.count);
        return own_.values;
      case Sharing::progressive:
        if (f == 0) break;
        draw_row(philox::kFrameStream, f, base_);
        mix(noise_.base_weight.at(stretch_.b, f), own_.values, base_.values, own_.values, stretch_.count);
        return own_.values;
    }
    draw_row(philox::kFrameStream, f, own_);
    return own_.values;
  }

 private:
  void draw_row(uint32_t stream, int64_t f, Row& row) const {
    constexpr int64_t k = philox::kLanes;
    const philox::Words counter{static_cast<uint32_t>(stretch_.first / k), static_cast<uint32_t>(f),
                                noise_.first_sample + static_cast<uint32_t>(stretch_.b), stream};
    draw(counter, key_, row.values, (stretch_.count + k - 1) / k);
  }

  const Noise& noise_;
  Stretch stretch_;
  philox::Key key_;
  Row base_ = {}, own_ = {};
};

// --- rows of a clip in float32 ---

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

// Returns the stretch of frame f as floats: in `row`, or where it lies.
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

// Rounds a row into the stretch of frame f of a contiguous clip.
VIDKERN_CLONES void write(const Clip& clip, const Stretch& stretch, int64_t f, const float* row) {
  with_type(clip.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    using T = decltype(element);
    T* to = static_cast<T*>(clip.data) + clip.offset(stretch.b, f) + stretch.first;
    round(row, to, stretch.count);
  });
}

// --- one row of a frame ---

struct Level {  // of a frame
  float alpha, sigma;
};

VIDKERN_CLONES void diffuse(Level level, const float* x, const float* n, float* x_t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x_t[i] = level.alpha * x[i] + level.sigma * n[i];
}

VIDKERN_CLONES void target_row(Target target, Level level, const float* x, const float* n, float* out, int64_t count) {
  switch (target) {
    case Target::none: return;
    case Target::epsilon: std::copy_n(n, count, out); return;
    case Target::x0: std::copy_n(x, count, out); return;
    case Target::flow:
      for (int64_t i = 0; i < count; ++i) out[i] = n[i] - x[i];
      return;
    case Target::v:
      for (int64_t i = 0; i < count; ++i) out[i] = level.alpha * n[i] - level.sigma * x[i];
      return;
  }
}

VIDKERN_CLONES void subtract(const float* pred, float* row, int64_t count) {  // row = pred - row
  for (int64_t i = 0; i < count; ++i) row[i] = pred[i] - row[i];
}

VIDKERN_CLONES void scale(float factor, const float* row, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = factor * row[i];
}

VIDKERN_CLONES float sum_of_products(const float* a, const float* b, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  Sum sum;
  for_each_vec(whole, [&](int64_t i, int k) VIDKERN_INLINE_LAMBDA { sum.chain[k] += load(a + i) * load(b + i); });
  float total = sum.total();
  for (int64_t i = whole; i < count; ++i) total += a[i] * b[i];
  return total;
}

// dx = dx -+ factor * the target's gradient
VIDKERN_CLONES void add_target_grad(Target target, float sigma, const float* dtarget, float* dx, int64_t count) {
  switch (target) {
    case Target::none:
    case Target::epsilon: return;
    case Target::x0:
      for (int64_t i = 0; i < count; ++i) dx[i] = dx[i] + dtarget[i];
      return;
    case Target::flow:
      for (int64_t i = 0; i < count; ++i) dx[i] = dx[i] - dtarget[i];
      return;
    case Target::v:
      for (int64_t i = 0; i < count; ++i) dx[i] = dx[i] - sigma * dtarget[i];
      return;
  }
}

// --- sums over frames ---

// A number of each frame and stretch, (B, F, stretches): added up in their order, they depend on no number of threads.
class FrameSums {
 public:
  explicit FrameSums(const Stretches& stretches)
      : frames_(stretches.frames), per_sample_(stretches.per_sample),
        parts_(static_cast<size_t>(frames_.b * frames_.f * per_sample_)) {}

  float& part(const Stretch& stretch, int64_t f) {
    return parts_[static_cast<size_t>((stretch.b * frames_.f + f) * per_sample_ + stretch.first / kStretch)];
  }

  void divided_into(double divisor, const Tensor& totals) const {  // float32 (B, F), contiguous
    float* out = totals.mutable_data_ptr<float>();
    const float* part = parts_.data();
    for (int64_t frame = 0; frame < frames_.b * frames_.f; ++frame, part += per_sample_) {
      double total = 0.0;
      for (int64_t i = 0; i < per_sample_; ++i) total += part[i];
      out[frame] = static_cast<float>(total / divisor);
    }
  }

 private:
  Frames frames_;
  int64_t per_sample_;
  std::vector<float> parts_;
};

// --- the operators ---

Tensor philox_normal(std::vector<int64_t> shape, const Tensor& key, std::string sharing,
                     std::optional<Tensor> base_weight, int64_t sample_offset, ScalarType dtype) {
  const Tensor out = torch::stable::new_empty(key, shape, dtype);
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Clip clip = contiguous_clip(out);
  const Stretches stretches(frames_of(out));
  for_each_stretch(stretches, [&](const Stretch& stretch) {
    StretchNoise frames(noise, stretch);
    for (int64_t f = 0; f < stretches.frames.f; ++f) write(clip, stretch, f, frames.frame(f));
  });
  return out;
}

std::tuple<Tensor, Tensor> add_noise(
    const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& key, std::optional<std::string> target,
    std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  const Tensor x_t = empty_clip(x0), regressed = target ? empty_clip(x0) : empty_beside(x0, {0}, x0.scalar_type());
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Clip from = clip_of(x0), to = contiguous_clip(x_t);
  const Clip target_to = target ? contiguous_clip(regressed) : Clip{};
  const Target kind = target_of(target);
  const Levels alphas = levels_of(alpha), sigmas = levels_of(sigma);
  const Stretches stretches(frames_of(x0));
  for_each_stretch(stretches, [&](const Stretch& stretch) {
    StretchNoise frames(noise, stretch);
    Row x_row, row;
    for (int64_t f = 0; f < stretches.frames.f; ++f) {
      const Level level{alphas.at(stretch.b, f), sigmas.at(stretch.b, f)};
      const float *n = frames.frame(f), *x = read(from, stretch, f, x_row);
      diffuse(level, x, n, row.values, stretch.count);
      write(to, stretch, f, row.values);
      if (kind == Target::none) continue;
      target_row(kind, level, x, n, row.values, stretch.count);
      write(target_to, stretch, f, row.values);
    }
  });
  return {x_t, regressed};
}

std::tuple<Tensor, Tensor, Tensor> add_noise_backward(
    std::optional<Tensor> dx_t, std::optional<Tensor> dtarget, const Tensor& x0, const Tensor& alpha,
    const Tensor& sigma, const Tensor& key, std::optional<std::string> target, std::string sharing,
    std::optional<Tensor> base_weight, int64_t sample_offset) {
  const Tensor dx0 = empty_clip(x0), dalpha = empty_levels(x0), dsigma = empty_levels(x0);
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Clip from = clip_of(x0), to = contiguous_clip(dx0);
  const Target kind = dtarget ? target_of(target) : Target::none;
  const Clip dx_t_from = dx_t ? clip_of(*dx_t) : Clip{};
  const Clip dtarget_from = kind == Target::none ? Clip{} : clip_of(*dtarget);
  const Levels alphas = levels_of(alpha), sigmas = levels_of(sigma);
  const Stretches stretches(frames_of(x0));
  FrameSums dalphas(stretches), dsigmas(stretches);
  for_each_stretch(stretches, [&](const Stretch& stretch) {
    const int64_t count = stretch.count;
    StretchNoise frames(noise, stretch);
    Row x_row, grad_row, dx;
    for (int64_t f = 0; f < stretches.frames.f; ++f) {
      const Level level{alphas.at(stretch.b, f), sigmas.at(stretch.b, f)};
      const float *n = frames.frame(f), *x = read(from, stretch, f, x_row);
      float &dalpha = dalphas.part(stretch, f) = 0.0f, &dsigma = dsigmas.part(stretch, f) = 0.0f;
      std::fill_n(dx.values, count, 0.0f);
      if (dx_t) {
        const float* grad = read(dx_t_from, stretch, f, grad_row);
        scale(level.alpha, grad, dx.values, count);
        dalpha += sum_of_products(grad, x, count);
        dsigma += sum_of_products(grad, n, count);
      }
      if (kind != Target::none) {
        const float* grad = read(dtarget_from, stretch, f, grad_row);
        add_target_grad(kind, level.sigma, grad, dx.values, count);
        if (kind == Target::v) {
          dalpha += sum_of_products(grad, n, count);
          dsigma -= sum_of_products(grad, x, count);
        }
      }
      write(to, stretch, f, dx.values);
    }
  });
  dalphas.divided_into(1.0, dalpha);
  dsigmas.divided_into(1.0, dsigma);
  return {dx0, dalpha, dsigma};
}

std::tuple<Tensor, Tensor> diffusion_mse(
    const Tensor& pred, const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& key,
    std::string prediction, std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  const Tensor mse = empty_levels(pred), residual = empty_clip(pred);
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Clip pred_from = clip_of(pred), from = clip_of(x0), to = contiguous_clip(residual);
  const Target kind = target_of(prediction);
  const Levels alphas = levels_of(alpha), sigmas = levels_of(sigma);
  const Stretches stretches(frames_of(x0));
  FrameSums squares(stretches);
  for_each_stretch(stretches, [&](const Stretch& stretch) {
    StretchNoise frames(noise, stretch);
    Row x_row, pred_row, row;
    for (int64_t f = 0; f < stretches.frames.f; ++f) {
      const Level level{alphas.at(stretch.b, f), sigmas.at(stretch.b, f)};
      const float* x = kind == Target::epsilon ? nullptr : read(from, stretch, f, x_row);
      const float* n = kind == Target::x0 ? nullptr : frames.frame(f);
      target_row(kind, level, x, n, row.values, stretch.count);
      subtract(read(pred_from, stretch, f, pred_row), row.values, stretch.count);
      squares.part(stretch, f) = sum_of_products(row.values, row.values, stretch.count);
      write(to, stretch, f, row.values);
    }
  });
  squares.divided_into(static_cast<double>(stretches.frames.elements), mse);
  return {mse, residual};
}

Tensor diffusion_mse_backward(const Tensor& dmse, const Tensor& residual) {
  const Tensor dpred = empty_clip(residual);
  const Clip from = clip_of(residual), to = contiguous_clip(dpred);
  const Levels grads = levels_of(dmse);
  const Stretches stretches(frames_of(residual));
  const auto factor = static_cast<float>(2.0 / static_cast<double>(stretches.frames.elements));
  for_each_stretch(stretches, [&](const Stretch& stretch) {
    Row residual_row, row;
    for (int64_t f = 0; f < stretches.frames.f; ++f) {
      const float* values = read(from, stretch, f, residual_row);
      scale(grads.at(stretch.b, f) * factor, values, row.values, stretch.count);
      write(to, stretch, f, row.values);
    }
  });
  return dpred;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) { define_noise(m); }

STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("add_noise_backward", TORCH_BOX(&add_noise_backward));
  m.impl("diffusion_mse", TORCH_BOX(&diffusion_mse));
  m.impl("diffusion_mse_backward", TORCH_BOX(&diffusion_mse_backward));
}

}  // namespace vidkern::cpu

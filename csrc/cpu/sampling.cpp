// The sampler's steps on the CPU, one pass each: a thread takes a stretch of a sample's elements through all frames.
#include <optional>
#include <string>
#include <vector>

#include "common/sampling.h"
#include "cpu/exp.h"
#include "cpu/noise_stretch.h"
#include "cpu/vec.h"

namespace vidkern::cpu {
namespace {

using sampling::FrameStep;
using sampling::Method;
using sampling::Variance;

// --- one row of a frame ---

VIDKERN_CLONES void guide(float scale, const float* cond, const float* uncond, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = sampling::guided(scale, cond[i], uncond[i]);
}

// (the frame's numbers by value: rows of floats cannot change them)
template <Method method>
VIDKERN_INLINE void move_row(
    const sampling::Step& step, FrameStep s, const float* x, const float* m, float* out, int64_t count) {
  sampling::with_rule<method>(step, [&, clip = step.clip](auto moved) VIDKERN_INLINE_LAMBDA {
    for (int64_t i = 0; i < count; ++i) out[i] = moved(s, clip, x[i], m[i]);
  });
}

VIDKERN_CLONES void move(Method method, const sampling::Step& step, FrameStep s, const float* x, const float* m,
                         float* out, int64_t count) {
  switch (method) {
    case Method::ddim: return move_row<Method::ddim>(step, s, x, m, out, count);
    case Method::ddpm: return move_row<Method::ddpm>(step, s, x, m, out, count);
    case Method::flow: return move_row<Method::flow>(step, s, x, m, out, count);
  }
}

VIDKERN_CLONES void add_scaled(float std, const float* n, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = out[i] + std * n[i];
}

constexpr float kExpRange = 104.0f;  // beyond, e^x is 0 or infinite

// e^x within 1 ulp, |x| <= kExpRange.
VIDKERN_INLINE float exp(float x) {
  constexpr int32_t kBias = 127, kFractionBits = 23;
  const Exponential<float> e(x);
  // 2^n in two factors, as it may be no float itself
  const auto n = static_cast<int32_t>(bit_cast<uint32_t>(e.shifted) - bit_cast<uint32_t>(e.kShift));
  const auto two_to_the = [](int32_t k) VIDKERN_INLINE_LAMBDA {
    return bit_cast<float>(static_cast<uint32_t>(k + kBias) << kFractionBits);
  };
  const int32_t half = n >> 1;
  return (e.rest + 1.0f) * two_to_the(half) * two_to_the(n - half);
}

// (two loops, so that GCC vectorises both) `logs` may be v
VIDKERN_CLONES void add_learned(
    FrameStep s, const float* v, const float* n, float* logs, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) logs[i] = sampling::clamped(sampling::log_std(s, v[i]), kExpRange);
  for (int64_t i = 0; i < count; ++i) out[i] = out[i] + exp(logs[i]) * n[i];
}

// --- the operators ---

template <Method method>
std::vector<FrameStep> frame_steps(const sampling::Step& step, const Frames& frames) {
  std::vector<FrameStep> steps(static_cast<size_t>(frames.b * frames.f));
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto frame = static_cast<int64_t>(i);
    steps[i] = sampling::frame_step<method>(step, frame / frames.f, frame % frames.f);
  }
  return steps;
}

template <Method method>
Tensor run(const Tensor& x_t, const Tensor& model_out, const sampling::Step& step, const StepNoise* draws) {
  const Tensor x_prev = empty_clip(x_t);
  const Clip from = clip_of(x_t), to = contiguous_clip(x_prev);
  const sampling::ModelClips model = sampling::model_clips_of(model_out, x_t);
  const Stretches stretches(frames_of(x_t));
  const std::vector<FrameStep> steps = frame_steps<method>(step, stretches.frames);
  const bool learned = method == Method::ddpm && step.variance == Variance::learned_range;
  const bool chained = draws && draws->sharing == Sharing::progressive;
  for_each_stretch(stretches, [&](const Stretch& stretch) {
    std::optional<StretchNoise<StepNoise>> noise;
    if (draws) noise.emplace(*draws, stretch);
    Row x_row, m_row, row;
    for (int64_t f = 0; f < stretches.frames.f; ++f) {
      const FrameStep& s = steps[static_cast<size_t>(stretch.b * stretches.frames.f + f)];
      const bool keeps = step.keeps(stretch.b, f), meets_noise = s.draws && !keeps;
      const float* n = meets_noise || chained ? noise->frame(f) : nullptr;  // a chain passes through every frame
      if (keeps) {
        copy(from, to, stretch, f);
        continue;
      }
      const float *x = read(from, stretch, f, x_row), *m = read(model.cond, stretch, f, m_row);
      if (step.guided) {
        guide(step.guidance, m, read(model.uncond, stretch, f, row), m_row.values, stretch.count);
        m = m_row.values;
      }
      float* out = place(to, stretch, f, row);
      move(method, step, s, x, m, out, stretch.count);
      if (meets_noise && learned) {
        const float* v = read(model.variance, stretch, f, m_row);
        add_learned(s, v, n, m_row.values, out, stretch.count);
      } else if (meets_noise) {
        add_scaled(s.std, n, out, stretch.count);
      }
      write(to, stretch, f, out);
    }
  });
  return x_prev;
}

Tensor ddim_step(const Tensor& x_t, const Tensor& model_out, const Tensor& t, const Tensor& t_prev,
                 const Tensor& alphas_cumprod, std::string prediction, double eta, std::optional<Tensor> key,
                 std::optional<double> guidance_scale, std::optional<Tensor> hold, std::optional<double> clip_x0,
                 std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  sampling::Step step = sampling::step_of(t, t_prev, alphas_cumprod, prediction, guidance_scale, hold, clip_x0);
  if (eta == 0.0) return run<Method::ddim>(x_t, model_out, step, nullptr);
  step.eta_squared = static_cast<float>(eta * eta);
  const StepNoise noise = sampling::step_noise_of(t, *key, sharing, base_weight, sample_offset);
  return run<Method::ddim>(x_t, model_out, step, &noise);
}

Tensor ddpm_step(const Tensor& x_t, const Tensor& model_out, const Tensor& t, const Tensor& t_prev,
                 const Tensor& alphas_cumprod, std::string prediction, std::string variance, const Tensor& key,
                 std::optional<double> guidance_scale, std::optional<Tensor> hold, std::optional<double> clip_x0,
                 std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  sampling::Step step = sampling::step_of(t, t_prev, alphas_cumprod, prediction, guidance_scale, hold, clip_x0);
  step.variance = sampling::variance_of(variance);
  const StepNoise noise = sampling::step_noise_of(t, key, sharing, base_weight, sample_offset);
  return run<Method::ddpm>(x_t, model_out, step, &noise);
}

Tensor flow_step(const Tensor& x_t, const Tensor& model_out, const Tensor& t, const Tensor& t_prev,
                 const Tensor& sigma, std::string prediction, std::optional<double> guidance_scale,
                 std::optional<Tensor> hold, std::optional<double> clip_x0) {
  const sampling::Step step = sampling::step_of(t, t_prev, sigma, prediction, guidance_scale, hold, clip_x0);
  return run<Method::flow>(x_t, model_out, step, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) { sampling::define(m); }

STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) {
  m.impl("ddim_step", TORCH_BOX(&ddim_step));
  m.impl("ddpm_step", TORCH_BOX(&ddpm_step));
  m.impl("flow_step", TORCH_BOX(&flow_step));
}

}  // namespace vidkern::cpu

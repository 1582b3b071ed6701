// A sampler's step on host and device: what it is told, the numbers of a frame, the arithmetic of an element.
//
// The arithmetic is that of vidkern/ops/sampling/reference.py, operation by operation and rounded one by one.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "common/noise.h"

namespace vidkern::sampling {

enum class Method { ddim, ddpm, flow };
enum class Prediction { epsilon, v, x0, flow };
enum class Variance { learned_range, fixed_small, fixed_large };

struct Held {  // bool (B, F), any strides; null: no frame
  const bool* data;
  int64_t stride_b, stride_f;

  VIDKERN_HOST_DEVICE bool at(int64_t b, int64_t f) const { return data && data[b * stride_b + f * stride_f]; }
};

struct Step {
  Prediction prediction;
  Variance variance;  // of ddpm
  Timesteps t, t_prev;
  Table table;
  Held hold;
  float eta_squared;  // of ddim
  bool guided, clips;
  float guidance, clip;

  VIDKERN_HOST_DEVICE float level(int64_t t, float clean) const { return t < 0 ? clean : table[t]; }

  // Whether a frame comes out as it went in.
  VIDKERN_HOST_DEVICE bool keeps(int64_t b, int64_t f) const { return t.at(b, f) < 0 || hold.at(b, f); }
};

// The numbers of a frame. The model's output is m, its variance channels are v.
struct FrameStep {
  float alpha, sigma, one_by_alpha, one_by_sigma;
  float start, along;  // x' = start * x0 + along * (epsilon or x) + std * n; flow: x' = x + along * velocity
  float std;
  float log_low, log_range;  // learned: std = exp((log_low + (v + 1) / 2 * log_range) / 2)
  bool draws;
};

using philox::add;
using philox::multiply;
using philox::root;

#ifdef __CUDA_ARCH__
VIDKERN_PHILOX float divide(float a, float b) { return __fdiv_rn(a, b); }
#else
VIDKERN_PHILOX float divide(float a, float b) { return a / b; }
#endif

VIDKERN_PHILOX float subtract(float a, float b) { return add(a, -b); }

VIDKERN_PHILOX float clamped(float v, float bound) {  // NaN stays
  v = v < -bound ? -bound : v;
  return v > bound ? bound : v;
}

// --- a frame ---

VIDKERN_PHILOX FrameStep frame_at(float alpha, float sigma) {
  FrameStep s = {};
  s.alpha = alpha, s.one_by_alpha = divide(1.0f, alpha);
  s.sigma = sigma, s.one_by_sigma = divide(1.0f, sigma);
  return s;
}

VIDKERN_PHILOX FrameStep ddim_frame(const Step& step, float abar, float abar_prev) {
  const float noise = subtract(1.0f, abar), noise_prev = subtract(1.0f, abar_prev);
  // of the variance noise_prev, the share that is new
  const float share =
      multiply(step.eta_squared, divide(subtract(abar_prev, abar), multiply(abar_prev, noise)));
  const float rest = subtract(1.0f, share);
  FrameStep s = frame_at(root(abar), root(noise));
  s.start = root(abar_prev);
  s.along = root(multiply(noise_prev, rest < 0.0f ? 0.0f : rest));
  s.std = root(multiply(noise_prev, share));
  s.draws = step.eta_squared > 0.0f && s.std != 0.0f;
  return s;
}

VIDKERN_PHILOX FrameStep ddpm_frame(const Step& step, float abar, float abar_prev) {
  const float noise = subtract(1.0f, abar), noise_prev = subtract(1.0f, abar_prev);
  const float beta = divide(subtract(abar_prev, abar), abar_prev), shrink = divide(noise_prev, noise);
  const float posterior = multiply(beta, shrink);
  FrameStep s = frame_at(root(abar), root(noise));
  s.start = divide(multiply(beta, root(abar_prev)), noise);
  s.along = multiply(root(divide(abar, abar_prev)), shrink);
  s.draws = posterior > 0.0f;  // the last step adds none
  if (step.variance != Variance::learned_range) {
    s.std = root(step.variance == Variance::fixed_small ? posterior : beta);
  } else if (s.draws) {
    s.log_low = std::log(posterior);
    s.log_range = subtract(std::log(beta), s.log_low);
  }
  return s;
}

VIDKERN_PHILOX FrameStep flow_frame(float sigma, float sigma_prev) {
  FrameStep s = frame_at(1.0f, sigma);
  s.along = subtract(sigma_prev, sigma);
  return s;
}

template <Method method>
VIDKERN_PHILOX FrameStep frame_step(const Step& step, int64_t b, int64_t f) {
  constexpr float kClean = method == Method::flow ? 0.0f : 1.0f;
  const float now = step.level(step.t.at(b, f), kClean), then = step.level(step.t_prev.at(b, f), kClean);
  if constexpr (method == Method::ddim) return ddim_frame(step, now, then);
  else if constexpr (method == Method::ddpm) return ddpm_frame(step, now, then);
  else return flow_frame(now, then);
}

// --- an element ---

VIDKERN_PHILOX float guided(float scale, float cond, float uncond) {
  return add(uncond, multiply(scale, subtract(cond, uncond)));
}

// x' without its noise.
template <Method method, Prediction prediction, bool clips>
VIDKERN_PHILOX float moved(const FrameStep& s, float clip, float x, float m) {
  if constexpr (method == Method::flow && prediction == Prediction::flow && !clips) return add(x, multiply(s.along, m));
  float x0 = m;
  if constexpr (prediction == Prediction::epsilon) x0 = multiply(s.one_by_alpha, subtract(x, multiply(s.sigma, m)));
  if constexpr (prediction == Prediction::v) x0 = subtract(multiply(s.alpha, x), multiply(s.sigma, m));
  if constexpr (prediction == Prediction::flow) x0 = subtract(x, multiply(s.sigma, m));
  if constexpr (clips) x0 = clamped(x0, clip);
  if constexpr (method == Method::ddpm) return add(multiply(s.start, x0), multiply(s.along, x));
  float direction = m;  // epsilon, or the velocity
  if constexpr (prediction == Prediction::v && !clips) direction = add(multiply(s.alpha, m), multiply(s.sigma, x));
  else if constexpr (prediction == Prediction::x0 || clips)
    direction = multiply(s.one_by_sigma, subtract(x, multiply(s.alpha, x0)));
  return add(method == Method::flow ? x : multiply(s.start, x0), multiply(s.along, direction));
}

// The logarithm of the learned variance, halved.
VIDKERN_PHILOX float log_std(const FrameStep& s, float v) {
  const float fraction = multiply(add(v, 1.0f), 0.5f);
  return multiply(0.5f, add(s.log_low, multiply(fraction, s.log_range)));
}

template <Method method, Prediction prediction, bool clips>
struct Rule {
  VIDKERN_PHILOX float operator()(const FrameStep& s, float clip, float x, float m) const {
    return moved<method, prediction, clips>(s, clip, x, m);
  }
};

template <Method method, Prediction prediction, typename F>
VIDKERN_PHILOX void with_clipping(const Step& step, F f) {
  if (step.clips) f(Rule<method, prediction, true>{});
  else f(Rule<method, prediction, false>{});
}

// Calls f with the rule that a step follows, so that a loop in f knows what the model predicts.
template <Method method, typename F>
VIDKERN_PHILOX void with_rule(const Step& step, F f) {
  if (step.prediction == Prediction::x0) return with_clipping<method, Prediction::x0>(step, f);
  if constexpr (method == Method::flow) return with_clipping<method, Prediction::flow>(step, f);
  else if (step.prediction == Prediction::epsilon) with_clipping<method, Prediction::epsilon>(step, f);
  else with_clipping<method, Prediction::v>(step, f);
}

// --- arguments ---

inline Prediction prediction_of(const std::string& name) {
  if (name == "epsilon") return Prediction::epsilon;
  if (name == "v") return Prediction::v;
  if (name == "flow") return Prediction::flow;
  STD_TORCH_CHECK(name == "x0", "no such prediction: ", name);
  return Prediction::x0;
}

inline Variance variance_of(const std::string& name) {
  if (name == "learned_range") return Variance::learned_range;
  if (name == "fixed_small") return Variance::fixed_small;
  STD_TORCH_CHECK(name == "fixed_large", "no such variance: ", name);
  return Variance::fixed_large;
}

inline Step step_of(const Tensor& t, const Tensor& t_prev, const Tensor& table, const std::string& prediction,
                    std::optional<double> guidance_scale, const std::optional<Tensor>& hold,
                    std::optional<double> clip_x0) {
  Step step = {};
  step.prediction = prediction_of(prediction);
  step.t = timesteps_of(t), step.t_prev = timesteps_of(t_prev);
  step.table = table_of(table);
  if (hold) step.hold = {hold->const_data_ptr<bool>(), hold->stride(0), hold->stride(1)};
  step.guided = guidance_scale.has_value(), step.guidance = static_cast<float>(guidance_scale.value_or(1.0));
  step.clips = clip_x0.has_value(), step.clip = static_cast<float>(clip_x0.value_or(0.0));
  return step;
}

inline StepNoise step_noise_of(const Tensor& t, const Tensor& key, const std::string& sharing,
                               const std::optional<Tensor>& base_weight, int64_t sample_offset) {
  return {noise_of(key, sharing, base_weight, sample_offset), timesteps_of(t), t.size(1)};
}

// The parts of a model's output (B or 2B, F, C or 2C, H, W), each read as (B, F, C, H, W).
struct ModelClips {
  Clip cond, uncond, variance;
};

inline ModelClips model_clips_of(const Tensor& model_out, const Tensor& x_t) {
  const Clip whole = clip_of(model_out);
  const auto from = [&](int64_t elements) {
    const int64_t bytes = elements * static_cast<int64_t>(model_out.element_size());
    Clip part = whole;
    part.data = static_cast<char*>(whole.data) + bytes;
    part.aligned = whole.aligned && bytes % 16 == 0;
    return part;
  };
  return {whole, from(x_t.size(0) * model_out.stride(0)), from(x_t.size(2) * model_out.stride(2))};
}

// The operators' schemas, the same in every compiled library.
template <typename Library>
void define(Library& m) {
  m.def("ddim_step(Tensor x_t, Tensor model_out, Tensor t, Tensor t_prev, Tensor alphas_cumprod, str prediction,"
        " float eta, Tensor? key, float? guidance_scale, Tensor? hold, float? clip_x0, str sharing,"
        " Tensor? base_weight, int sample_offset) -> Tensor");
  m.def("ddpm_step(Tensor x_t, Tensor model_out, Tensor t, Tensor t_prev, Tensor alphas_cumprod, str prediction,"
        " str variance, Tensor key, float? guidance_scale, Tensor? hold, float? clip_x0, str sharing,"
        " Tensor? base_weight, int sample_offset) -> Tensor");
  m.def("flow_step(Tensor x_t, Tensor model_out, Tensor t, Tensor t_prev, Tensor sigma, str prediction,"
        " float? guidance_scale, Tensor? hold, float? clip_x0) -> Tensor");
}

}  // namespace vidkern::sampling

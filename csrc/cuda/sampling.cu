// The sampler's steps on CUDA, one launch each: a thread owns eight elements of a frame, and draws the noise that they meet.
//
// A frame's numbers come from the schedule's table on the device: one thread of a block works them out while the loads
// of all are under way.
#include <optional>
#include <string>
#include <type_traits>

#include "common/launch.h"
#include "common/sampling.h"
#include "cuda/noise_tile.h"

namespace vidkern::cuda {
namespace {

using sampling::FrameStep;
using sampling::Method;
using sampling::Variance;

struct StepArguments {
  Work work;
  sampling::Step step;
  StepNoise noise;
  Clip x_t;
  sampling::ModelClips model;
  Clip x_prev;
};

struct Silence {  // in the place of noise
  float n[kPack];

  __device__ Silence(const StepNoise&, const Part&) {}
  __device__ void draw_frame(int64_t) {}
};

template <typename T>
__device__ inline void store_bits(T* to, int count, const uint32_t (&bits)[kPack]) {
  for_each([&](int i) {
    if (i < count) to[i] = static_cast<T>(bits[i]);
  });
}

// Puts words where they were loaded from in another clip, bit for bit.
__device__ inline void store_words(const Clip& clip, const Part& part, int64_t f, const Words8& words) {
  const uint4 low = words.low, high = words.high;
  const bool wide = clip.aligned && part.count == kPack;
  const int64_t offset = clip.offset(part.b, f) + part.e;
  if (clip.dtype == Dtype::float32) {
    auto* to = static_cast<uint32_t*>(clip.data) + offset;
    if (wide) reinterpret_cast<uint4*>(to)[0] = low, reinterpret_cast<uint4*>(to)[1] = high;
    else store_bits(to, part.count, {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w});
  } else {
    auto* to = static_cast<uint16_t*>(clip.data) + offset;
    if (wide) reinterpret_cast<uint4*>(to)[0] = low;
    else store_bits(to, part.count, {low.x, low.x >> 16, low.y, low.y >> 16, low.z, low.z >> 16, low.w, low.w >> 16});
  }
}

template <Method kMethod, bool kDraws>
__global__ void __launch_bounds__(kThreads) step_kernel(const StepArguments a) {
  __shared__ Shared<FrameStep, 1> frame_steps[2];
  const Part part(a.work);
  std::conditional_t<kDraws, PartNoise<StepNoise>, Silence> noise(a.noise, part);
  const bool learned = kMethod == Method::ddpm && a.step.variance == Variance::learned_range;
  int turn = 0;
  for (int64_t f = part.first; f < part.last; ++f) {
    const Words8 x_words = load(a.x_t, part, f);
    if (a.step.keeps(part.b, f)) {
      store_words(a.x_prev, part, f, x_words);
      if (kDraws && a.noise.sharing == Sharing::progressive) noise.draw_frame(f);  // later frames need it
      continue;
    }
    Words8 uncond_words, v_words;
    const Words8 m_words = load(a.model.cond, part, f);
    if (a.step.guided) uncond_words = load(a.model.uncond, part, f);
    if (learned) v_words = load(a.model.variance, part, f);
    if (threadIdx.x == 0) frame_steps[turn][0] = sampling::frame_step<kMethod>(a.step, part.b, f);
    __syncthreads();
    const FrameStep s = frame_steps[turn][0];
    turn ^= 1;

    float x[kPack], m[kPack], out[kPack];
    widen(a.x_t.dtype, x_words, x);
    widen(a.model.cond.dtype, m_words, m);
    if (a.step.guided) {
      float uncond[kPack];
      widen(a.model.cond.dtype, uncond_words, uncond);
      for_each([&](int i) { m[i] = sampling::guided(a.step.guidance, m[i], uncond[i]); });
    }
    sampling::with_rule<kMethod>(a.step, [&](auto moved) {
      for_each([&](int i) { out[i] = moved(s, a.step.clip, x[i], m[i]); });
    });
    if (kDraws && (s.draws || a.noise.sharing == Sharing::progressive)) noise.draw_frame(f);
    if (kDraws && s.draws) {
      float std[kPack];
      for_each([&](int i) { std[i] = s.std; });
      if (learned) {
        widen(a.model.cond.dtype, v_words, std);
        for_each([&](int i) { std[i] = expf(sampling::log_std(s, std[i])); });
      }
      for_each([&](int i) { out[i] = philox::add(out[i], philox::multiply(std[i], noise.n[i])); });
    }
    store(a.x_prev, part, f, out);
  }
}

// --- the operators ---

template <Method kMethod, bool kDraws>
Tensor run(const Tensor& x_t, const Tensor& model_out, const sampling::Step& step, const StepNoise& noise) {
  const Tensor x_prev = empty_clip(x_t);
  const Work work = work_of(frames_of(x_t), noise.sharing);
  launch(x_t, step_kernel<kMethod, kDraws>, work.blocks(), kThreads,
         StepArguments{work, step, noise, clip_of(x_t), sampling::model_clips_of(model_out, x_t),
                       contiguous_clip(x_prev)});
  return x_prev;
}

Tensor ddim_step(const Tensor& x_t, const Tensor& model_out, const Tensor& t, const Tensor& t_prev,
                 const Tensor& alphas_cumprod, std::string prediction, double eta, std::optional<Tensor> key,
                 std::optional<double> guidance_scale, std::optional<Tensor> hold, std::optional<double> clip_x0,
                 std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  sampling::Step step = sampling::step_of(t, t_prev, alphas_cumprod, prediction, guidance_scale, hold, clip_x0);
  if (eta == 0.0) return run<Method::ddim, false>(x_t, model_out, step, {});
  step.eta_squared = static_cast<float>(eta * eta);
  const StepNoise noise = sampling::step_noise_of(t, *key, sharing, base_weight, sample_offset);
  return run<Method::ddim, true>(x_t, model_out, step, noise);
}

Tensor ddpm_step(const Tensor& x_t, const Tensor& model_out, const Tensor& t, const Tensor& t_prev,
                 const Tensor& alphas_cumprod, std::string prediction, std::string variance, const Tensor& key,
                 std::optional<double> guidance_scale, std::optional<Tensor> hold, std::optional<double> clip_x0,
                 std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  sampling::Step step = sampling::step_of(t, t_prev, alphas_cumprod, prediction, guidance_scale, hold, clip_x0);
  step.variance = sampling::variance_of(variance);
  const StepNoise noise = sampling::step_noise_of(t, key, sharing, base_weight, sample_offset);
  return run<Method::ddpm, true>(x_t, model_out, step, noise);
}

Tensor flow_step(const Tensor& x_t, const Tensor& model_out, const Tensor& t, const Tensor& t_prev,
                 const Tensor& sigma, std::string prediction, std::optional<double> guidance_scale,
                 std::optional<Tensor> hold, std::optional<double> clip_x0) {
  const sampling::Step step = sampling::step_of(t, t_prev, sigma, prediction, guidance_scale, hold, clip_x0);
  return run<Method::flow, false>(x_t, model_out, step, {});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) { sampling::define(m); }

STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) {
  m.impl("ddim_step", TORCH_BOX(&ddim_step));
  m.impl("ddpm_step", TORCH_BOX(&ddpm_step));
  m.impl("flow_step", TORCH_BOX(&flow_step));
}

}  // namespace vidkern::cuda

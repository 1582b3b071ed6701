// The noise family on CUDA: a thread draws eight numbers of a sample, frame after frame, beside the elements that they meet.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/hybrid_loss.h"
#include "common/launch.h"
#include "cuda/noise_tile.h"

namespace vidkern::cuda {
namespace {

// that fit into the registers
constexpr int kBlocksAtOnce = 5, kHybridBlocksAtOnce = 4;

__device__ inline float regressed(Target target, Level level, float x, float n) {
  switch (target) {
    case Target::v: return combine(level.alpha, n, -level.sigma, x);
    case Target::flow: return philox::add(n, -x);
    case Target::x0: return x;
    default: return n;
  }
}

// --- sums over frames: a block's part of each, (B, F, runs), and a second pass that adds them up in their order ---

__device__ inline float sum(const float (&v)[kPack]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

__device__ inline void put(float* parts, const Work& work, const Part& part, int64_t f, float sum) {
  parts[(part.b * work.frames.f + f) * work.runs + part.run] = sum;
}

struct Totals {
  const float* parts;
  float* totals;
  int64_t frames, runs;
  float divisor;
};

__global__ void __launch_bounds__(kThreads) total_kernel(const Totals a) {  // a warp adds up a frame
  const int64_t frame = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (frame >= a.frames) return;
  float total[1] = {0.0f};
  for (int64_t run = threadIdx.x % kWarp; run < a.runs; run += kWarp) total[0] += a.parts[frame * a.runs + run];
  const float sum = warp_sum(total);
  if (threadIdx.x % kWarp == 0) a.totals[frame] = sum / a.divisor;
}

// --- the kernels ---

struct Normal {
  Work work;
  Noise noise;
  Clip out;
};

__global__ void __launch_bounds__(kThreads) normal_kernel(const Normal a) {
  const Part part(a.work);
  PartNoise noise(a.noise, part);
  for (int64_t f = part.first; f < part.last; ++f) {
    noise.draw_frame(f);
    store(a.out, part, f, noise.n);
  }
}

struct AddNoise {
  Work work;
  Noise noise;
  Target target;
  Levels alpha, sigma;
  Clip x0, x_t, regressed;
};

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) add_noise_kernel(const AddNoise a) {
  const Part part(a.work);
  PartNoise noise(a.noise, part);
  for (int64_t f = part.first; f < part.last; ++f) {
    const Words8 words = load(a.x0, part, f);
    const Level level{a.alpha.at(part.b, f), a.sigma.at(part.b, f)};
    noise.draw_frame(f);
    float x[kPack], out[kPack];
    widen(a.x0.dtype, words, x);
    for_each([&](int i) { out[i] = combine(level.alpha, x[i], level.sigma, noise.n[i]); });
    store(a.x_t, part, f, out);
    if (a.target == Target::none) continue;
    for_each([&](int i) { out[i] = regressed(a.target, level, x[i], noise.n[i]); });
    store(a.regressed, part, f, out);
  }
}

struct AddNoiseBackward {
  Work work;
  Noise noise;
  Target target;  // none where nothing comes back through it
  bool has_dx_t;
  Levels alpha, sigma;
  Clip dx_t, dtarget, x0, dx0;
  float *dalpha, *dsigma;  // parts
};

__global__ void __launch_bounds__(kThreads) add_noise_backward_kernel(const AddNoiseBackward a) {
  __shared__ Shared<float, kWarps * 2> scratch[2];
  const Part part(a.work);
  PartNoise noise(a.noise, part);
  int turn = 0;
  for (int64_t f = part.first; f < part.last; ++f, turn ^= 1) {
    Words8 dx_t_words, dtarget_words;
    const Words8 x_words = load(a.x0, part, f);
    if (a.has_dx_t) dx_t_words = load(a.dx_t, part, f);
    if (a.target != Target::none) dtarget_words = load(a.dtarget, part, f);
    const Level level{a.alpha.at(part.b, f), a.sigma.at(part.b, f)};
    noise.draw_frame(f);
    float x[kPack], grad[kPack], dx[kPack] = {}, dalpha[kPack] = {}, dsigma[kPack] = {};
    widen(a.x0.dtype, x_words, x);
    if (a.has_dx_t) {
      widen(a.dx_t.dtype, dx_t_words, grad);
      for_each([&](int i) {
        dx[i] = philox::multiply(level.alpha, grad[i]);
        dalpha[i] = grad[i] * x[i];
        dsigma[i] = grad[i] * noise.n[i];
      });
    }
    if (a.target != Target::none) widen(a.dtarget.dtype, dtarget_words, grad);
    if (a.target == Target::v) {
      for_each([&](int i) {
        dx[i] = philox::add(dx[i], -philox::multiply(level.sigma, grad[i]));
        dalpha[i] += grad[i] * noise.n[i];
        dsigma[i] -= grad[i] * x[i];
      });
    } else if (a.target == Target::flow || a.target == Target::x0) {
      const float sign = a.target == Target::flow ? -1.0f : 1.0f;
      for_each([&](int i) { dx[i] = philox::add(dx[i], sign * grad[i]); });
    }
    store(a.dx0, part, f, dx);
    float sums[2] = {sum(dalpha), sum(dsigma)};
    block_sum(sums, scratch[turn]);
    if (threadIdx.x == 0) {
      put(a.dalpha, a.work, part, f, sums[0]);
      put(a.dsigma, a.work, part, f, sums[1]);
    }
  }
}

struct Mse {
  Work work;
  Noise noise;
  Target prediction;
  Levels alpha, sigma;
  Clip pred, x0, residual;
  float* squares;  // parts
  float divisor;
};

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) mse_kernel(const Mse a) {
  __shared__ Shared<float, kWarps> scratch[2];
  const Part part(a.work);
  PartNoise noise(a.noise, part);
  int turn = 0;
  for (int64_t f = part.first; f < part.last; ++f, turn ^= 1) {
    Words8 x_words;
    const Words8 pred_words = load(a.pred, part, f);
    if (a.prediction != Target::epsilon) x_words = load(a.x0, part, f);
    const Level level{a.alpha.at(part.b, f), a.sigma.at(part.b, f)};
    noise.draw_frame(f);
    float x[kPack], r[kPack], squares[kPack];
    widen(a.x0.dtype, x_words, x);
    widen(a.pred.dtype, pred_words, r);
    for_each([&](int i) {
      r[i] = philox::add(r[i], -regressed(a.prediction, level, x[i], noise.n[i]));
      squares[i] = i < part.count ? r[i] * r[i] : 0.0f;
    });
    store(a.residual, part, f, r);
    float total[1] = {sum(squares)};
    block_sum(total, scratch[turn]);
    if (threadIdx.x == 0) put(a.squares, a.work, part, f, total[0] / a.divisor);
  }
}

struct MseBackward {
  Work work;
  Levels dmse;
  float factor;
  Clip residual, dpred;
};

__global__ void __launch_bounds__(kThreads) mse_backward_kernel(const MseBackward a) {
  const Part part(a.work);
  for (int64_t f = part.first; f < part.last; ++f) {
    float v[kPack];
    widen(a.residual.dtype, load(a.residual, part, f), v);
    const float scale = a.dmse.at(part.b, f) * a.factor;
    for_each([&](int i) { v[i] = philox::multiply(scale, v[i]); });
    store(a.dpred, part, f, v);
  }
}

struct Hybrid {
  Work work;
  Noise noise;
  Target prediction;
  Levels alpha, sigma;
  BoundTables tables;
  Clip pred, v, x0, residual, slope;
  float *squares, *bounds;  // parts
  float divisor;
  float* bits_per_v;
};

// Replaces v by the slopes of the bound's terms and returns their sum.
__device__ inline float bound_of(const Bound& bound, int count, const float (&x)[kPack], const float (&r)[kPack],
                                 float (&v)[kPack]) {
  float sum = 0.0f;
  const auto add = [&](int i, Term<float> term) {
    v[i] = term.slope;
    if (i < count) sum += term.value;
  };
  if (bound.decodes) for_each([&](int i) { add(i, decoder<float, uint32_t>(bound, x[i], r[i], v[i])); });
  else for_each([&](int i) { add(i, divergence<float, uint32_t>(bound, r[i], v[i])); });
  return sum;
}

__global__ void __launch_bounds__(kThreads, kHybridBlocksAtOnce) hybrid_kernel(const Hybrid a) {
  __shared__ Shared<float, kWarps * 2> scratch[2];
  const Part part(a.work);
  PartNoise noise(a.noise, part);
  int turn = 0;
  for (int64_t f = part.first; f < part.last; ++f, turn ^= 1) {
    const Level level{a.alpha.at(part.b, f), a.sigma.at(part.b, f)};
    const Bound bound = a.tables.at(part.b, f, level);
    Words8 x_words;
    const Words8 pred_words = load(a.pred, part, f);
    if (a.prediction != Target::epsilon || bound.decodes) x_words = load(a.x0, part, f);
    noise.draw_frame(f);
    const Words8 v_words = load(a.v, part, f);  // not before: registers
    float x[kPack], r[kPack], v[kPack], sums[2] = {};
    widen(a.x0.dtype, x_words, x);
    widen(a.pred.dtype, pred_words, r);
    widen(a.v.dtype, v_words, v);
    for_each([&](int i) {
      r[i] = philox::add(r[i], -regressed(a.prediction, level, x[i], noise.n[i]));
      if (i < part.count) sums[0] += r[i] * r[i];
    });
    store(a.residual, part, f, r);
    sums[1] = bound_of(bound, part.count, x, r, v);
    store(a.slope, part, f, v);
    block_sum(sums, scratch[turn]);
    if (threadIdx.x == 0) {
      put(a.squares, a.work, part, f, sums[0] / a.divisor);
      put(a.bounds, a.work, part, f, sums[1] / (a.divisor * kNatsPerBit));
      if (part.run == 0) a.bits_per_v[part.b * a.work.frames.f + f] = bound.bits_per_v();
    }
  }
}

struct HybridBackward {
  Work work;
  Levels dmse, dvb, bits_per_v;
  float factor;
  Clip residual, slope, dpred, dv;
};

__global__ void __launch_bounds__(kThreads) hybrid_backward_kernel(const HybridBackward a) {
  const Part part(a.work);
  for (int64_t f = part.first; f < part.last; ++f) {
    const Words8 residual_words = load(a.residual, part, f), slope_words = load(a.slope, part, f);
    const float to_pred = 2.0f * a.factor * a.dmse.at(part.b, f);
    const float to_v = a.factor * a.dvb.at(part.b, f) * a.bits_per_v.at(part.b, f);
    float d[kPack];
    widen(a.residual.dtype, residual_words, d);
    for_each([&](int i) { d[i] *= to_pred; });
    store(a.dpred, part, f, d);
    widen(a.slope.dtype, slope_words, d);
    for_each([&](int i) { d[i] *= to_v; });
    store(a.dv, part, f, d);
  }
}

// --- the operators ---

// Sums over each frame, float32 (B, F). Where one block has a whole frame, its part is the sum.
class FrameSums {
 public:
  FrameSums(const Tensor& clip, const Work& work)
      : work_(work),
        totals_(empty_levels(clip)),
        parts_(whole() ? totals_ : empty_beside(clip, {work.frames.b, work.frames.f, work.runs}, ScalarType::Float)) {}

  bool whole() const { return work_.runs == 1; }
  float* parts() const { return parts_.mutable_data_ptr<float>(); }

  Tensor totals(float divisor) const {
    const int64_t frames = work_.frames.b * work_.frames.f;
    if (!whole())
      launch(totals_, total_kernel, (frames + kWarps - 1) / kWarps, kThreads,
             Totals{parts(), totals_.mutable_data_ptr<float>(), frames, work_.runs, divisor});
    return totals_;
  }

 private:
  Work work_;
  Tensor totals_, parts_;
};

Tensor philox_normal(std::vector<int64_t> shape, const Tensor& key, std::string sharing,
                     std::optional<Tensor> base_weight, int64_t sample_offset, ScalarType dtype) {
  const Tensor out = torch::stable::new_empty(key, shape, dtype);
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Work work = work_of(frames_of(out), noise.sharing);
  launch(out, normal_kernel, work.blocks(), kThreads, Normal{work, noise, contiguous_clip(out)});
  return out;
}

std::tuple<Tensor, Tensor> add_noise(
    const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& key, std::optional<std::string> target,
    std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  const Tensor x_t = empty_clip(x0), regressed = target ? empty_clip(x0) : empty_beside(x0, {0}, x0.scalar_type());
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Work work = work_of(frames_of(x0), noise.sharing);
  launch(x0, add_noise_kernel, work.blocks(), kThreads,
         AddNoise{work, noise, target_of(target), levels_of(alpha), levels_of(sigma), clip_of(x0),
                  contiguous_clip(x_t), target ? contiguous_clip(regressed) : Clip{}});
  return {x_t, regressed};
}

std::tuple<Tensor, Tensor, Tensor> add_noise_backward(
    std::optional<Tensor> dx_t, std::optional<Tensor> dtarget, const Tensor& x0, const Tensor& alpha,
    const Tensor& sigma, const Tensor& key, std::optional<std::string> target, std::string sharing,
    std::optional<Tensor> base_weight, int64_t sample_offset) {
  const Tensor dx0 = empty_clip(x0);
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Work work = work_of(frames_of(x0), noise.sharing);
  const FrameSums dalpha(x0, work), dsigma(x0, work);
  const Target kind = dtarget ? target_of(target) : Target::none;
  launch(x0, add_noise_backward_kernel, work.blocks(), kThreads,
         AddNoiseBackward{work, noise, kind, dx_t.has_value(), levels_of(alpha), levels_of(sigma),
                          dx_t ? clip_of(*dx_t) : Clip{}, kind == Target::none ? Clip{} : clip_of(*dtarget),
                          clip_of(x0), contiguous_clip(dx0), dalpha.parts(), dsigma.parts()});
  return {dx0, dalpha.totals(1.0f), dsigma.totals(1.0f)};
}

std::tuple<Tensor, Tensor> diffusion_mse(
    const Tensor& pred, const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& key,
    std::string prediction, std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  const Tensor residual = empty_clip(pred);
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Work work = work_of(frames_of(pred), noise.sharing);
  const FrameSums mse(pred, work);
  const auto elements = static_cast<float>(work.frames.elements);
  launch(pred, mse_kernel, work.blocks(), kThreads,
         Mse{work, noise, target_of(prediction), levels_of(alpha), levels_of(sigma), clip_of(pred),
             clip_of(x0), contiguous_clip(residual), mse.parts(), mse.whole() ? elements : 1.0f});
  return {mse.totals(elements), residual};
}

Tensor diffusion_mse_backward(const Tensor& dmse, const Tensor& residual) {
  const Tensor dpred = empty_clip(residual);
  const Work work = work_of(frames_of(residual), Sharing::independent);
  const auto factor = static_cast<float>(2.0 / static_cast<double>(work.frames.elements));
  launch(residual, mse_backward_kernel, work.blocks(), kThreads,
         MseBackward{work, levels_of(dmse), factor, clip_of(residual), contiguous_clip(dpred)});
  return dpred;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hybrid_loss(
    const Tensor& model_out, const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& t,
    const Tensor& mean_coef, const Tensor& low, const Tensor& high, const Tensor& key, std::string prediction,
    std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  const Tensor factors = empty_clip(model_out), bits_per_v = empty_levels(x0);
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Work work = work_of(frames_of(x0), noise.sharing);
  const FrameSums mse(x0, work), vb(x0, work);
  const auto elements = static_cast<float>(work.frames.elements);
  const Target kind = target_of(prediction);
  launch(x0, hybrid_kernel, work.blocks(), kThreads,
         Hybrid{work, noise, kind, levels_of(alpha), levels_of(sigma), bound_tables_of(t, mean_coef, low, high, kind),
                half_of(model_out, 0), half_of(model_out, 1), clip_of(x0), half_of(factors, 0), half_of(factors, 1),
                mse.parts(), vb.parts(), mse.whole() ? elements : 1.0f, bits_per_v.mutable_data_ptr<float>()});
  return {mse.totals(elements), vb.totals(elements), factors, bits_per_v};
}

Tensor hybrid_loss_backward(const Tensor& dmse, const Tensor& dvb, const Tensor& factors, const Tensor& slope) {
  const Tensor dout = empty_clip(factors);
  Frames frames = frames_of(factors);
  frames.elements /= 2;
  const Work work = work_of(frames, Sharing::independent);
  launch(factors, hybrid_backward_kernel, work.blocks(), kThreads,
         HybridBackward{work, levels_of(dmse), levels_of(dvb), levels_of(slope),
                        1.0f / static_cast<float>(frames.elements), half_of(factors, 0), half_of(factors, 1),
                        half_of(dout, 0), half_of(dout, 1)});
  return dout;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) { define_noise(m); }

STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) {
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("add_noise_backward", TORCH_BOX(&add_noise_backward));
  m.impl("diffusion_mse", TORCH_BOX(&diffusion_mse));
  m.impl("diffusion_mse_backward", TORCH_BOX(&diffusion_mse_backward));
  m.impl("hybrid_loss", TORCH_BOX(&hybrid_loss));
  m.impl("hybrid_loss_backward", TORCH_BOX(&hybrid_loss_backward));
}

}  // namespace vidkern::cuda

// The noise family on the CPU: a thread takes a stretch of a sample's elements through all frames, so that noise which
// frames share is drawn once.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/hybrid_loss.h"
#include "cpu/noise_stretch.h"
#include "cpu/vec.h"

namespace vidkern::cpu {
namespace {

// --- one row of a frame ---

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

VIDKERN_CLONES float sum_of(const float* a, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  Sum sum;
  for_each_vec(whole, [&](int64_t i, int k) VIDKERN_INLINE_LAMBDA { sum.chain[k] += load(a + i); });
  float total = sum.total();
  for (int64_t i = whole; i < count; ++i) total += a[i];
  return total;
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

// Writes the bound's terms and slopes; x may be null where the frame does not decode. Rows hold whole vectors.
VIDKERN_CLONES void bound_row(const Bound& bound, const float* x, const Row& r, const float* v, Row& value, Row& slope,
                              int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto at = [&](const float* from) VIDKERN_INLINE_LAMBDA {
      if (i + kLanes <= count) return load(from + i);
      float last[kLanes] = {};
      std::copy(from + i, from + count, last);
      return load(last);
    };
    const Vec residual = load(r.values + i);
    const Term<Vec> term = bound.decodes ? decoder<Vec, VecBits>(bound, at(x), residual, at(v))
                                         : divergence<Vec, VecBits>(bound, residual, at(v));
    store(value.values + i, term.value);
    store(slope.values + i, term.slope);
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
      float* out = place(to, stretch, f, row);
      diffuse(level, x, n, out, stretch.count);
      write(to, stretch, f, out);
      if (kind == Target::none) continue;
      out = place(target_to, stretch, f, row);
      target_row(kind, level, x, n, out, stretch.count);
      write(target_to, stretch, f, out);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> hybrid_loss(
    const Tensor& model_out, const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& t,
    const Tensor& mean_coef, const Tensor& low, const Tensor& high, const Tensor& key, std::string prediction,
    std::string sharing, std::optional<Tensor> base_weight, int64_t sample_offset) {
  const Tensor mse = empty_levels(x0), vb = empty_levels(x0), slope = empty_levels(x0), factors = empty_clip(model_out);
  const Noise noise = noise_of(key, sharing, base_weight, sample_offset);
  const Clip pred_from = half_of(model_out, 0), v_from = half_of(model_out, 1), from = clip_of(x0);
  const Clip residual_to = half_of(factors, 0), slope_to = half_of(factors, 1);
  const Target kind = target_of(prediction);
  const Levels alphas = levels_of(alpha), sigmas = levels_of(sigma);
  const BoundTables tables = bound_tables_of(t, mean_coef, low, high, kind);
  float* slopes = slope.mutable_data_ptr<float>();
  const Stretches stretches(frames_of(x0));
  FrameSums squares(stretches), bounds(stretches);
  for_each_stretch(stretches, [&](const Stretch& stretch) {
    const int64_t count = stretch.count;
    StretchNoise frames(noise, stretch);
    Row x_row, out_row, residual, value, bound_slope;
    for (int64_t f = 0; f < stretches.frames.f; ++f) {
      const Level level{alphas.at(stretch.b, f), sigmas.at(stretch.b, f)};
      const Bound bound = tables.at(stretch.b, f, level);
      const float* x = kind == Target::epsilon && !bound.decodes ? nullptr : read(from, stretch, f, x_row);
      const float* n = kind == Target::x0 ? nullptr : frames.frame(f);
      target_row(kind, level, x, n, residual.values, count);
      subtract(read(pred_from, stretch, f, out_row), residual.values, count);
      squares.part(stretch, f) = sum_of_products(residual.values, residual.values, count);
      write(residual_to, stretch, f, residual.values);
      const float* v = read(v_from, stretch, f, out_row);
      bound_row(bound, x, residual, v, value, bound_slope, count);
      bounds.part(stretch, f) = sum_of(value.values, count);
      write(slope_to, stretch, f, bound_slope.values);
      if (stretch.first == 0) slopes[stretch.b * stretches.frames.f + f] = bound.bits_per_v();
    }
  });
  const auto elements = static_cast<double>(stretches.frames.elements);
  squares.divided_into(elements, mse);
  bounds.divided_into(elements * kNatsPerBit, vb);
  return {mse, vb, factors, slope};
}

Tensor hybrid_loss_backward(const Tensor& dmse, const Tensor& dvb, const Tensor& factors, const Tensor& slope) {
  const Tensor dout = empty_clip(factors);
  const Clip residual_from = half_of(factors, 0), slope_from = half_of(factors, 1);
  const Clip pred_to = half_of(dout, 0), v_to = half_of(dout, 1);
  const Levels dmses = levels_of(dmse), dvbs = levels_of(dvb), slopes = levels_of(slope);
  Frames frames = frames_of(factors);
  frames.elements /= 2;
  const Stretches stretches(frames);
  const float share = 1.0f / static_cast<float>(frames.elements);
  for_each_stretch(stretches, [&](const Stretch& stretch) {
    Row from_row, row;
    for (int64_t f = 0; f < frames.f; ++f) {
      const auto pass = [&](const Clip& from, float factor, const Clip& to) {
        scale(factor, read(from, stretch, f, from_row), row.values, stretch.count);
        write(to, stretch, f, row.values);
      };
      pass(residual_from, 2.0f * share * dmses.at(stretch.b, f), pred_to);
      pass(slope_from, share * dvbs.at(stretch.b, f) * slopes.at(stretch.b, f), v_to);
    }
  });
  return dout;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) { define_noise(m); }

STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("add_noise_backward", TORCH_BOX(&add_noise_backward));
  m.impl("diffusion_mse", TORCH_BOX(&diffusion_mse));
  m.impl("diffusion_mse_backward", TORCH_BOX(&diffusion_mse_backward));
  m.impl("hybrid_loss", TORCH_BOX(&hybrid_loss));
  m.impl("hybrid_loss_backward", TORCH_BOX(&hybrid_loss_backward));
}

}  // namespace vidkern::cpu

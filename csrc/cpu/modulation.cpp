// The modulation family on the CPU: norm, shift and scale of a frame's tokens in one pass, a thread to each run.
#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>

#include "common/tensor.h"
#include "cpu/vec.h"

namespace vidkern::cpu {
namespace {

constexpr int64_t kRunLength = 32;           // tokens
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

struct Forward {
  Runs runs;
  Dtype dtype;
  Tokens x, y;
  FrameVector shift, scale;
  float *mean, *rstd;
  float eps;
};

// The mean is taken twice: `slip` is what rounding left over, and matters where |mean| is far above the deviation.
template <typename T>
VIDKERN_INLINE void normalize_token(
    const T* x, const float* gain, const float* offset, T* y, float* mean, float* rstd, int64_t d, float eps) {
  Sum total, rest, squares;
  for_each_vec(d, [&](int64_t i, int k) VIDKERN_INLINE_LAMBDA { total.chain[k] += load(x + i); });
  const float m = total.total() / float(d);
  for_each_vec(d, [&](int64_t i, int k) VIDKERN_INLINE_LAMBDA {
    const Vec centered = load(x + i) - m;
    rest.chain[k] += centered;
    squares.chain[k] += centered * centered;
  });
  const float slip = rest.total() / float(d), variance = squares.total() / float(d) - slip * slip;
  const float r = 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + eps);
  for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
    store(y + i, (load(x + i) - m - slip) * r * load(gain + i) + load(offset + i));
  });
  *mean = m + slip;
  *rstd = r;
}

template <typename T>
VIDKERN_INLINE void forward_runs(const Forward& a, int64_t begin, int64_t end) {
  const int64_t d = a.runs.shape.d;
  const auto vectors = std::make_unique<float[]>(2 * d);
  float *gain = vectors.get(), *offset = gain + d;
  for (int64_t index = begin; index < end; ++index) {
    const Run run = a.runs[index];
    load_vector(a.scale, run.b, run.f, 1.0f, gain, d);
    load_vector(a.shift, run.b, run.f, 0.0f, offset, d);
    for (int64_t n = run.first; n < run.last; ++n) {
      const int64_t token = (run.b * a.runs.shape.f + run.f) * a.runs.shape.n + n;
      const T* x = static_cast<const T*>(a.x.data) + a.x.offset(run.b, run.f, n);
      T* y = static_cast<T*>(a.y.data) + a.y.offset(run.b, run.f, n);
      normalize_token(x, gain, offset, y, a.mean + token, a.rstd + token, d, a.eps);
    }
  }
}

VIDKERN_CLONES void forward(const Forward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::float32: return forward_runs<float>(a, begin, end);
    case Dtype::bfloat16: return forward_runs<bfloat16>(a, begin, end);
    case Dtype::float16: return forward_runs<float16>(a, begin, end);
  }
}

struct Backward {
  Runs runs;
  Dtype dtype;
  Tokens dy, x, dx;
  FrameVector scale;
  const float *mean, *rstd;
  float *dshift, *dscale;  // (B, F, runs, D)
};

template <typename T>
VIDKERN_INLINE void normalize_token_backward(
    const T* dy, const T* x, const float* gain, float mean, float rstd, T* dx, float* dshift, float* dscale, int64_t d) {
  Sum grad, along;
  for_each_vec(d, [&](int64_t i, int k) VIDKERN_INLINE_LAMBDA {
    const Vec dyi = load(dy + i), normed = (load(x + i) - mean) * rstd, dnormed = dyi * load(gain + i);
    grad.chain[k] += dnormed;
    along.chain[k] += dnormed * normed;
    store(dshift + i, load(dshift + i) + dyi);
    store(dscale + i, load(dscale + i) + dyi * normed);
  });
  const float grad_mean = grad.total() / float(d), along_mean = along.total() / float(d);
  for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
    const Vec normed = (load(x + i) - mean) * rstd, dnormed = load(dy + i) * load(gain + i);
    store(dx + i, rstd * (dnormed - grad_mean - normed * along_mean));
  });
}

template <typename T>
VIDKERN_INLINE void backward_runs(const Backward& a, int64_t begin, int64_t end) {
  const int64_t d = a.runs.shape.d;
  const auto gain = std::make_unique<float[]>(d);
  for (int64_t index = begin; index < end; ++index) {
    const Run run = a.runs[index];
    float *dshift = a.dshift + index * d, *dscale = a.dscale + index * d;
    load_vector(a.scale, run.b, run.f, 1.0f, gain.get(), d);
    std::fill_n(dshift, d, 0.0f);
    std::fill_n(dscale, d, 0.0f);
    for (int64_t n = run.first; n < run.last; ++n) {
      const int64_t token = (run.b * a.runs.shape.f + run.f) * a.runs.shape.n + n;
      const T* dy = static_cast<const T*>(a.dy.data) + a.dy.offset(run.b, run.f, n);
      const T* x = static_cast<const T*>(a.x.data) + a.x.offset(run.b, run.f, n);
      T* dx = static_cast<T*>(a.dx.data) + a.dx.offset(run.b, run.f, n);
      normalize_token_backward(dy, x, gain.get(), a.mean[token], a.rstd[token], dx, dshift, dscale, d);
    }
  }
}

VIDKERN_CLONES void backward(const Backward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::float32: return backward_runs<float>(a, begin, end);
    case Dtype::bfloat16: return backward_runs<bfloat16>(a, begin, end);
    case Dtype::float16: return backward_runs<float16>(a, begin, end);
  }
}

template <typename F>
void for_each_run(const Runs& runs, F f) {
  const int64_t elements = runs.length * runs.shape.d;
  torch::stable::parallel_for(0, runs.count(), (kElementsPerThread + elements - 1) / elements, f);
}

VIDKERN_CLONES void add_rows(const float* rows, int64_t count, float* sums, int64_t d) {
  for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
    Vec total = {};
    for (int64_t row = 0; row < count; ++row) total += load(rows + row * d + i);
    store(sums + i, total);
  });
}

// (B, F, runs, D) -> (B, F, D), in the order of the runs.
Tensor sum_runs(const Tensor& partial) {
  const int64_t b = partial.size(0), f = partial.size(1), runs = partial.size(2), d = partial.size(3);
  const Tensor sums = empty_beside(partial, {b, f, d}, ScalarType::Float);
  const float* rows = partial.const_data_ptr<float>();
  float* out = sums.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, b * f, kElementsPerThread / (runs * d + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t frame = begin; frame < end; ++frame) add_rows(rows + frame * runs * d, runs, out + frame * d, d);
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate(
    const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor y = empty_tokens(x), mean = empty_statistics(x), rstd = empty_statistics(x);
  const Runs runs(shape_of(x), kRunLength);
  const Forward a{runs, dtype_of(x), tokens_of(x), tokens_of(y), vector_of(shift), vector_of(scale),
                  mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), float(eps)};
  for_each_run(runs, [&](int64_t begin, int64_t end) { forward(a, begin, end); });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& mean, const Tensor& rstd) {
  const Runs runs(shape_of(x), kRunLength);
  const Tensor dx = empty_tokens(x);
  const Tensor dshift = empty_beside(x, {x.size(0), x.size(1), runs.per_frame, x.size(3)}, ScalarType::Float);
  const Tensor dscale = empty_beside(x, {x.size(0), x.size(1), runs.per_frame, x.size(3)}, ScalarType::Float);
  const Backward a{runs, dtype_of(x), tokens_of(dy), tokens_of(x), tokens_of(dx), vector_of(scale),
                   mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(),
                   dshift.mutable_data_ptr<float>(), dscale.mutable_data_ptr<float>()};
  for_each_run(runs, [&](int64_t begin, int64_t end) { backward(a, begin, end); });
  return {dx, sum_runs(dshift), sum_runs(dscale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) {
  m.def("layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm_modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd)"
        " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward));
}

}  // namespace vidkern::cpu

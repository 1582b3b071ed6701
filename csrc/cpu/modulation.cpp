// The modulation family on the CPU: a thread takes a run of one frame's tokens, and one pass over each.
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "common/tensor.h"

#pragma GCC optimize("fp-contract=fast")  // a * b + c in one instruction where there is one
#include "cpu/modulation_token.h"

namespace vidkern::cpu {
namespace {

constexpr int64_t kRunLength = 16;             // tokens: as many are added one after another in a vector's gradient
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

constexpr Kind kLayerNormModulate{false, Norm::layer}, kRmsNormModulate{false, Norm::rms};
constexpr Kind kGateResidual{true, Norm::none};
constexpr Kind kGateResidualModulate{true, Norm::layer}, kGateResidualRmsModulate{true, Norm::rms};

Runs runs_of(const Tensor& tokens) { return Runs(shape_of(tokens), kRunLength); }

template <typename F>
void for_each_run(const Runs& runs, F f) {
  const int64_t elements = runs.length * runs.shape.d;
  torch::stable::parallel_for(0, runs.count(), (kElementsPerThread + elements - 1) / elements, f);
}

// What a member of the family does not have stays null.
template <typename T>
VIDKERN_INLINE T* at(T* data, int64_t offset) {
  return data != nullptr ? data + offset : nullptr;
}

template <typename T>
VIDKERN_INLINE T* at(const Tokens& tokens, int64_t b, int64_t f, int64_t n) {
  return at(static_cast<T*>(tokens.data), tokens.offset(b, f, n));
}

// The vector of frame (b, f) in float32, plus an addend: 1 makes a gain of a scale. NaNs are plain, for store_plain.
VIDKERN_CLONES void load_vector(const FrameVector& v, int64_t b, int64_t f, float addend, float* out, int64_t d) {
  with_type(v.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    const auto* values = static_cast<const decltype(element)*>(v.data) + v.offset(b, f);
    for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
      store(out + i, plain_nan(load(values + i) + addend));
    });
  });
}

struct Forward {
  Runs runs;
  Dtype dtype;
  Tokens x = {}, y = {}, z = {}, h = {};
  FrameVector gate = {}, shift = {}, scale = {};
  float *mean = nullptr, *rstd = nullptr;  // (B, F, N)
  float eps = 0.0f;
};

template <Kind kind, typename T>
VIDKERN_INLINE void forward_runs(const Forward& a, int64_t begin, int64_t end) {
  const int64_t d = a.runs.shape.d;
  const Scratch scratch(4, d);
  float *gate = scratch.row(0), *gain = scratch.row(1), *shift = scratch.row(2);
  const ForwardRows rows{gate, gain, shift, scratch.row(3)};
  for (int64_t index = begin; index < end; ++index) {
    const auto [b, f, first, last] = a.runs[index];
    const bool new_frame = index == begin || first == 0;
    if (kind.residual && new_frame) load_vector(a.gate, b, f, 0.0f, gate, d);
    if (kind.norm != Norm::none && new_frame) {
      load_vector(a.scale, b, f, 1.0f, gain, d);
      load_vector(a.shift, b, f, 0.0f, shift, d);
    }
    for (int64_t n = first; n < last; ++n) {
      const ForwardToken<T> token{at<T>(a.x, b, f, n), at<T>(a.y, b, f, n), at<T>(a.z, b, f, n), at<T>(a.h, b, f, n)};
      const Statistics statistics = forward_token<kind>(token, rows, d, a.eps);
      const int64_t position = (b * a.runs.shape.f + f) * a.runs.shape.n + n;
      if constexpr (kind.norm == Norm::layer) a.mean[position] = statistics.mean;
      if constexpr (kind.norm != Norm::none) a.rstd[position] = statistics.rstd;
    }
  }
}

template <Kind kind>
VIDKERN_CLONES void forward_range(const Forward& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA { forward_runs<kind, decltype(element)>(a, begin, end); });
}

template <Kind kind>
void forward(const Forward& a) {
  for_each_run(a.runs, [&](int64_t begin, int64_t end) { forward_range<kind>(a, begin, end); });
}

struct Backward {
  Runs runs;
  Dtype dtype;
  Tokens dh = {}, dz = {}, x = {}, y = {}, dx = {}, dy = {};
  FrameVector gate = {}, scale = {};
  const float *mean = nullptr, *rstd = nullptr;                   // (B, F, N)
  float *dgate = nullptr, *dshift = nullptr, *dscale = nullptr;  // (B, F, runs, D)
};

template <Kind kind, typename T>
VIDKERN_INLINE void backward_runs(const Backward& a, int64_t begin, int64_t end) {
  const int64_t d = a.runs.shape.d;
  const Scratch scratch(2, d);
  float *gate = scratch.row(0), *gain = scratch.row(1);
  for (int64_t index = begin; index < end; ++index) {
    const auto [b, f, first, last] = a.runs[index];
    const BackwardRows rows{gate, gain, at(a.dgate, index * d), at(a.dshift, index * d), at(a.dscale, index * d)};
    const bool new_frame = index == begin || first == 0;
    if constexpr (kind.residual) {
      if (new_frame) load_vector(a.gate, b, f, 0.0f, gate, d);
      std::fill_n(rows.dgate, d, 0.0f);
    }
    if constexpr (kind.norm != Norm::none) {
      if (new_frame) load_vector(a.scale, b, f, 1.0f, gain, d);
      std::fill_n(rows.dshift, d, 0.0f);
      std::fill_n(rows.dscale, d, 0.0f);
    }
    for (int64_t n = first; n < last; ++n) {
      const int64_t position = (b * a.runs.shape.f + f) * a.runs.shape.n + n;
      const Statistics statistics{kind.norm == Norm::layer ? a.mean[position] : 0.0f,
                                  kind.norm != Norm::none ? a.rstd[position] : 0.0f};
      const BackwardToken<T> token{at<T>(a.dh, b, f, n), at<T>(a.dz, b, f, n), at<T>(a.x, b, f, n), at<T>(a.y, b, f, n),
                                   at<T>(a.dx, b, f, n), at<T>(a.dy, b, f, n), statistics};
      backward_token<kind>(token, rows, d);
    }
  }
}

template <Kind kind>
VIDKERN_CLONES void backward_range(const Backward& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA { backward_runs<kind, decltype(element)>(a, begin, end); });
}

template <Kind kind>
void backward(const Backward& a) {
  for_each_run(a.runs, [&](int64_t begin, int64_t end) { backward_range<kind>(a, begin, end); });
}

// A row for each run; sum_runs adds the rows of a frame in their order.
Tensor empty_partial(const Runs& runs, const Tensor& tokens) {
  return empty_beside(tokens, {runs.shape.b, runs.shape.f, runs.per_frame, runs.shape.d}, ScalarType::Float);
}

VIDKERN_CLONES void add_rows(const float* rows, int64_t count, float* sums, int64_t d) {
  for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
    Vec total = {};
    for (int64_t row = 0; row < count; ++row) total += load(rows + row * d + i);
    store(sums + i, total);
  });
}

// (B, F, runs, D) -> (B, F, D)
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

float* floats(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }
const float* const_floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate(
    const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor y = empty_tokens(x), mean = empty_statistics(x), rstd = empty_statistics(x);
  forward<kLayerNormModulate>({.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .h = tokens_of(y),
                               .shift = vector_of(shift), .scale = vector_of(scale),
                               .mean = floats(mean), .rstd = floats(rstd), .eps = float(eps)});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor y = empty_tokens(x), rstd = empty_statistics(x);
  forward<kRmsNormModulate>({.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .h = tokens_of(y),
                             .shift = vector_of(shift), .scale = vector_of(scale),
                             .rstd = floats(rstd), .eps = float(eps)});
  return {y, rstd};
}

Tensor gate_residual(const Tensor& x, const Tensor& y, const Tensor& gate) {
  const Tensor z = empty_tokens(x);
  forward<kGateResidual>({.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .y = tokens_of(y),
                          .z = tokens_of(z), .gate = vector_of(gate)});
  return z;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_modulate(
    const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor z = empty_tokens(x), h = empty_tokens(x), mean = empty_statistics(x), rstd = empty_statistics(x);
  forward<kGateResidualModulate>({.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .y = tokens_of(y),
                                  .z = tokens_of(z), .h = tokens_of(h), .gate = vector_of(gate),
                                  .shift = vector_of(shift), .scale = vector_of(scale),
                                  .mean = floats(mean), .rstd = floats(rstd), .eps = float(eps)});
  return {z, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gate_residual_rms_modulate(
    const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor z = empty_tokens(x), h = empty_tokens(x), rstd = empty_statistics(x);
  forward<kGateResidualRmsModulate>({.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .y = tokens_of(y),
                                     .z = tokens_of(z), .h = tokens_of(h), .gate = vector_of(gate),
                                     .shift = vector_of(shift), .scale = vector_of(scale),
                                     .rstd = floats(rstd), .eps = float(eps)});
  return {z, h, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& mean, const Tensor& rstd) {
  const Runs runs = runs_of(x);
  const Tensor dx = empty_tokens(x), dshift = empty_partial(runs, x), dscale = empty_partial(runs, x);
  backward<kLayerNormModulate>({.runs = runs, .dtype = dtype_of(x), .dh = tokens_of(dy), .x = tokens_of(x),
                                .dx = tokens_of(dx), .scale = vector_of(scale),
                                .mean = const_floats(mean), .rstd = const_floats(rstd),
                                .dshift = floats(dshift), .dscale = floats(dscale)});
  return {dx, sum_runs(dshift), sum_runs(dscale)};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_modulate_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& rstd) {
  const Runs runs = runs_of(x);
  const Tensor dx = empty_tokens(x), dshift = empty_partial(runs, x), dscale = empty_partial(runs, x);
  backward<kRmsNormModulate>({.runs = runs, .dtype = dtype_of(x), .dh = tokens_of(dy), .x = tokens_of(x),
                              .dx = tokens_of(dx), .scale = vector_of(scale), .rstd = const_floats(rstd),
                              .dshift = floats(dshift), .dscale = floats(dscale)});
  return {dx, sum_runs(dshift), sum_runs(dscale)};
}

std::tuple<Tensor, Tensor> gate_residual_backward(const Tensor& dz, const Tensor& y, const Tensor& gate) {
  const Runs runs = runs_of(y);
  const Tensor dy = empty_tokens(y), dgate = empty_partial(runs, y);
  backward<kGateResidual>({.runs = runs, .dtype = dtype_of(y), .dz = tokens_of(dz), .y = tokens_of(y),
                           .dy = tokens_of(dy), .gate = vector_of(gate), .dgate = floats(dgate)});
  return {dy, sum_runs(dgate)};
}

using ResidualGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <Kind kind>
ResidualGradients residual_norm_backward(
    const Tensor& dh, const std::optional<Tensor>& dz, const Tensor& x, const Tensor& y, const Tensor& gate,
    const Tensor& scale, const float* mean, const float* rstd) {
  const Runs runs = runs_of(x);
  const Tensor dx = empty_tokens(x), dy = empty_tokens(x);
  const Tensor dgate = empty_partial(runs, x), dshift = empty_partial(runs, x), dscale = empty_partial(runs, x);
  backward<kind>({.runs = runs, .dtype = dtype_of(x), .dh = tokens_of(dh), .dz = dz ? tokens_of(*dz) : Tokens{},
                  .x = tokens_of(x), .y = tokens_of(y), .dx = tokens_of(dx), .dy = tokens_of(dy),
                  .gate = vector_of(gate), .scale = vector_of(scale), .mean = mean, .rstd = rstd,
                  .dgate = floats(dgate), .dshift = floats(dshift), .dscale = floats(dscale)});
  return {dx, dy, sum_runs(dgate), sum_runs(dshift), sum_runs(dscale)};
}

ResidualGradients gate_residual_modulate_backward(
    const Tensor& dh, std::optional<Tensor> dz, const Tensor& x, const Tensor& y, const Tensor& gate,
    const Tensor& scale, const Tensor& mean, const Tensor& rstd) {
  return residual_norm_backward<kGateResidualModulate>(
      dh, dz, x, y, gate, scale, const_floats(mean), const_floats(rstd));
}

ResidualGradients gate_residual_rms_modulate_backward(
    const Tensor& dh, std::optional<Tensor> dz, const Tensor& x, const Tensor& y, const Tensor& gate,
    const Tensor& scale, const Tensor& rstd) {
  return residual_norm_backward<kGateResidualRmsModulate>(dh, dz, x, y, gate, scale, nullptr, const_floats(rstd));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) {
  m.def("layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm_modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor rstd) -> (Tensor, Tensor, Tensor)");
  m.def("gate_residual(Tensor x, Tensor y, Tensor gate) -> Tensor");
  m.def("gate_residual_backward(Tensor dz, Tensor y, Tensor gate) -> (Tensor, Tensor)");
  m.def("gate_residual_modulate(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gate_residual_modulate_backward(Tensor dh, Tensor? dz, Tensor x, Tensor y, Tensor gate, Tensor scale,"
        " Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gate_residual_rms_modulate(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("gate_residual_rms_modulate_backward(Tensor dh, Tensor? dz, Tensor x, Tensor y, Tensor gate, Tensor scale,"
        " Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward));
  m.impl("rms_norm_modulate", TORCH_BOX(&rms_norm_modulate));
  m.impl("rms_norm_modulate_backward", TORCH_BOX(&rms_norm_modulate_backward));
  m.impl("gate_residual", TORCH_BOX(&gate_residual));
  m.impl("gate_residual_backward", TORCH_BOX(&gate_residual_backward));
  m.impl("gate_residual_modulate", TORCH_BOX(&gate_residual_modulate));
  m.impl("gate_residual_modulate_backward", TORCH_BOX(&gate_residual_modulate_backward));
  m.impl("gate_residual_rms_modulate", TORCH_BOX(&gate_residual_rms_modulate));
  m.impl("gate_residual_rms_modulate_backward", TORCH_BOX(&gate_residual_rms_modulate_backward));
}

}  // namespace vidkern::cpu

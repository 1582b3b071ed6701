// The modulation operators of a compiled library, whatever runs them: arguments, results, schemas.
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include "common/tensor.h"

namespace vidkern {

enum class Norm { none, layer, rms };

// A member of the family: with or without a residual before the norm.
struct Kind {
  bool residual;
  Norm norm;
};

constexpr Kind kLayerNormModulate{false, Norm::layer}, kRmsNormModulate{false, Norm::rms};
constexpr Kind kGateResidual{true, Norm::none};
constexpr Kind kGateResidualModulate{true, Norm::layer}, kGateResidualRmsModulate{true, Norm::rms};

// What a member of the family does not have stays null.
struct Forward {
  Runs runs;
  Dtype dtype;
  Tokens x = {}, y = {}, z = {}, h = {};
  FrameVector gate = {}, shift = {}, scale = {};
  float *mean = nullptr, *rstd = nullptr;  // (B, F, N)
  float eps = 0.0f;
};

struct Backward {
  Runs runs;
  Dtype dtype;
  Tokens dh = {}, dz = {}, x = {}, y = {}, dx = {}, dy = {};  // dz has no data where nothing else reads z
  FrameVector gate = {}, scale = {};
  const float *mean = nullptr, *rstd = nullptr;                   // (B, F, N)
  float *dgate = nullptr, *dshift = nullptr, *dscale = nullptr;  // (B, F, runs, D)
};

// A row of float32 for each run: the sum over a frame's runs is the gradient of its vector.
inline Tensor empty_partial(const Tensor& tokens, const Runs& runs) {
  return empty_beside(tokens, {runs.shape.b, runs.shape.f, runs.per_frame, runs.shape.d}, ScalarType::Float);
}

inline float* floats(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }
inline const float* const_floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

// Backend has runs_of(tokens), which depends on the shape alone; forward<kind>(on, Forward) and backward<kind>(on,
// Backward), on the device of a tensor; and sum_runs<n>, which adds up the runs (B, F, runs, D) of n tensors in order.
template <typename Backend>
struct ModulationOperators {
  using ResidualGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate(
      const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
    const Tensor y = empty_tokens(x), mean = empty_statistics(x), rstd = empty_statistics(x);
    Backend::template forward<kLayerNormModulate>(x, {
        .runs = Backend::runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .h = tokens_of(y),
        .shift = vector_of(shift), .scale = vector_of(scale),
        .mean = floats(mean), .rstd = floats(rstd), .eps = float(eps)});
    return {y, mean, rstd};
  }

  static std::tuple<Tensor, Tensor> rms_norm_modulate(
      const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
    const Tensor y = empty_tokens(x), rstd = empty_statistics(x);
    Backend::template forward<kRmsNormModulate>(x, {
        .runs = Backend::runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .h = tokens_of(y),
        .shift = vector_of(shift), .scale = vector_of(scale),
        .rstd = floats(rstd), .eps = float(eps)});
    return {y, rstd};
  }

  static Tensor gate_residual(const Tensor& x, const Tensor& y, const Tensor& gate) {
    const Tensor z = empty_tokens(x);
    Backend::template forward<kGateResidual>(x, {
        .runs = Backend::runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .y = tokens_of(y),
        .z = tokens_of(z), .gate = vector_of(gate)});
    return z;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_modulate(
      const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& shift, const Tensor& scale, double eps) {
    const Tensor z = empty_tokens(x), h = empty_tokens(x), mean = empty_statistics(x), rstd = empty_statistics(x);
    Backend::template forward<kGateResidualModulate>(x, {
        .runs = Backend::runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .y = tokens_of(y),
        .z = tokens_of(z), .h = tokens_of(h), .gate = vector_of(gate),
        .shift = vector_of(shift), .scale = vector_of(scale),
        .mean = floats(mean), .rstd = floats(rstd), .eps = float(eps)});
    return {z, h, mean, rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> gate_residual_rms_modulate(
      const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& shift, const Tensor& scale, double eps) {
    const Tensor z = empty_tokens(x), h = empty_tokens(x), rstd = empty_statistics(x);
    Backend::template forward<kGateResidualRmsModulate>(x, {
        .runs = Backend::runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .y = tokens_of(y),
        .z = tokens_of(z), .h = tokens_of(h), .gate = vector_of(gate),
        .shift = vector_of(shift), .scale = vector_of(scale),
        .rstd = floats(rstd), .eps = float(eps)});
    return {z, h, rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(
      const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& mean, const Tensor& rstd) {
    const Runs runs = Backend::runs_of(x);
    const Tensor dx = empty_tokens(x), dshift = empty_partial(x, runs), dscale = empty_partial(x, runs);
    Backend::template backward<kLayerNormModulate>(x, {
        .runs = runs, .dtype = dtype_of(x), .dh = tokens_of(dy), .x = tokens_of(x),
        .dx = tokens_of(dx), .scale = vector_of(scale),
        .mean = const_floats(mean), .rstd = const_floats(rstd),
        .dshift = floats(dshift), .dscale = floats(dscale)});
    const auto [shift_sum, scale_sum] = Backend::template sum_runs<2>({dshift, dscale});
    return {dx, shift_sum, scale_sum};
  }

  static std::tuple<Tensor, Tensor, Tensor> rms_norm_modulate_backward(
      const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& rstd) {
    const Runs runs = Backend::runs_of(x);
    const Tensor dx = empty_tokens(x), dshift = empty_partial(x, runs), dscale = empty_partial(x, runs);
    Backend::template backward<kRmsNormModulate>(x, {
        .runs = runs, .dtype = dtype_of(x), .dh = tokens_of(dy), .x = tokens_of(x),
        .dx = tokens_of(dx), .scale = vector_of(scale), .rstd = const_floats(rstd),
        .dshift = floats(dshift), .dscale = floats(dscale)});
    const auto [shift_sum, scale_sum] = Backend::template sum_runs<2>({dshift, dscale});
    return {dx, shift_sum, scale_sum};
  }

  static std::tuple<Tensor, Tensor> gate_residual_backward(const Tensor& dz, const Tensor& y, const Tensor& gate) {
    const Runs runs = Backend::runs_of(y);
    const Tensor dy = empty_tokens(y), dgate = empty_partial(y, runs);
    Backend::template backward<kGateResidual>(y, {
        .runs = runs, .dtype = dtype_of(y), .dz = tokens_of(dz), .y = tokens_of(y),
        .dy = tokens_of(dy), .gate = vector_of(gate), .dgate = floats(dgate)});
    return {dy, Backend::template sum_runs<1>({dgate})[0]};
  }

  template <Kind kind>
  static ResidualGradients residual_norm_backward(
      const Tensor& dh, const std::optional<Tensor>& dz, const Tensor& x, const Tensor& y, const Tensor& gate,
      const Tensor& scale, const float* mean, const float* rstd) {
    const Runs runs = Backend::runs_of(x);
    const Tensor dx = empty_tokens(x), dy = empty_tokens(x);
    const Tensor dgate = empty_partial(x, runs), dshift = empty_partial(x, runs), dscale = empty_partial(x, runs);
    Backend::template backward<kind>(x, {
        .runs = runs, .dtype = dtype_of(x), .dh = tokens_of(dh), .dz = dz ? tokens_of(*dz) : Tokens{},
        .x = tokens_of(x), .y = tokens_of(y), .dx = tokens_of(dx), .dy = tokens_of(dy),
        .gate = vector_of(gate), .scale = vector_of(scale), .mean = mean, .rstd = rstd,
        .dgate = floats(dgate), .dshift = floats(dshift), .dscale = floats(dscale)});
    const auto [gate_sum, shift_sum, scale_sum] = Backend::template sum_runs<3>({dgate, dshift, dscale});
    return {dx, dy, gate_sum, shift_sum, scale_sum};
  }

  static ResidualGradients gate_residual_modulate_backward(
      const Tensor& dh, std::optional<Tensor> dz, const Tensor& x, const Tensor& y, const Tensor& gate,
      const Tensor& scale, const Tensor& mean, const Tensor& rstd) {
    return residual_norm_backward<kGateResidualModulate>(
        dh, dz, x, y, gate, scale, const_floats(mean), const_floats(rstd));
  }

  static ResidualGradients gate_residual_rms_modulate_backward(
      const Tensor& dh, std::optional<Tensor> dz, const Tensor& x, const Tensor& y, const Tensor& gate,
      const Tensor& scale, const Tensor& rstd) {
    return residual_norm_backward<kGateResidualRmsModulate>(dh, dz, x, y, gate, scale, nullptr, const_floats(rstd));
  }

  template <typename Library>
  static void define(Library& m) {
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

  template <typename Library>
  static void implement(Library& m) {
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
};

}  // namespace vidkern

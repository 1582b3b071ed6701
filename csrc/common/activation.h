// The activation operators of a compiled library, whatever runs them: arguments, results, schemas.
#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"

namespace vidkern {

// A tensor (M, D), any stride but the last.
struct Rows {
  void* data;
  int64_t stride;
  bool aligned;  // every row starts at a multiple of 16 bytes
};

// What a member of the family does not have stays null.
struct Activation {
  int64_t rows, d;
  Dtype dtype;
  Rows x = {}, dy = {}, y = {}, dx = {};
  FrameVector bias = {};
  float* sums = nullptr;  // (runs, D), the columns of dx over a run of rows
};

// A member of the family: what it computes.
struct Parts {
  bool bias, activation, gradient;

  constexpr bool sums() const { return gradient && (bias || activation); }
};

constexpr Parts kGelu{false, true, false}, kGeluOfSum{true, true, false};
constexpr Parts kGeluBackward{false, false, true}, kGeluOfSumBackward{true, false, true};
constexpr Parts kGeluMlpBackward{false, true, true};

inline Rows rows_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), rows_aligned(tensor)}; }

inline Tensor empty_rows(const Tensor& rows) {
  return empty_beside(rows, {rows.size(0), rows.size(1)}, rows.scalar_type());
}

inline FrameVector row_vector_of(const Tensor& bias) {
  return {bias.data_ptr(), 0, 0, dtype_of(bias), rows_aligned(bias)};
}

// Backend has run<parts>(on, Activation), on the device of a tensor; empty_sums(x), (runs, D) float32 by the shape
// alone; and sum_runs, which adds up the runs in a fixed order: (runs, D) -> (D).
template <typename Backend>
struct ActivationOperators {
  static Activation on(const Tensor& x) {
    return {.rows = x.size(0), .d = x.size(1), .dtype = dtype_of(x), .x = rows_of(x)};
  }

  static Tensor gelu_tanh(const Tensor& x, const std::optional<Tensor>& bias) {
    const Tensor y = empty_rows(x);
    Activation a = on(x);
    a.y = rows_of(y);
    if (bias) {
      a.bias = row_vector_of(*bias);
      Backend::template run<kGeluOfSum>(x, a);
    } else {
      Backend::template run<kGelu>(x, a);
    }
    return y;
  }

  static std::tuple<Tensor, Tensor> gelu_tanh_backward(
      const Tensor& dy, const Tensor& x, const std::optional<Tensor>& bias) {
    const Tensor dx = empty_rows(x);
    Activation a = on(x);
    a.dy = rows_of(dy), a.dx = rows_of(dx);
    if (!bias) {
      Backend::template run<kGeluBackward>(x, a);
      return {dx, empty_beside(x, {0}, ScalarType::Float)};
    }
    const Tensor sums = Backend::empty_sums(x, a);
    a.bias = row_vector_of(*bias), a.sums = sums.mutable_data_ptr<float>();
    Backend::template run<kGeluOfSumBackward>(x, a);
    return {dx, Backend::sum_runs(sums)};
  }

  static std::tuple<Tensor, Tensor, Tensor> gelu_mlp_backward(const Tensor& dy, const Tensor& x) {
    const Tensor dx = empty_rows(x), y = empty_rows(x);
    Activation a = on(x);
    const Tensor sums = Backend::empty_sums(x, a);
    a.dy = rows_of(dy), a.dx = rows_of(dx), a.y = rows_of(y), a.sums = sums.mutable_data_ptr<float>();
    Backend::template run<kGeluMlpBackward>(x, a);
    return {dx, y, Backend::sum_runs(sums)};
  }

  template <typename Library>
  static void define(Library& m) {
    m.def("gelu_tanh(Tensor x, Tensor? bias) -> Tensor");
    m.def("gelu_tanh_backward(Tensor dy, Tensor x, Tensor? bias) -> (Tensor, Tensor)");
    m.def("gelu_mlp_backward(Tensor dy, Tensor x) -> (Tensor, Tensor, Tensor)");
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("gelu_tanh", TORCH_BOX(&gelu_tanh));
    m.impl("gelu_tanh_backward", TORCH_BOX(&gelu_tanh_backward));
    m.impl("gelu_mlp_backward", TORCH_BOX(&gelu_mlp_backward));
  }
};

}  // namespace vidkern

// A step of AdamW and of a moving average of the weights: what C++ and CUDA share.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "common/tensor.h"

namespace vidkern::optimizer {

// A number on the device, float32 or float64, that a step reads when it runs.
struct Number {
  const void* data;  // null: it is 1
  bool wide;

  VIDKERN_HOST_DEVICE double get() const {
    if (data == nullptr) return 1.0;
    return wide ? *static_cast<const double*>(data) : static_cast<double>(*static_cast<const float*>(data));
  }
};

struct Settings {
  Number lr, decay, gradient_scale;
  double beta1, beta2, eps, weight_decay;
};

struct Update {  // what a step does to each element of a tensor
  float gradient_scale, keep, beta2, eps, step_size, root_scale, mean_share, square_share, average_share;
};

// The update of step t, counted from 1: `1 - beta^t` has no digits left in float32 where t is small.
VIDKERN_HOST_DEVICE inline Update update_of(const Settings& s, double t) {
  const double lr = s.lr.get();
  return {static_cast<float>(s.gradient_scale.get()),
          static_cast<float>(1.0 - lr * s.weight_decay),
          static_cast<float>(s.beta2),
          static_cast<float>(s.eps),
          static_cast<float>(lr / (1.0 - pow(s.beta1, t))),
          static_cast<float>(1.0 / sqrt(1.0 - pow(s.beta2, t))),
          static_cast<float>(1.0 - s.beta1),
          static_cast<float>(1.0 - s.beta2),
          static_cast<float>(1.0 - s.decay.get())};
}

struct Moments {
  float p, m, v;
};

VIDKERN_HOST_DEVICE inline Moments moved(const Update& u, float p, float gradient, float m, float v) {
  const float g = u.gradient_scale * gradient;
  const float mean = m + u.mean_share * (g - m), square = u.beta2 * v + u.square_share * (g * g);
  return {u.keep * p - u.step_size * mean / (sqrtf(square) * u.root_scale + u.eps), mean, square};
}

VIDKERN_HOST_DEVICE inline float averaged(const Update& u, float average, float p) {
  return average + u.average_share * (p - average);
}

// The lists of a call: tensor i of each has the elements of parameter i in the same order in memory.
struct Lists {
  std::vector<Tensor> params, grads, means, squares, steps, averages;  // averages: empty where there are none
};

inline Number number_of(const Tensor& value) {
  return {value.data_ptr(), value.scalar_type() == ScalarType::Double};
}

// Calls run(T{}, A{}) with values of the types of the parameters and of their averages, these in T or in float32.
template <typename Bfloat16, typename Float16, typename F>
void with_types(const Lists& lists, F run) {
  const Dtype dtype = dtype_of(lists.params[0]);
  const bool wide = dtype == Dtype::float32 || (!lists.averages.empty() && dtype_of(lists.averages[0]) != dtype);
  switch (dtype) {
    case Dtype::float32: return run(float{}, float{});
    case Dtype::bfloat16: return wide ? run(Bfloat16{}, float{}) : run(Bfloat16{}, Bfloat16{});
    case Dtype::float16: return wide ? run(Float16{}, float{}) : run(Float16{}, Float16{});
  }
}

// The operator of a compiled library. Backend has step(Lists, Settings).
template <typename Backend>
struct Operator {
  static void adamw_ema_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                         std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<Tensor> averages,
                         const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                         const Tensor& ema_decay, std::optional<Tensor> grad_scale) {
    Backend::step({params, grads, exp_avgs, exp_avg_sqs, steps, averages},
                  {.lr = number_of(lr), .decay = number_of(ema_decay),
                   .gradient_scale = grad_scale ? number_of(*grad_scale) : Number{},
                   .beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = weight_decay});
  }

  template <typename Library>
  static void define(Library& m) {
    m.def("adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
          " Tensor[] steps, Tensor(d!)[] averages, Tensor lr, float beta1, float beta2, float eps, float weight_decay,"
          " Tensor ema_decay, Tensor? grad_scale) -> ()");
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_));
  }
};

}  // namespace vidkern::optimizer

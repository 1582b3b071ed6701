// The modulation family on the CPU: a thread takes a run of one frame's tokens, and one pass over each.
#include <algorithm>
#include <array>

#include "common/modulation.h"

#pragma GCC optimize("fp-contract=fast")  // a * b + c in one instruction where there is one
#include "cpu/modulation_token.h"

namespace vidkern::cpu {
namespace {

constexpr int64_t kRunLength = 16;             // tokens: as many are added one after another in a vector's gradient
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

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
  with_type(a.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    forward_runs<kind, decltype(element)>(a, begin, end);
  });
}

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
  with_type(a.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    backward_runs<kind, decltype(element)>(a, begin, end);
  });
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

struct Cpu {
  static Runs runs_of(const Tensor& tokens) { return Runs(shape_of(tokens), kRunLength); }

  template <Kind kind>
  static void forward(const Tensor&, const Forward& a) {
    for_each_run(a.runs, [&](int64_t begin, int64_t end) { forward_range<kind>(a, begin, end); });
  }

  template <Kind kind>
  static void backward(const Tensor&, const Backward& a) {
    for_each_run(a.runs, [&](int64_t begin, int64_t end) { backward_range<kind>(a, begin, end); });
  }

  template <size_t kCount>
  static std::array<Tensor, kCount> sum_runs(std::array<Tensor, kCount> sums) {
    for (Tensor& sum : sums) sum = vidkern::cpu::sum_runs(sum);
    return sums;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) { ModulationOperators<Cpu>::define(m); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) { ModulationOperators<Cpu>::implement(m); }

}  // namespace vidkern::cpu

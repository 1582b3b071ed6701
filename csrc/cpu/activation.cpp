// The activation family on the CPU: a thread takes a run of rows, and one pass over each.
#include <algorithm>

#include "common/activation.h"

#pragma GCC optimize("fp-contract=fast")  // a * b + c in one instruction where there is one
#include "cpu/exp.h"

namespace vidkern::cpu {
namespace {

constexpr int64_t kRunLength = 32;             // rows: as many are added one after another in the bias's gradient
constexpr int64_t kElementsPerThread = 16384;  // below this a second thread costs more than it brings

// GELU(z) = z * sigmoid(t), t = 2 sqrt(2 / pi) (z + 0.044715 z^3), which saturates beyond kSaturated: without a cubic
// that overflows. With e = e^-|t| the sigmoid is 1 / (1 + e) or e / (1 + e), its derivative e / (1 + e)^2.
struct Sigmoid {
  static constexpr float kLinear = 1.5957691216f, kCubic = 0.044715f, kSaturated = 12.0f;
  Vec value, slope;  // and its derivative by z

  VIDKERN_INLINE explicit Sigmoid(Vec z) {
    const Vec magnitude = bit_cast<Vec>(bit_cast<VecBits>(z) & 0x7fffffffu);
    const Vec m = magnitude > kSaturated ? Vec{} + kSaturated : magnitude, square = m * m;
    const Vec e = exp_of_negative(m * (square * (-kLinear * kCubic) - kLinear));
    const Vec near = 1.0f / (1.0f + e), far = e * near;
    value = z < 0.0f ? far : near;
    slope = near * far * (square * (3 * kLinear * kCubic) + kLinear);
  }
};

template <typename T>
VIDKERN_INLINE T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

VIDKERN_CLONES void load_bias(const FrameVector& bias, float* out, int64_t d) {
  with_type(bias.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    const auto* values = static_cast<const decltype(element)*>(bias.data);
    for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA { store(out + i, plain_nan(load(values + i))); });
  });
}

template <Parts parts, typename T>
VIDKERN_INLINE void run_row(const Activation& a, int64_t row, const float* bias, float* sums) {
  const T *x = row_of<T>(a.x, row), *dy = row_of<T>(a.dy, row);
  T *y = row_of<T>(a.y, row), *dx = row_of<T>(a.dx, row);
  for_each_vec(a.d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
    Vec z = load(x + i);
    if constexpr (parts.bias) z += load(bias + i);
    const Sigmoid sigmoid(z);
    if constexpr (parts.activation) store_plain(y + i, z * sigmoid.value);
    if constexpr (parts.gradient) {
      const Vec grad = load(dy + i) * (z * sigmoid.slope + sigmoid.value);
      store_plain(dx + i, grad);
      if constexpr (parts.sums()) store(sums + i, load(sums + i) + grad);
    }
  });
}

template <Parts parts>
VIDKERN_CLONES void run_range(const Activation& a, int64_t begin, int64_t end) {
  const Scratch scratch(1, parts.bias ? a.d : 0);
  if constexpr (parts.bias) load_bias(a.bias, scratch.row(0), a.d);
  with_type(a.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    for (int64_t run = begin; run < end; ++run) {
      float* sums = parts.sums() ? a.sums + run * a.d : nullptr;
      if constexpr (parts.sums()) std::fill_n(sums, a.d, 0.0f);
      const int64_t last = std::min(a.rows, (run + 1) * kRunLength);
      for (int64_t row = run * kRunLength; row < last; ++row)
        run_row<parts, decltype(element)>(a, row, scratch.row(0), sums);
    }
  });
}

// In two levels: the square root as many additions one after another.
VIDKERN_CLONES void add_rows(const float* rows, int64_t count, int64_t d, float* sums, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    Vec total = {};
    for (int64_t first = 0; first < count; first += kRunLength) {
      Vec part = {};
      const int64_t last = std::min(count, first + kRunLength);
      for (int64_t row = first; row < last; ++row) part += load(rows + row * d + i);
      total += part;
    }
    store(sums + i, total);
  }
}

int64_t runs_of(const Activation& a) { return (a.rows + kRunLength - 1) / kRunLength; }

struct Cpu {
  static Tensor empty_sums(const Tensor& x, const Activation& a) {
    return empty_beside(x, {runs_of(a), a.d}, ScalarType::Float);
  }

  template <Parts parts>
  static void run(const Tensor&, const Activation& a) {
    const int64_t runs_a_thread = kElementsPerThread / (kRunLength * a.d) + 1;
    torch::stable::parallel_for(
        0, runs_of(a), runs_a_thread, [&](int64_t begin, int64_t end) { run_range<parts>(a, begin, end); });
  }

  static Tensor sum_runs(const Tensor& partial) {
    const int64_t count = partial.size(0), d = partial.size(1);
    const Tensor sums = empty_beside(partial, {d}, ScalarType::Float);
    add_rows(partial.const_data_ptr<float>(), count, d, sums.mutable_data_ptr<float>(), 0, d);
    return sums;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) { ActivationOperators<Cpu>::define(m); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) { ActivationOperators<Cpu>::implement(m); }

}  // namespace vidkern::cpu

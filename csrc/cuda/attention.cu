// Temporal attention on CUDA: its operators, and the sum of the bias's gradient over runs.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/attention.h"
#include "common/device.h"
#include "cuda/attention.h"

namespace vidkern::cuda {
namespace {

using Optional = std::optional<Tensor>;

constexpr int kQ = 0, kK = 1, kV = 2;  // parts of (B, F, N, 3, H, d)

// A part of packed tokens, or a tensor (B, F, N, H, d) of its own.
Heads heads_of(const Tensor& x, int part = 0) {
  const bool packed = x.dim() == 6;
  const int64_t start = packed ? part * x.stride(3) * static_cast<int64_t>(x.element_size()) : 0;
  return {static_cast<char*>(x.data_ptr()) + start, x.stride(0), x.stride(1), x.stride(2), x.stride(packed ? 4 : 3),
          rows_aligned(x)};
}

// The tokens that attention gives, of tokens apart or packed: (B, F, N, H, d), contiguous.
Tensor empty_heads(const Tensor& x) {
  return empty_beside(x, {x.size(0), x.size(1), x.size(2), x.size(-2), x.size(-1)}, x.scalar_type());
}

// What all tokens share: bias (H, F, F), cos and sin (F, d), scale and mask.
struct Options {
  Optional bias, cos, sin;  // contiguous float32, as kernels read them
  double scale;
  bool causal;

  Options(const Optional& bias, const Optional& cos, const Optional& sin, double scale, bool causal)
      : bias(floats(bias)), cos(floats(cos)), sin(floats(sin)), scale(scale), causal(causal) {}

  static Optional floats(const Optional& table) {
    if (!table.has_value()) return table;
    const bool aligned = reinterpret_cast<uintptr_t>(table->data_ptr()) % 16 == 0;
    if (table->scalar_type() == ScalarType::Float && table->is_contiguous() && aligned) return table;
    Tensor copy = torch::stable::new_empty(*table, table->sizes(), ScalarType::Float);
    return torch::stable::copy_(copy, *table);
  }

  static const float* data(const Optional& table) {
    return table.has_value() ? table->const_data_ptr<float>() : nullptr;
  }
};

constexpr int64_t kWarpsWanted = 8192;  // where the bias has a gradient: enough for any GPU, and few rows to add up

Problems problems_of(const Tensor& tokens, const Options& options, bool bias_grad) {  // tokens (..., H, d)
  const int64_t b = tokens.size(0), f = tokens.size(1), n = tokens.size(2), h = tokens.size(-2), d = tokens.size(-1);
  STD_TORCH_CHECK(f <= kMaxFrames, "F must be at most ", kMaxFrames, ", got ", f);
  const int64_t positions = b * n, tiles = (f + kTile - 1) / kTile;
  STD_TORCH_CHECK(positions <= std::numeric_limits<int>::max(), "B * N must be below 2^31, got ", positions);
  const int64_t runs_wanted = kWarpsWanted / (h * std::max<int64_t>(1, tiles)) + 1;
  const int64_t run = bias_grad ? std::max<int64_t>(1, (positions + runs_wanted - 1) / runs_wanted) : 1;
  const int64_t runs = (positions + run - 1) / run;
  const auto narrow = [](int64_t x) { return static_cast<int>(x); };
  return {narrow(b), narrow(f), narrow(n), narrow(h), narrow(d), narrow(run), narrow(runs),
          Options::data(options.bias), Options::data(options.cos), Options::data(options.sin),
          static_cast<float>(options.scale), options.causal};
}

void run_forward(const Tensor& tokens, const Forward& call) {
  with_type(dtype_of(tokens), [&](auto element) { launch_forward<decltype(element)>(tokens, call); });
}

constexpr int kSumColumns = 32, kSumSlices = 8;  // a block adds kSumSlices stretches of runs side by side

__global__ void sum_bias_grad_kernel(const float* partial, float* total, int64_t size, int64_t runs) {
  __shared__ Shared<float, kSumColumns * kSumSlices> slices;
  const int column = threadIdx.x % kSumColumns, slice = threadIdx.x / kSumColumns;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kSumColumns) + column;
  float sum = 0.0f;
  if (i < size) {
    for (int64_t run = slice; run < runs; run += kSumSlices) sum += partial[run * size + i];
  }
  slices[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || i >= size) return;
  for (int other = 1; other < kSumSlices; ++other) sum += slices[other * kSumColumns + column];
  total[i] = sum;
}

// Runs the backward pass, and returns the bias's gradient (H, F, F), empty where it is not wanted.
Tensor run_backward(const Tensor& tokens, Backward call, bool bias_grad) {
  const Problems& all = call.problems;
  const auto floats = [&](std::initializer_list<int64_t> size) {
    return empty_beside(tokens, size, ScalarType::Float);
  };
  const Tensor partial = bias_grad ? floats({all.runs, all.h, all.f, all.f}) : floats({0});
  const Tensor total = bias_grad ? floats({all.h, all.f, all.f}) : floats({0});
  call.grad_bias = bias_grad ? partial.mutable_data_ptr<float>() : nullptr;
  with_type(dtype_of(tokens), [&](auto element) { launch_backward<decltype(element)>(tokens, call); });
  if (bias_grad) {
    const int64_t size = total.numel();
    launch(tokens, sum_bias_grad_kernel, (size + kSumColumns - 1) / kSumColumns, kSumColumns * kSumSlices,
           call.grad_bias, total.mutable_data_ptr<float>(), size, static_cast<int64_t>(all.runs));
  }
  return total;
}

Tensor temporal_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& cos,
                          const Optional& sin, double scale, bool causal) {
  const Options options(bias, cos, sin, scale, causal);
  const Tensor o = empty_heads(q);
  run_forward(q, {problems_of(q, options, false), heads_of(q), heads_of(k), heads_of(v), heads_of(o)});
  return o;
}

Tensor temporal_attention_packed(const Tensor& qkv, const Optional& bias, const Optional& cos, const Optional& sin,
                                 double scale, bool causal) {
  const Options options(bias, cos, sin, scale, causal);
  const Tensor o = empty_heads(qkv);
  run_forward(qkv, {problems_of(qkv, options, false), heads_of(qkv, kQ), heads_of(qkv, kK), heads_of(qkv, kV),
                    heads_of(o)});
  return o;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> temporal_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& cos,
    const Optional& sin, double scale, bool causal, bool bias_grad) {
  const Options options(bias, cos, sin, scale, causal);
  const Tensor dq = empty_heads(q), dk = empty_heads(q), dv = empty_heads(q);
  const Tensor dbias = run_backward(q, {problems_of(q, options, bias_grad), heads_of(q), heads_of(k), heads_of(v),
                                        heads_of(grad), heads_of(dq), heads_of(dk), heads_of(dv), nullptr}, bias_grad);
  return {dq, dk, dv, dbias};
}

std::tuple<Tensor, Tensor> temporal_attention_packed_backward(
    const Tensor& grad, const Tensor& qkv, const Optional& bias, const Optional& cos, const Optional& sin, double scale,
    bool causal, bool bias_grad) {
  const Options options(bias, cos, sin, scale, causal);
  const Tensor dqkv = empty_beside(
      qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3), qkv.size(4), qkv.size(5)}, qkv.scalar_type());
  const Tensor dbias = run_backward(
      qkv, {problems_of(qkv, options, bias_grad), heads_of(qkv, kQ), heads_of(qkv, kK), heads_of(qkv, kV),
            heads_of(grad), heads_of(dqkv, kQ), heads_of(dqkv, kK), heads_of(dqkv, kV), nullptr}, bias_grad);
  return {dqkv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) { define_temporal_attention(m); }

STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) {
  m.impl("temporal_attention", TORCH_BOX(&temporal_attention));
  m.impl("temporal_attention_backward", TORCH_BOX(&temporal_attention_backward));
  m.impl("temporal_attention_packed", TORCH_BOX(&temporal_attention_packed));
  m.impl("temporal_attention_packed_backward", TORCH_BOX(&temporal_attention_packed_backward));
}

}  // namespace vidkern::cuda

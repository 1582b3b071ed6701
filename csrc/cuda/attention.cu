// Temporal attention on CUDA: its operators, and the sum of the bias's gradient over runs.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

Table table_of(const Optional& table) {
  if (!table.has_value()) return {};
  const bool by_head = table->dim() == 3;
  return {table->data_ptr(), by_head ? table->stride(0) : 0, table->stride(by_head ? 1 : 0),
          table->scalar_type() == ScalarType::Float, rows_aligned(*table)};
}

// Positions that a warp takes where the bias has a gradient: enough warps for any GPU, and few rows to add up.
constexpr int64_t kTilesOfAll = 8192;

Problems problems_of(const Tensor& tokens, const Optional& bias, const Optional& cos, const Optional& sin, double scale,
                     bool causal, bool bias_grad) {
  const int64_t last = tokens.dim() - 1, b = tokens.size(0), f = tokens.size(1), n = tokens.size(2);
  const int64_t h = tokens.size(last - 1), positions = b * n, tiles = (f + 15) / 16;
  STD_TORCH_CHECK(f <= kMaxFrames, "F must be at most ", kMaxFrames, ", got ", f);
  STD_TORCH_CHECK(positions <= std::numeric_limits<int>::max(), "B * N must be below 2^31, got ", positions);
  const int64_t rows = std::max<int64_t>(1, kTilesOfAll / std::max<int64_t>(1, h * tiles));
  const int64_t run = bias_grad ? std::max<int64_t>(1, (positions + rows - 1) / rows) : 1;
  const auto i32 = [](int64_t x) { return static_cast<int>(x); };
  return {i32(b), i32(f), i32(n), i32(h), i32(tokens.size(last)), i32(run), i32((positions + run - 1) / run),
          table_of(bias), table_of(cos), table_of(sin), static_cast<float>(scale), causal};
}

Tensor run_forward(const Tensor& tokens, const Forward& call, const Tensor& o) {
  switch (dtype_of(tokens)) {
    case Dtype::float32: launch_forward<float>(tokens, call); break;
    case Dtype::bfloat16: launch_forward<__nv_bfloat16>(tokens, call); break;
    case Dtype::float16: launch_forward<__half>(tokens, call); break;
  }
  return o;
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
  const auto floats = [&](std::initializer_list<int64_t> size) { return empty_beside(tokens, size, ScalarType::Float); };
  const Tensor partial = bias_grad ? floats({all.runs, all.h, all.f, all.f}) : floats({0});
  const Tensor total = bias_grad ? floats({all.h, all.f, all.f}) : floats({0});
  call.grad_bias = bias_grad ? partial.mutable_data_ptr<float>() : nullptr;
  switch (dtype_of(tokens)) {
    case Dtype::float32: launch_backward<float>(tokens, call); break;
    case Dtype::bfloat16: launch_backward<__nv_bfloat16>(tokens, call); break;
    case Dtype::float16: launch_backward<__half>(tokens, call); break;
  }
  if (bias_grad) {
    const int64_t size = total.numel();
    launch(tokens, sum_bias_grad_kernel, (size + kSumColumns - 1) / kSumColumns, kSumColumns * kSumSlices,
           call.grad_bias, total.mutable_data_ptr<float>(), size, static_cast<int64_t>(all.runs));
  }
  return total;
}

Tensor temporal_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& cos,
                          const Optional& sin, double scale, bool causal) {
  const Tensor o = empty_beside(q, {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4)}, q.scalar_type());
  const Problems all = problems_of(q, bias, cos, sin, scale, causal, false);
  return run_forward(q, {all, heads_of(q), heads_of(k), heads_of(v), heads_of(o)}, o);
}

Tensor temporal_attention_packed(const Tensor& qkv, const Optional& bias, const Optional& cos, const Optional& sin,
                                 double scale, bool causal) {
  const Tensor o =
      empty_beside(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(4), qkv.size(5)}, qkv.scalar_type());
  const Problems all = problems_of(qkv, bias, cos, sin, scale, causal, false);
  return run_forward(qkv, {all, heads_of(qkv, kQ), heads_of(qkv, kK), heads_of(qkv, kV), heads_of(o)}, o);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> temporal_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& cos,
    const Optional& sin, double scale, bool causal, bool bias_grad) {
  const auto like_q = [&] {
    return empty_beside(q, {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4)}, q.scalar_type());
  };
  const Tensor dq = like_q(), dk = like_q(), dv = like_q();
  const Problems all = problems_of(q, bias, cos, sin, scale, causal, bias_grad);
  const Backward call = {all, heads_of(q), heads_of(k), heads_of(v), heads_of(grad), heads_of(dq), heads_of(dk),
                         heads_of(dv), nullptr};
  const Tensor dbias = run_backward(q, call, bias_grad);
  return {dq, dk, dv, dbias};
}

std::tuple<Tensor, Tensor> temporal_attention_packed_backward(
    const Tensor& grad, const Tensor& qkv, const Optional& bias, const Optional& cos, const Optional& sin, double scale,
    bool causal, bool bias_grad) {
  const Tensor dqkv = empty_beside(
      qkv, {qkv.size(0), qkv.size(1), qkv.size(2), 3, qkv.size(4), qkv.size(5)}, qkv.scalar_type());
  const Problems all = problems_of(qkv, bias, cos, sin, scale, causal, bias_grad);
  const Backward call = {all, heads_of(qkv, kQ), heads_of(qkv, kK), heads_of(qkv, kV), heads_of(grad),
                         heads_of(dqkv, kQ), heads_of(dqkv, kK), heads_of(dqkv, kV), nullptr};
  const Tensor dbias = run_backward(qkv, call, bias_grad);
  return {dqkv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) {
  m.def("temporal_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cos, Tensor? sin, float scale,"
        " bool causal) -> Tensor");
  m.def("temporal_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cos, Tensor? sin,"
        " float scale, bool causal, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("temporal_attention_packed(Tensor qkv, Tensor? bias, Tensor? cos, Tensor? sin, float scale, bool causal)"
        " -> Tensor");
  m.def("temporal_attention_packed_backward(Tensor do, Tensor qkv, Tensor? bias, Tensor? cos, Tensor? sin,"
        " float scale, bool causal, bool bias_grad) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) {
  m.impl("temporal_attention", TORCH_BOX(&temporal_attention));
  m.impl("temporal_attention_backward", TORCH_BOX(&temporal_attention_backward));
  m.impl("temporal_attention_packed", TORCH_BOX(&temporal_attention_packed));
  m.impl("temporal_attention_packed_backward", TORCH_BOX(&temporal_attention_packed_backward));
}

}  // namespace vidkern::cuda

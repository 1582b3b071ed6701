// The modulation family on CUDA: norm, shift and scale of a frame's tokens in one pass.
//
// A block takes a run of one frame's tokens, a few at a time. Each thread owns the same columns of all of them, so it
// holds its part of the frame's vectors, and of their gradients, in registers.
#include <array>
#include <tuple>

#include "common/device.h"
#include "common/launch.h"

namespace vidkern::cuda {
namespace {

constexpr int kMaxChannels = 8192;

// Packs that a thread owns, tokens that a block takes at a time, the widest row, and registers that a thread may use:
// the fewest without a spill.
template <int kPacksPerThread, int kTokensAtOnce, int kMaxChannelsHere, int kRegistersAtMost>
struct Config {
  static constexpr int kPacks = kPacksPerThread, kTokens = kTokensAtOnce, kRegisters = kRegistersAtMost;
  static constexpr int kMaxThreads = kMaxChannelsHere / kPack / kPacks, kMaxWarps = kMaxThreads / kWarp;

  static bool takes(int64_t d) { return d <= kMaxChannelsHere; }
  static int threads(int64_t d) {
    const int packs = static_cast<int>(d) / kPack, per_thread = (packs + kPacks - 1) / kPacks;
    return (per_thread + kWarp - 1) / kWarp * kWarp;
  }
};

struct Forward {
  Runs runs;
  Tokens x, y;
  FrameVector shift, scale;
  float *mean, *rstd;  // (B, F, N)
  float eps;
};

// The mean is taken twice: `slip` is what rounding left over, and matters where |mean| is far above the deviation.
template <typename T, typename C>
__global__ void __maxnreg__(C::kRegisters + (sizeof(T) == 4 ? 8 : 0)) layer_norm_modulate_kernel(const Forward a) {
  __shared__ Shared<float, C::kMaxWarps * C::kTokens> totals;
  __shared__ Shared<float, C::kMaxWarps * C::kTokens * 2> moments;
  const Run run = a.runs[blockIdx.x];
  const int d = static_cast<int>(a.runs.shape.d);
  const float inverse_d = 1.0f / static_cast<float>(d);
  const int tokens = static_cast<int>(run.last - run.first);
  const T* x_run = static_cast<const T*>(a.x.data) + a.x.offset(run.b, run.f, run.first);
  T* y_run = static_cast<T*>(a.y.data) + a.y.offset(run.b, run.f, run.first);
  const int64_t first_token = (run.b * a.runs.shape.f + run.f) * a.runs.shape.n + run.first;
  float scale[1][C::kPacks][kPack], shift[1][C::kPacks][kPack];
  load_vector(a.scale, run, d, scale);
  load_vector(a.shift, run, d, shift);

#pragma unroll 1
  for (int n = 0; n < tokens; n += C::kTokens) {
    float x[C::kTokens][C::kPacks][kPack], total[C::kTokens], moment[2 * C::kTokens];
    Pack<T> x_packs[C::kTokens][C::kPacks];
    load_rows(x_run + n * a.x.stride_n, a.x.stride_n, a.x.aligned, tokens - n, d, x_packs);
    widen(x_packs, x);
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      total[t] = 0.0f;
      for_each_element<C::kPacks>([&](int p, int i) { total[t] += x[t][p][i]; });
    }
    block_sum(total, totals);
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      const float mean = total[t] * inverse_d;
      float &rest = moment[2 * t] = 0.0f, &squares = moment[2 * t + 1] = 0.0f;
      for_each_element_below<C::kPacks>(d, [&](int p, int i) {
        x[t][p][i] -= mean;
        rest += x[t][p][i];
        squares += x[t][p][i] * x[t][p][i];
      });
    }
    block_sum(moment, moments);
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      if (n + t >= tokens) break;
      const float slip = moment[2 * t] * inverse_d, variance = moment[2 * t + 1] * inverse_d - slip * slip;
      const float rstd = rsqrtf((variance < 0.0f ? 0.0f : variance) + a.eps);
      for_each_element<C::kPacks>([&](int p, int i) {
        x[t][p][i] = (x[t][p][i] - slip) * rstd * (1.0f + scale[0][p][i]) + shift[0][p][i];
      });
      store_row(y_run + (n + t) * a.y.stride_n, d, x[t]);
      if (threadIdx.x == 0) {
        a.mean[first_token + n + t] = total[t] * inverse_d + slip;
        a.rstd[first_token + n + t] = rstd;
      }
    }
  }
}

struct Backward {
  Runs runs;
  Tokens dy, x, dx;
  FrameVector scale;
  const float *mean, *rstd;  // (B, F, N)
  float *dshift, *dscale;    // (B, F, runs, D)
};

template <typename T, typename C>
__global__ void __maxnreg__(C::kRegisters + (sizeof(T) == 4 ? 8 : 0)) layer_norm_modulate_backward_kernel(const Backward a) {
  __shared__ Shared<float, C::kMaxWarps * C::kTokens * 2> scratch[2];
  const Run run = a.runs[blockIdx.x];
  const int d = static_cast<int>(a.runs.shape.d);
  const float inverse_d = 1.0f / static_cast<float>(d);
  const int tokens = static_cast<int>(run.last - run.first);
  const T* dy_run = static_cast<const T*>(a.dy.data) + a.dy.offset(run.b, run.f, run.first);
  const T* x_run = static_cast<const T*>(a.x.data) + a.x.offset(run.b, run.f, run.first);
  T* dx_run = static_cast<T*>(a.dx.data) + a.dx.offset(run.b, run.f, run.first);
  const int64_t first_token = (run.b * a.runs.shape.f + run.f) * a.runs.shape.n + run.first;
  float scale[1][C::kPacks][kPack], dshift[C::kPacks][kPack] = {}, dscale[C::kPacks][kPack] = {};
  load_vector(a.scale, run, d, scale);

  int phase = 0;
#pragma unroll 1
  for (int n = 0; n < tokens; n += C::kTokens, phase ^= 1) {
    float dy[C::kTokens][C::kPacks][kPack], x[C::kTokens][C::kPacks][kPack];
    float mean[C::kTokens], rstd[C::kTokens], sums[2 * C::kTokens];
    Pack<T> dy_packs[C::kTokens][C::kPacks], x_packs[C::kTokens][C::kPacks];
    load_rows(dy_run + n * a.dy.stride_n, a.dy.stride_n, a.dy.aligned, tokens - n, d, dy_packs);
    load_rows(x_run + n * a.x.stride_n, a.x.stride_n, a.x.aligned, tokens - n, d, x_packs);
    widen(dy_packs, dy);
    widen(x_packs, x);
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      const bool inside = n + t < tokens;
      mean[t] = inside ? a.mean[first_token + n + t] : 0.0f;
      rstd[t] = inside ? a.rstd[first_token + n + t] : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      float &grad = sums[2 * t] = 0.0f, &along = sums[2 * t + 1] = 0.0f;
      for_each_element<C::kPacks>([&](int p, int i) {
        float &normed = x[t][p][i], &dnormed = dy[t][p][i];
        normed = (normed - mean[t]) * rstd[t];
        dshift[p][i] += dnormed;
        dscale[p][i] += dnormed * normed;
        dnormed *= 1.0f + scale[0][p][i];
        grad += dnormed;
        along += dnormed * normed;
      });
    }
    block_sum(sums, scratch[phase]);
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      if (n + t >= tokens) break;
      const float grad = sums[2 * t] * inverse_d, along = sums[2 * t + 1] * inverse_d;
      for_each_element<C::kPacks>([&](int p, int i) {
        x[t][p][i] = rstd[t] * (dy[t][p][i] - grad - x[t][p][i] * along);
      });
      store_row(dx_run + (n + t) * a.dx.stride_n, d, x[t]);
    }
  }
  store_row(a.dshift + blockIdx.x * static_cast<int64_t>(d), d, dshift);
  store_row(a.dscale + blockIdx.x * static_cast<int64_t>(d), d, dscale);
}

constexpr int kMaxSums = 3;
constexpr int kSumThreads = 128;

struct Sums {  // kMaxSums at most of (B, F, runs, D) -> (B, F, D)
  const float* partial[kMaxSums];
  float* total[kMaxSums];
  int count, chunks;  // blocks that share the columns of one frame
  int64_t runs, d;
};

__global__ void sum_runs_kernel(const Sums a) {
  const int64_t which = blockIdx.x % a.count, block = blockIdx.x / a.count, frame = block / a.chunks;
  const int64_t i = ((block % a.chunks) * kSumThreads + threadIdx.x) * kPack;
  if (i >= a.d) return;
  const float* rows = a.partial[0];
  float* sums = a.total[0];
#pragma unroll
  for (int k = 1; k < kMaxSums; ++k) {  // a run-time index would put the arrays into local memory
    if (which == k) rows = a.partial[k], sums = a.total[k];
  }
  rows += frame * a.runs * a.d + i;
  float total[kPack] = {}, row[kPack];
  for (int64_t r = 0; r < a.runs; ++r) {
    Pack<float>::aligned(rows + r * a.d).widen(row);
#pragma unroll
    for (int k = 0; k < kPack; ++k) total[k] += row[k];
  }
  Pack<float>::round(total).store(sums + frame * a.d + i);
}

// One row of float32 for each run: what sum_runs adds up.
Tensor empty_partial(const Tensor& x, const Runs& runs) {
  return empty_beside(x, {runs.shape.b, runs.shape.f, runs.per_frame, runs.shape.d}, ScalarType::Float);
}

// Adds up the runs of each frame in their order, for all gradients of an operator in one launch.
template <size_t kCount>
std::array<Tensor, kCount> sum_runs(const std::array<Tensor, kCount>& partial) {
  static_assert(kCount <= kMaxSums);
  const Tensor& like = partial[0];
  const int64_t b = like.size(0), f = like.size(1), runs = like.size(2), d = like.size(3);
  const int chunks = static_cast<int>((d / kPack + kSumThreads - 1) / kSumThreads);
  Sums sums{{}, {}, static_cast<int>(kCount), chunks, runs, d};
  std::array<Tensor, kCount> totals = partial;
  for (size_t k = 0; k < kCount; ++k) {
    totals[k] = empty_beside(like, {b, f, d}, ScalarType::Float);
    sums.partial[k] = partial[k].template const_data_ptr<float>();
    sums.total[k] = totals[k].template mutable_data_ptr<float>();
  }
  launch(like, sum_runs_kernel, b * f * chunks * static_cast<int64_t>(kCount), kSumThreads, sums);
  return totals;
}

// Calls f(T{}) with the element type of the tensors.
template <typename F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::bfloat16: return f(__nv_bfloat16{});
    case Dtype::float16: return f(__half{});
  }
}

// Calls f(Config{}) with the first configuration that takes D channels.
template <typename First, typename... Rest, typename F>
void with_config(int64_t d, F f) {
  if (First::takes(d)) return f(First{});
  if constexpr (sizeof...(Rest) > 0) {
    with_config<Rest...>(d, f);
  } else {
    STD_TORCH_CHECK(false, "D must be at most ", kMaxChannels, ", got ", d);
  }
}

constexpr int64_t kForwardRun = 16, kBackwardRun = 32;  // tokens

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate(
    const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor y = empty_tokens(x), mean = empty_statistics(x), rstd = empty_statistics(x);
  const Runs runs(shape_of(x), kForwardRun);
  const Forward a{runs, tokens_of(x), tokens_of(y), vector_of(shift), vector_of(scale),
                  mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), static_cast<float>(eps)};
  with_type(dtype_of(x), [&](auto element) {
    with_config<Config<1, 4, 2048, 96>, Config<2, 2, 4096, 96>, Config<4, 1, kMaxChannels, 120>>(x.size(3), [&](auto config) {
      using C = decltype(config);
      launch(x, layer_norm_modulate_kernel<decltype(element), C>, runs.count(), C::threads(x.size(3)), a);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& mean, const Tensor& rstd) {
  const Runs runs(shape_of(x), kBackwardRun);
  const Tensor dx = empty_tokens(x), dshift = empty_partial(x, runs), dscale = empty_partial(x, runs);
  const Backward a{runs, tokens_of(dy), tokens_of(x), tokens_of(dx), vector_of(scale),
                   mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(),
                   dshift.mutable_data_ptr<float>(), dscale.mutable_data_ptr<float>()};
  with_type(dtype_of(x), [&](auto element) {
    with_config<Config<1, 2, 2048, 96>, Config<2, 1, kMaxChannels, 120>>(x.size(3), [&](auto config) {
      using C = decltype(config);
      launch(x, layer_norm_modulate_backward_kernel<decltype(element), C>, runs.count(), C::threads(x.size(3)), a);
    });
  });
  const auto [shift_sum, scale_sum] = sum_runs<2>({dshift, dscale});
  return {dx, shift_sum, scale_sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) {
  m.def("layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm_modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd)"
        " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward));
}

}  // namespace vidkern::cuda

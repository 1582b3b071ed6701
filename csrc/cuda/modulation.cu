// The modulation family on CUDA: residual, norm, shift and scale of a frame's tokens in one pass, and their gradients.
//
// A block takes a run of one frame's tokens, a few at a time. Each thread owns the same columns of all of them, so it
// holds its part of the frame's vectors, and of their gradients, in registers.
#include <array>
#include <optional>
#include <tuple>

#include "common/device.h"
#include "common/launch.h"

namespace vidkern::cuda {
namespace {

enum class Norm { none, layer, rms };

// A member of the family: with or without a residual before the norm. nvcc's host code cannot name a kernel that has it
// as a template parameter, so kernels take its parts.
struct Kind {
  bool residual;
  Norm norm;
};

constexpr Kind kLayerNormModulate{false, Norm::layer}, kRmsNormModulate{false, Norm::rms};
constexpr Kind kGateResidual{true, Norm::none};
constexpr Kind kGateResidualModulate{true, Norm::layer}, kGateResidualRmsModulate{true, Norm::rms};

// Packs that a thread owns, tokens that a block takes at a time, registers that a thread may use, threads of a block.
template <int kPacksPerThread, int kTokensAtOnce, int kRegistersAtMost, int kThreadsAtMost = 256>
struct Config {
  static constexpr int kPacks = kPacksPerThread, kTokens = kTokensAtOnce, kRegisters = kRegistersAtMost;
  static constexpr int kMaxWarps = kThreadsAtMost / kWarp, kMaxChannels = kThreadsAtMost * kPacks * kPack;

  static int threads(int64_t d) {
    const int packs = static_cast<int>(d) / kPack, per_thread = (packs + kPacks - 1) / kPacks;
    return (per_thread + kWarp - 1) / kWarp * kWarp;
  }
};

// A run's rows of one tensor, from the token on that the block has come to. (A pointer that moves leaves the compiler
// no sums of row and column to hold in registers.)
template <typename T>
struct RunRows {
  T* row;
  int64_t stride;
  bool aligned;

  __device__ RunRows(const Tokens& tokens, const Run& run)
      : row(static_cast<T*>(tokens.data) + tokens.offset(run.b, run.f, run.first)),
        stride(tokens.stride_n),
        aligned(tokens.aligned) {}

  __device__ T* at(int t) const { return row + t * stride; }

  template <int kTokens, int kPacks>
  __device__ void load(int count, int d, Pack<T> (&packs)[kTokens][kPacks]) const {
    load_rows(row, stride, aligned, count, d, packs);
  }
};

template <typename... Rows>
__device__ inline void advance(int tokens, Rows&... rows) {
  ((rows.row += tokens * rows.stride), ...);
}

__device__ inline int64_t first_token(const Shape& shape, const Run& run) {
  return (run.b * shape.f + run.f) * shape.n + run.first;
}

template <int kPacks>
__device__ inline void load_gain(const FrameVector& scale, const Run& run, int d, float (&gain)[kPacks][kPack]) {
  load_vector(scale, run, d, gain);
  for_each_element<kPacks>([&](int p, int i) { gain[p][i] += 1.0f; });
}

struct Forward {
  Runs runs;
  Dtype dtype;
  Tokens x = {}, y = {}, z = {}, h = {};
  FrameVector gate = {}, shift = {}, scale = {};
  float *mean = nullptr, *rstd = nullptr;  // (B, F, N)
  float eps = 0.0f;
};

// The mean is taken twice: `slip` is what rounding left over, and matters where |mean| is far above the deviation.
// The norm is taken of z before it is rounded to T.
template <bool kResidual, Norm kNorm, typename T, typename C>
__global__ void __maxnreg__(C::kRegisters) forward_kernel(const Forward a) {
  constexpr int kTokens = C::kTokens, kPacks = C::kPacks;
  __shared__ Shared<float, C::kMaxWarps * kTokens * 2> scratch[2];
  const Run run = a.runs[blockIdx.x];
  const int d = static_cast<int>(a.runs.shape.d), tokens = static_cast<int>(run.last - run.first);
  const float inverse_d = 1.0f / static_cast<float>(d);
  RunRows<T> x_rows(a.x, run), y_rows(a.y, run), z_rows(a.z, run), h_rows(a.h, run);
  const int64_t first = first_token(a.runs.shape, run);
  float gate[kPacks][kPack], gain[kPacks][kPack], shift[kPacks][kPack];
  if constexpr (kResidual) load_vector(a.gate, run, d, gate);
  if constexpr (kNorm != Norm::none) {
    load_gain(a.scale, run, d, gain);
    load_vector(a.shift, run, d, shift);
  }

  int turn = 0;
#pragma unroll 1
  for (int n = 0; n < tokens; n += kTokens, advance(kTokens, x_rows, y_rows, z_rows, h_rows)) {
    float z[kTokens][kPacks][kPack];
    Pack<T> x_packs[kTokens][kPacks], y_packs[kTokens][kPacks];
    x_rows.load(tokens - n, d, x_packs);
    if constexpr (kResidual) y_rows.load(tokens - n, d, y_packs);
    widen(x_packs, z);
    if constexpr (kResidual) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float y[kPacks][kPack];
        widen(y_packs[t], y);
        for_each_element<kPacks>([&](int p, int i) { z[t][p][i] += gate[p][i] * y[p][i]; });
        if (n + t < tokens) store_row(z_rows.at(t), d, z[t]);
      }
    }
    if constexpr (kNorm == Norm::none) continue;

    float mean[kTokens] = {}, variance[kTokens];
    if constexpr (kNorm == Norm::layer) {
      float moments[2 * kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        for_each_element<kPacks>([&](int p, int i) { mean[t] += z[t][p][i]; });
      block_sum(mean, scratch[turn]);
      turn ^= 1;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        mean[t] *= inverse_d;
        float &rest = moments[2 * t] = 0.0f, &squares = moments[2 * t + 1] = 0.0f;
        for_each_element_below<kPacks>(d, [&](int p, int i) {
          z[t][p][i] -= mean[t];
          rest += z[t][p][i];
          squares += z[t][p][i] * z[t][p][i];
        });
      }
      block_sum(moments, scratch[turn]);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float slip = moments[2 * t] * inverse_d;
        variance[t] = moments[2 * t + 1] * inverse_d - slip * slip;
        for_each_element<kPacks>([&](int p, int i) { z[t][p][i] -= slip; });
        mean[t] += slip;
      }
    } else {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        variance[t] = 0.0f;
        for_each_element<kPacks>([&](int p, int i) { variance[t] += z[t][p][i] * z[t][p][i]; });
      }
      block_sum(variance, scratch[turn]);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) variance[t] *= inverse_d;
    }
    turn ^= 1;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (n + t >= tokens) break;
      const float rstd = rsqrtf((variance[t] < 0.0f ? 0.0f : variance[t]) + a.eps);
      for_each_element<kPacks>([&](int p, int i) { z[t][p][i] = z[t][p][i] * rstd * gain[p][i] + shift[p][i]; });
      store_row(h_rows.at(t), d, z[t]);
      if (threadIdx.x == 0) {
        if constexpr (kNorm == Norm::layer) a.mean[first + n + t] = mean[t];
        a.rstd[first + n + t] = rstd;
      }
    }
  }
}

struct Backward {
  Runs runs;
  Dtype dtype;
  Tokens dh = {}, dz = {}, x = {}, y = {}, dx = {}, dy = {};  // dz has no data where nothing else reads z
  FrameVector gate = {}, scale = {};
  const float *mean = nullptr, *rstd = nullptr;                   // (B, F, N)
  float *dgate = nullptr, *dshift = nullptr, *dscale = nullptr;  // (B, F, runs, D)
};

// The gradient of z is the sum of dz and of what comes through the norm.
template <bool kResidual, Norm kNorm, typename T, typename C>
__global__ void __maxnreg__(C::kRegisters) backward_kernel(const Backward a) {
  constexpr int kTokens = C::kTokens, kPacks = C::kPacks;
  constexpr bool kHold = !kResidual || kPacks < 4;  // four packs of four tensors do not fit: they are read twice
  __shared__ Shared<float, C::kMaxWarps * kTokens * 2> scratch[2];
  const Run run = a.runs[blockIdx.x];
  const int d = static_cast<int>(a.runs.shape.d), tokens = static_cast<int>(run.last - run.first);
  const float inverse_d = 1.0f / static_cast<float>(d);
  const bool has_dz = a.dz.data != nullptr;
  RunRows<T> dh_rows(a.dh, run), dz_rows(a.dz, run), x_rows(a.x, run), y_rows(a.y, run);
  RunRows<T> dx_rows(a.dx, run), dy_rows(a.dy, run);
  const int64_t first = first_token(a.runs.shape, run);
  float gate[kPacks][kPack], gain[kPacks][kPack];
  float dgate[kPacks][kPack] = {}, dshift[kPacks][kPack] = {}, dscale[kPacks][kPack] = {};
  if constexpr (kResidual) load_vector(a.gate, run, d, gate);
  if constexpr (kNorm != Norm::none) load_gain(a.scale, run, d, gain);

  int turn = 0;
#pragma unroll 1
  for (int n = 0; n < tokens; n += kTokens, advance(kTokens, dh_rows, dz_rows, x_rows, y_rows, dx_rows, dy_rows)) {
    Pack<T> dh_packs[kTokens][kPacks], dz_packs[kTokens][kPacks], x_packs[kTokens][kPacks], y_packs[kTokens][kPacks];
    float mean[kTokens] = {}, rstd[kTokens] = {}, grad[kTokens] = {}, along[kTokens] = {};
    if constexpr (kHold) {
      if constexpr (kNorm != Norm::none) {
        dh_rows.load(tokens - n, d, dh_packs);
        x_rows.load(tokens - n, d, x_packs);
      }
      if constexpr (kResidual) {
        y_rows.load(tokens - n, d, y_packs);
        if (has_dz) dz_rows.load(tokens - n, d, dz_packs);
      }
    }
    const auto load_again = [&](int t, int p) {
      if constexpr (!kHold) {
        dh_packs[t][p] = load_pack(dh_rows.at(t), dh_rows.aligned, p, d);
        x_packs[t][p] = load_pack(x_rows.at(t), x_rows.aligned, p, d);
        y_packs[t][p] = load_pack(y_rows.at(t), y_rows.aligned, p, d);
      }
    };
    const auto unpack = [&](int t, int p, float (&dh)[kPack], float (&normed)[kPack]) {
      dh_packs[t][p].widen(dh);
      x_packs[t][p].widen(normed);
      if constexpr (kResidual) {
        float y[kPack];
        y_packs[t][p].widen(y);
        for_each([&](int i) { normed[i] += gate[p][i] * y[i]; });
      }
      for_each([&](int i) { normed[i] = (normed[i] - mean[t]) * rstd[t]; });
    };

    if constexpr (kNorm != Norm::none) {
      constexpr int kSums = kNorm == Norm::layer ? 2 : 1;
      float sums[kTokens * kSums];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if constexpr (kNorm == Norm::layer) mean[t] = n + t < tokens ? a.mean[first + n + t] : 0.0f;
        rstd[t] = n + t < tokens ? a.rstd[first + n + t] : 0.0f;
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          float dh[kPack], normed[kPack];
          load_again(t, p);
          unpack(t, p, dh, normed);
          for_each([&](int i) {
            dshift[p][i] += dh[i];
            dscale[p][i] += dh[i] * normed[i];
            if constexpr (kNorm == Norm::layer) grad[t] += dh[i] * gain[p][i];
            along[t] += dh[i] * gain[p][i] * normed[i];
          });
        }
        sums[t * kSums] = along[t];
        if constexpr (kNorm == Norm::layer) sums[t * kSums + 1] = grad[t];
      }
      block_sum(sums, scratch[turn]);
      turn ^= 1;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        along[t] = sums[t * kSums] * inverse_d;
        if constexpr (kNorm == Norm::layer) grad[t] = sums[t * kSums + 1] * inverse_d;
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (n + t >= tokens) break;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        float dz[kPack] = {};
        load_again(t, p);
        if constexpr (!kHold)
          if (has_dz) dz_packs[t][p] = load_pack(dz_rows.at(t), dz_rows.aligned, p, d);
        if constexpr (kResidual) dz_packs[t][p].widen(dz);
        if constexpr (kNorm != Norm::none) {
          float dh[kPack], normed[kPack];
          unpack(t, p, dh, normed);
          for_each([&](int i) { dz[i] += rstd[t] * (dh[i] * gain[p][i] - grad[t] - normed[i] * along[t]); });
          store_pack(dx_rows.at(t), p, d, dz);
        }
        if constexpr (kResidual) {
          float y[kPack];
          y_packs[t][p].widen(y);
          for_each([&](int i) {
            dgate[p][i] += dz[i] * y[i];
            dz[i] *= gate[p][i];
          });
          store_pack(dy_rows.at(t), p, d, dz);
        }
      }
    }
  }
  const int64_t row = blockIdx.x * static_cast<int64_t>(d);
  if constexpr (kResidual) store_row(a.dgate + row, d, dgate);
  if constexpr (kNorm != Norm::none) {
    store_row(a.dshift + row, d, dshift);
    store_row(a.dscale + row, d, dscale);
  }
}

constexpr int kMaxSums = 3;
constexpr int kSumThreads = 128, kSumColumns = 4, kSumRows = 8;  // columns of a thread, and rows under way at once

struct Sums {  // kMaxSums at most of (B, F, runs, D) -> (B, F, D)
  const float* partial[kMaxSums];
  float* total[kMaxSums];
  int count, chunks;  // blocks that share the columns of one frame
  int64_t runs, d;
};

// (with no limit on registers ptxas spares them, and waits between the loads)
__global__ void __maxnreg__(64) sum_runs_kernel(const Sums a) {
  const int64_t which = blockIdx.x % a.count, block = blockIdx.x / a.count, frame = block / a.chunks;
  const int64_t i = ((block % a.chunks) * kSumThreads + threadIdx.x) * kSumColumns;
  if (i >= a.d) return;
  const float* rows = a.partial[0];
  float* sums = a.total[0];
#pragma unroll
  for (int k = 1; k < kMaxSums; ++k) {  // a run-time index would put the arrays into local memory
    if (which == k) rows = a.partial[k], sums = a.total[k];
  }
  rows += frame * a.runs * a.d + i;
  float4 total = {};
#pragma unroll 1
  for (int64_t r = 0; r < a.runs; r += kSumRows, rows += kSumRows * a.d) {
    float4 row[kSumRows] = {};
#pragma unroll
    for (int k = 0; k < kSumRows; ++k)
      if (r + k < a.runs) row[k] = *reinterpret_cast<const float4*>(rows + k * a.d);
#pragma unroll
    for (int k = 0; k < kSumRows; ++k)
      total = {total.x + row[k].x, total.y + row[k].y, total.z + row[k].z, total.w + row[k].w};
  }
  __stwb(reinterpret_cast<float4*>(sums + frame * a.d + i), total);
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
  const int chunks = static_cast<int>((d / kSumColumns + kSumThreads - 1) / kSumThreads);
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

template <typename...>
struct Configs {};

// Calls f(Config{}) with the first configuration that takes D channels.
template <typename First, typename... Rest, typename F>
void with_config(Configs<First, Rest...>, int64_t d, F f) {
  if (d <= First::kMaxChannels) return f(First{});
  if constexpr (sizeof...(Rest) > 0) {
    with_config(Configs<Rest...>{}, d, f);
  } else {
    STD_TORCH_CHECK(false, "D must be at most ", First::kMaxChannels, ", got ", d);
  }
}

// 24 KB of loads under way on every SM, up to D = 4096, are the aim: they cover the latency of every GPU so far.
template <Kind kind, typename T>
constexpr auto forward_configs() {
  constexpr int k = 4 / sizeof(T);  // two 16-bit tokens are as many bytes as one of float
  if constexpr (kind.norm == Norm::none) {
    return Configs<Config<1, k, 64, 1024>>{};
  } else if constexpr (!kind.residual) {
    return Configs<Config<1, 2 * k, 96>, Config<2, k, 96, 512>>{};
  } else {
    return Configs<Config<1, k, 80>, Config<2, 1, k == 1 ? 128 : 96, 512>>{};
  }
}

template <Kind kind, typename T>
constexpr auto backward_configs() {
  constexpr int k = 4 / sizeof(T);
  if constexpr (kind.norm == Norm::none) {
    return Configs<Config<1, k, 64, 1024>>{};
  } else if constexpr (!kind.residual) {
    return Configs<Config<1, k, 96>, Config<2, 1, 128, 512>>{};
  } else {
    return Configs<Config<1, 1, 96>, Config<2, 1, 168, 384>, Config<4, 1, 255>>{};
  }
}

template <Kind kind>
void forward(const Tensor& on, const Forward& a) {
  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_config(forward_configs<kind, T>(), a.runs.shape.d, [&](auto config) {
      using C = decltype(config);
      launch(on, forward_kernel<kind.residual, kind.norm, T, C>, a.runs.count(), C::threads(a.runs.shape.d), a);
    });
  });
}

template <Kind kind>
void backward(const Tensor& on, const Backward& a) {
  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_config(backward_configs<kind, T>(), a.runs.shape.d, [&](auto config) {
      using C = decltype(config);
      launch(on, backward_kernel<kind.residual, kind.norm, T, C>, a.runs.count(), C::threads(a.runs.shape.d), a);
    });
  });
}

// Short runs fill the GPU to the end: 1000 blocks are two to three rounds of those that an A100 holds. Long runs write
// fewer partial rows: 4 D bytes a gradient, written and read again, beside 3 to 6 D e bytes for each token of the run;
// in 16 bits 6 to 8% more at 32 tokens, 25 to 33% at 8.
Runs runs_of(const Tensor& tokens) {
  constexpr int64_t kShortest = 8, kLongest = 32, kBlocks = 1000;
  const Shape shape = shape_of(tokens);
  int64_t length = kLongest;
  while (length > kShortest && Runs(shape, length).count() < kBlocks) length /= 2;
  return Runs(shape, length);
}

float* floats(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }
const float* const_floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate(
    const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor y = empty_tokens(x), mean = empty_statistics(x), rstd = empty_statistics(x);
  forward<kLayerNormModulate>(x, {.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .h = tokens_of(y),
                               .shift = vector_of(shift), .scale = vector_of(scale),
                               .mean = floats(mean), .rstd = floats(rstd), .eps = float(eps)});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor y = empty_tokens(x), rstd = empty_statistics(x);
  forward<kRmsNormModulate>(x, {.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .h = tokens_of(y),
                             .shift = vector_of(shift), .scale = vector_of(scale),
                             .rstd = floats(rstd), .eps = float(eps)});
  return {y, rstd};
}

Tensor gate_residual(const Tensor& x, const Tensor& y, const Tensor& gate) {
  const Tensor z = empty_tokens(x);
  forward<kGateResidual>(x, {.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .y = tokens_of(y),
                          .z = tokens_of(z), .gate = vector_of(gate)});
  return z;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_modulate(
    const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor z = empty_tokens(x), h = empty_tokens(x), mean = empty_statistics(x), rstd = empty_statistics(x);
  forward<kGateResidualModulate>(x, {.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .y = tokens_of(y),
                                  .z = tokens_of(z), .h = tokens_of(h), .gate = vector_of(gate),
                                  .shift = vector_of(shift), .scale = vector_of(scale),
                                  .mean = floats(mean), .rstd = floats(rstd), .eps = float(eps)});
  return {z, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gate_residual_rms_modulate(
    const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor z = empty_tokens(x), h = empty_tokens(x), rstd = empty_statistics(x);
  forward<kGateResidualRmsModulate>(x, {.runs = runs_of(x), .dtype = dtype_of(x), .x = tokens_of(x), .y = tokens_of(y),
                                     .z = tokens_of(z), .h = tokens_of(h), .gate = vector_of(gate),
                                     .shift = vector_of(shift), .scale = vector_of(scale),
                                     .rstd = floats(rstd), .eps = float(eps)});
  return {z, h, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& mean, const Tensor& rstd) {
  const Runs runs = runs_of(x);
  const Tensor dx = empty_tokens(x), dshift = empty_partial(x, runs), dscale = empty_partial(x, runs);
  backward<kLayerNormModulate>(x, {.runs = runs, .dtype = dtype_of(x), .dh = tokens_of(dy), .x = tokens_of(x),
                                .dx = tokens_of(dx), .scale = vector_of(scale),
                                .mean = const_floats(mean), .rstd = const_floats(rstd),
                                .dshift = floats(dshift), .dscale = floats(dscale)});
  const auto [shift_sum, scale_sum] = sum_runs<2>({dshift, dscale});
  return {dx, shift_sum, scale_sum};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_modulate_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& rstd) {
  const Runs runs = runs_of(x);
  const Tensor dx = empty_tokens(x), dshift = empty_partial(x, runs), dscale = empty_partial(x, runs);
  backward<kRmsNormModulate>(x, {.runs = runs, .dtype = dtype_of(x), .dh = tokens_of(dy), .x = tokens_of(x),
                              .dx = tokens_of(dx), .scale = vector_of(scale), .rstd = const_floats(rstd),
                              .dshift = floats(dshift), .dscale = floats(dscale)});
  const auto [shift_sum, scale_sum] = sum_runs<2>({dshift, dscale});
  return {dx, shift_sum, scale_sum};
}

std::tuple<Tensor, Tensor> gate_residual_backward(const Tensor& dz, const Tensor& y, const Tensor& gate) {
  const Runs runs = runs_of(y);
  const Tensor dy = empty_tokens(y), dgate = empty_partial(y, runs);
  backward<kGateResidual>(y, {.runs = runs, .dtype = dtype_of(y), .dz = tokens_of(dz), .y = tokens_of(y),
                           .dy = tokens_of(dy), .gate = vector_of(gate), .dgate = floats(dgate)});
  return {dy, sum_runs<1>({dgate})[0]};
}

using ResidualGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <Kind kind>
ResidualGradients residual_norm_backward(
    const Tensor& dh, const std::optional<Tensor>& dz, const Tensor& x, const Tensor& y, const Tensor& gate,
    const Tensor& scale, const float* mean, const float* rstd) {
  const Runs runs = runs_of(x);
  const Tensor dx = empty_tokens(x), dy = empty_tokens(x);
  const Tensor dgate = empty_partial(x, runs), dshift = empty_partial(x, runs), dscale = empty_partial(x, runs);
  backward<kind>(x, {.runs = runs, .dtype = dtype_of(x), .dh = tokens_of(dh), .dz = dz ? tokens_of(*dz) : Tokens{},
                  .x = tokens_of(x), .y = tokens_of(y), .dx = tokens_of(dx), .dy = tokens_of(dy),
                  .gate = vector_of(gate), .scale = vector_of(scale), .mean = mean, .rstd = rstd,
                  .dgate = floats(dgate), .dshift = floats(dshift), .dscale = floats(dscale)});
  const auto [gate_sum, shift_sum, scale_sum] = sum_runs<3>({dgate, dshift, dscale});
  return {dx, dy, gate_sum, shift_sum, scale_sum};
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

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) {
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

STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) {
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

}  // namespace vidkern::cuda

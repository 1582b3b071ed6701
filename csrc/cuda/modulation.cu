// The modulation family on CUDA: residual, norm, shift and scale of a frame's tokens in one pass, and their gradients.
//
// A block takes a run of one frame's tokens, a few at a time. Each thread owns the same columns of all of them, so it
// holds its part of the frame's vectors, and of their gradients, in registers.
#include <array>

#include "common/device.h"
#include "common/launch.h"
#include "common/modulation.h"

namespace vidkern::cuda {
namespace {

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

struct Cuda {
  // Short runs fill the GPU to the end: 1000 blocks are two to three rounds of those that an A100 holds. Long runs
  // write fewer partial rows: 4 D bytes a gradient, written and read again, beside 3 to 6 D e bytes for each token of
  // the run; in 16 bits 6 to 8% more at 32 tokens, 25 to 33% at 8.
  static Runs runs_of(const Tensor& tokens) {
    constexpr int64_t kShortest = 8, kLongest = 32, kBlocks = 1000;
    const Shape shape = shape_of(tokens);
    int64_t length = kLongest;
    while (length > kShortest && Runs(shape, length).count() < kBlocks) length /= 2;
    return Runs(shape, length);
  }

  template <Kind kind>
  static void forward(const Tensor& on, const Forward& a) {
    with_type(a.dtype, [&](auto element) {
      using T = decltype(element);
      with_config(forward_configs<kind, T>(), a.runs.shape.d, [&](auto config) {
        using C = decltype(config);
        launch(on, forward_kernel<kind.residual, kind.norm, T, C>, a.runs.count(), C::threads(a.runs.shape.d), a);
      });
    });
  }

  template <Kind kind>
  static void backward(const Tensor& on, const Backward& a) {
    with_type(a.dtype, [&](auto element) {
      using T = decltype(element);
      with_config(backward_configs<kind, T>(), a.runs.shape.d, [&](auto config) {
        using C = decltype(config);
        launch(on, backward_kernel<kind.residual, kind.norm, T, C>, a.runs.count(), C::threads(a.runs.shape.d), a);
      });
    });
  }

  // Adds up the runs of each frame in their order, for all gradients of an operator in one launch.
  template <size_t kCount>
  static std::array<Tensor, kCount> sum_runs(const std::array<Tensor, kCount>& partial) {
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
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) { ModulationOperators<Cuda>::define(m); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) { ModulationOperators<Cuda>::implement(m); }

}  // namespace vidkern::cuda

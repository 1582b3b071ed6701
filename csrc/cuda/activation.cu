// The activation family on CUDA: a thread owns eight columns of a run of rows, and their sum in registers.
#include "common/activation.h"
#include "common/device.h"
#include "common/launch.h"

namespace vidkern::cuda {
namespace {

constexpr int kMaxThreads = 256, kRegisters = 64;
constexpr int kForwardRun = 8;  // rows

template <typename T>
constexpr int kRowsAtOnce = 8 / sizeof(T);  // of a tensor, that a thread has under way: 64 bytes

struct Grid {
  int64_t run;  // rows
  int chunks;   // blocks that share the columns of a run

  __host__ __device__ int64_t runs(int64_t rows) const { return (rows + run - 1) / run; }
};

// GELU(z) = z * sigmoid(t), t = 2 sqrt(2 / pi) (z + 0.044715 z^3), which saturates beyond kSaturated: without a cubic
// that overflows. With e = e^-|t| the sigmoid is 1 / (1 + e) or e / (1 + e), its derivative e / (1 + e)^2. __expf and
// __fdividef, within a few ulp here, keep the kernel bound by memory.
struct Sigmoid {
  float value, slope;  // and its derivative by z

  __device__ explicit Sigmoid(float z) {
    constexpr float kLinear = 1.5957691216f, kCubic = 0.044715f, kSaturated = 12.0f;
    const float magnitude = fabsf(z), m = magnitude > kSaturated ? kSaturated : magnitude, square = m * m;
    const float e = __expf(m * (square * (-kLinear * kCubic) - kLinear));
    const float near = __fdividef(1.0f, 1.0f + e), far = e * near;
    value = z < 0.0f ? far : near;
    slope = near * far * (square * (3 * kLinear * kCubic) + kLinear);
  }
};

// A thread's columns of a tensor's rows, from the row on that the block has come to.
template <typename T>
struct Columns {
  T* row;
  int64_t stride;
  bool aligned;

  __device__ Columns(const Rows& rows, int64_t first, int64_t column)
      : row(static_cast<T*>(rows.data) + first * rows.stride + column), stride(rows.stride), aligned(rows.aligned) {}

  template <int kRows>
  __device__ void load(int count, Pack<T> (&packs)[kRows]) const {
    if (aligned) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) packs[r] = r < count ? Pack<T>::aligned(row + r * stride) : Pack<T>{};
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) packs[r] = r < count ? Pack<T>::unaligned(row + r * stride) : Pack<T>{};
    }
  }

  __device__ void store(int r, const float (&v)[kPack]) const { Pack<T>::round(v).store(row + r * stride); }
};

template <bool kBias, bool kActivation, bool kGradient, typename T>
__global__ void __maxnreg__(kRegisters) activation_kernel(const Activation a, const Grid grid) {
  constexpr bool kSums = kGradient && (kBias || kActivation);
  constexpr int kRows = kRowsAtOnce<T>;
  const int64_t run = blockIdx.x / grid.chunks, first = run * grid.run;
  const int64_t column = (blockIdx.x % grid.chunks * blockDim.x + threadIdx.x) * kPack;
  if (column >= a.d) return;
  const int rows = static_cast<int>(a.rows - first < grid.run ? a.rows - first : grid.run);
  Columns<T> x(a.x, first, column), dy(a.dy, first, column), y(a.y, first, column), dx(a.dx, first, column);
  float bias[kPack] = {}, sums[kPack] = {};
  if constexpr (kBias) load_floats(a.bias.dtype, a.bias.data, column, a.bias.aligned, bias);
#pragma unroll 1
  for (int n = 0; n < rows; n += kRows) {
    Pack<T> x_packs[kRows], dy_packs[kRows];
    x.load(rows - n, x_packs);
    if constexpr (kGradient) dy.load(rows - n, dy_packs);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (n + r >= rows) break;
      float z[kPack], grad[kPack], result[kPack];
      x_packs[r].widen(z);
      if constexpr (kGradient) dy_packs[r].widen(grad);
      for_each([&](int i) {
        if constexpr (kBias) z[i] += bias[i];
        const Sigmoid sigmoid(z[i]);
        if constexpr (kActivation) result[i] = z[i] * sigmoid.value;
        if constexpr (kGradient) grad[i] *= z[i] * sigmoid.slope + sigmoid.value;
        if constexpr (kSums) sums[i] += grad[i];
      });
      if constexpr (kActivation) y.store(r, result);
      if constexpr (kGradient) dx.store(r, grad);
    }
    x.row += kRows * x.stride, dy.row += kRows * dy.stride, y.row += kRows * y.stride, dx.row += kRows * dx.stride;
  }
  if constexpr (kSums) Pack<float>::round(sums).store(a.sums + run * a.d + column);
}

constexpr int kSumColumns = 4, kSumRows = 8;  // columns of a thread, and rows that it has under way
constexpr int kSumWarps = 8;                  // that share the runs of 128 columns

__global__ void __launch_bounds__(kSumWarps * kWarp) sum_kernel(
    const float* partial, float* total, int64_t runs, int64_t d) {
  __shared__ Shared<float, kSumWarps * kWarp * kSumColumns> scratch;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = (blockIdx.x * static_cast<int64_t>(kWarp) + lane) * kSumColumns;
  const int64_t share = (runs + kSumWarps - 1) / kSumWarps, last = share * (warp + 1) < runs ? share * (warp + 1) : runs;
  float4 sum = {};
  if (column < d) {
#pragma unroll 1
    for (int64_t r = share * warp; r < last; r += kSumRows) {
      float4 row[kSumRows] = {};
#pragma unroll
      for (int k = 0; k < kSumRows; ++k)
        if (r + k < last) row[k] = *reinterpret_cast<const float4*>(partial + (r + k) * d + column);
#pragma unroll
      for (int k = 0; k < kSumRows; ++k)
        sum = {sum.x + row[k].x, sum.y + row[k].y, sum.z + row[k].z, sum.w + row[k].w};
    }
  }
  const int own = threadIdx.x * kSumColumns;
  scratch[own] = sum.x, scratch[own + 1] = sum.y, scratch[own + 2] = sum.z, scratch[own + 3] = sum.w;
  __syncthreads();
  if (warp > 0 || column >= d) return;
#pragma unroll
  for (int w = 1; w < kSumWarps; ++w) {
    const int other = own + w * kWarp * kSumColumns;
    sum = {sum.x + scratch[other], sum.y + scratch[other + 1], sum.z + scratch[other + 2], sum.w + scratch[other + 3]};
  }
  __stwb(reinterpret_cast<float4*>(total + column), sum);
}

int chunks_of(int64_t d) { return static_cast<int>((d + kMaxThreads * kPack - 1) / (kMaxThreads * kPack)); }

// A row of sums costs 8 D bytes, written and read again, beside 4 D e for each row of the run; a GPU needs 1000 blocks.
Grid grid_with_sums(const Activation& a) {
  constexpr int64_t kShortest = 8, kLongest = 64, kBlocks = 1000;
  Grid grid{kLongest, chunks_of(a.d)};
  while (grid.run > kShortest && grid.runs(a.rows) * grid.chunks < kBlocks) grid.run /= 2;
  return grid;
}

struct Cuda {
  static Tensor empty_sums(const Tensor& x, const Activation& a) {
    return empty_beside(x, {grid_with_sums(a).runs(a.rows), a.d}, ScalarType::Float);
  }

  template <Parts parts>
  static void run(const Tensor& on, const Activation& a) {
    const Grid grid = parts.sums() ? grid_with_sums(a) : Grid{kForwardRun, chunks_of(a.d)};
    const int64_t packs = a.d / kPack, warps = ((packs + grid.chunks - 1) / grid.chunks + kWarp - 1) / kWarp;
    with_type(a.dtype, [&](auto element) {
      launch(on, activation_kernel<parts.bias, parts.activation, parts.gradient, decltype(element)>,
             grid.runs(a.rows) * grid.chunks, static_cast<int>(warps) * kWarp, a, grid);
    });
  }

  static Tensor sum_runs(const Tensor& partial) {
    const int64_t runs = partial.size(0), d = partial.size(1), columns = kWarp * kSumColumns;
    const Tensor total = empty_beside(partial, {d}, ScalarType::Float);
    launch(partial, sum_kernel, (d + columns - 1) / columns, kSumWarps * kWarp, partial.const_data_ptr<float>(),
           total.mutable_data_ptr<float>(), runs, d);
    return total;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) { ActivationOperators<Cuda>::define(m); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) { ActivationOperators<Cuda>::implement(m); }

}  // namespace vidkern::cuda

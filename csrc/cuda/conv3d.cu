// The padded input of a causal convolution on CUDA: norm and SiLU on the way, and the gradients, in one pass over rows.
//
// A block takes a stretch of one row of positions. A position's channels lie in neighbouring threads, eight in each; where
// they are summed, in the lanes of one warp, a few times eight in each. Several positions are under way at once.
#include "common/conv3d.h"
#include "common/device.h"
#include "common/launch.h"

namespace vidkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStretch = 64;    // positions of a row that a block takes, at least as many as it holds at once
constexpr int kMaxPacks = 4;    // of a lane whose warp sums over channels
constexpr int kMaxChannels = kWarp * kMaxPacks * kPack;
constexpr int kRunLength = 64;  // positions that a thread takes the moments of

template <typename T>
__device__ inline T* at(const Video& video, int64_t b, int64_t f, int64_t h, int64_t w) {
  return static_cast<T*>(video.data) + video.offset(b, f, h, w);
}

__device__ inline void load_channels(const ChannelVector& vector, int column, float absent, float (&v)[kPack]) {
  for_each([&](int i) { v[i] = absent; });
  if (vector.data == nullptr) return;
  load_floats(vector.dtype, vector.data, column, reinterpret_cast<uintptr_t>(vector.data) % 16 == 0, v);
}

struct Gate {  // of SiLU: sigmoid(z) and 1 - sigmoid(z), each to full precision
  float open, shut;
};

__device__ inline Gate sigmoid(float z) {
  const float e = expf(z > 0.0f ? -z : z), near = 1.0f / (1.0f + e), far = e * near;
  return {z > 0.0f ? near : far, z > 0.0f ? far : near};
}

// How a block's threads share positions: `lanes` (a power of two) hold one, pack p of lane l is channels
// (p * lanes + l) * 8 on; the block holds `slots` positions at once, an even number.
struct Share {
  int lanes, lane, slot, slots, c;

  __device__ Share(int lanes, int64_t c)
      : lanes(lanes), lane(threadIdx.x % lanes), slot(threadIdx.x / lanes), slots(kThreads / lanes),
        c(static_cast<int>(c)) {}

  __device__ int column(int pack) const { return (pack * lanes + lane) * kPack; }
  __device__ bool has(int pack) const { return column(pack) < c; }

  __device__ float sum(float v) const {  // over a position's lanes, of one warp
    for (int width = lanes / 2; width > 0; width /= 2) v += __shfl_xor_sync(0xffffffffu, v, width);
    return v;
  }
};

// What a norm multiplies and adds, for the channels of a thread: z = (x - mean) * rstd * weight + bias.
template <PadNorm norm, int kPacks>
struct NormChannels {
  float weight[kPacks][kPack], bias[kPacks][kPack], mean[kPacks][kPack], rstd[kPacks][kPack];

  template <typename Args>
  __device__ void load(const Args& a, const Share& share, int64_t b) {
    const int size = share.c / static_cast<int>(a.groups);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!share.has(p)) continue;
      load_channels(a.weight, share.column(p), 1.0f, weight[p]);
      load_channels(a.bias, share.column(p), 0.0f, bias[p]);
      if constexpr (norm == PadNorm::group) {
        for_each([&](int i) {
          const int64_t group = b * a.groups + (share.column(p) + i) / size;
          mean[p][i] = a.mean[group];
          rstd[p][i] = a.rstd[group];
        });
      }
    }
  }

  __device__ float normed(float x, float rms_rstd, int p, int i) const {
    if constexpr (norm == PadNorm::group) return (x - mean[p][i]) * rstd[p][i];
    return x * rms_rstd;
  }
};

struct Block {  // positions first <= w < last of a row
  int64_t b, t, h, first, last;

  __device__ Block(int64_t frames, int64_t height, int64_t width, int stretch) {
    const int64_t per_row = (width + stretch - 1) / stretch, row = blockIdx.x / per_row;
    first = blockIdx.x % per_row * stretch;
    last = first + stretch < width ? first + stretch : width;
    h = row % height, t = row / height % frames, b = row / height / frames;
  }
};

// --- forward ---

template <PadNorm norm, typename T, int kPacks>
__global__ void __launch_bounds__(kThreads) pad_kernel(const PadForward a, int lanes, int stretch) {
  const Padding& p = a.padding;
  const Share share(lanes, p.c);
  const Block block(p.t.padded(), p.h.padded(), p.w.padded(), stretch);
  const int64_t t = p.t.source(block.t), h = p.h.source(block.h);
  const bool cached = t < p.cached, row_inside = t >= 0 && h >= 0;
  const Video& video = cached ? a.cache : a.x;
  const int64_t frame = cached ? t : t - p.cached;
  const bool plain = norm == PadNorm::none || cached || !row_inside;
  NormChannels<norm, kPacks> channels;
  if constexpr (norm != PadNorm::none) {
    if (!plain) channels.load(a, share, block.b);
  }
  const auto source_of = [&](int64_t w) { return row_inside && w < block.last ? p.w.source(w) : -1; };
  const auto load_position = [&](int64_t w, Pack<T>(&packs)[kPacks]) {
    const int64_t source = source_of(w);
    const T* x = source >= 0 ? at<T>(video, block.b, frame, h, source) : nullptr;
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      packs[i] = source >= 0 && share.has(i) ? load_at(x + share.column(i), video.aligned) : Pack<T>{};
  };
  Pack<T> packs[kPacks], next[kPacks];
  load_position(block.first + share.slot, next);
#pragma unroll 1
  for (int64_t first = block.first; first < block.last; first += share.slots) {  // whole warps: sums need every lane
    const int64_t w = first + share.slot, source = source_of(w);
    const bool inside = source >= 0;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = next[i];
    load_position(w + share.slots, next);  // under way during this position's arithmetic
    if constexpr (norm != PadNorm::none) {
      if (!plain) {
        float v[kPacks][kPack], squares = 0.0f, rstd = 0.0f;
        widen(packs, v);
        if constexpr (norm == PadNorm::rms) {
          for_each_element<kPacks>([&](int k, int i) { squares += v[k][i] * v[k][i]; });
          rstd = rsqrtf(share.sum(squares) / static_cast<float>(share.c) + a.eps);
          const bool own = block.t == p.t.before + t && block.h == p.h.before + h && w == p.w.before + source;
          if (inside && own && share.lane == 0)
            a.rstd[((block.b * p.frames() + frame) * p.h.size + h) * p.w.size + source] = rstd;
        }
        for_each_element<kPacks>([&](int k, int i) {
          if (!inside || !share.has(k)) return;
          const float z = channels.normed(v[k][i], rstd, k, i) * channels.weight[k][i] + channels.bias[k][i];
          v[k][i] = z * sigmoid(z).open;
        });
#pragma unroll
        for (int k = 0; k < kPacks; ++k)
          if (inside) packs[k] = Pack<T>::round(v[k]);
      }
    }
    if (w >= block.last) continue;
    T* out = at<T>(a.padded, block.b, block.t, block.h, w);
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      if (share.has(i)) packs[i].store(out + share.column(i));
  }
}

// --- the statistics of groups ---

struct Moments {
  float mean, squares, count;  // squares of the differences from the mean

  __device__ void join(Moments other) {
    const float total = count + other.count;
    if (other.count == 0.0f) return;
    const float away = other.mean - mean, share = other.count / total;
    mean += away * share;
    squares += other.squares + away * away * count * share;
    count = total;
  }
};

struct MomentArgs {
  PadForward forward;
  float* parts;  // (B, runs, 2, C): mean and squares
  int64_t runs;  // of a sample
};

// A thread takes eight channels of a run of positions of a sample, four at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads) moments_kernel(const MomentArgs a) {
  constexpr int kTile = 4;
  const Padding& p = a.forward.padding;
  const int64_t packs = p.c / kPack, index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t column = index % packs * kPack, run = index / packs % a.runs, b = index / packs / a.runs;
  if (b >= p.b) return;
  const int64_t positions = p.frames() * p.h.size * p.w.size, first = run * kRunLength;
  const int64_t last = first + kRunLength < positions ? first + kRunLength : positions;
  int64_t w = first % p.w.size, h = first / p.w.size % p.h.size, f = first / p.w.size / p.h.size;
  float mean[kPack] = {}, squares[kPack] = {};
#pragma unroll 1
  for (int64_t n = first; n < last; n += kTile) {
    Pack<T> tile[kTile];
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      if (n + k < last) tile[k] = load_at(at<T>(a.forward.x, b, f, h, w) + column, a.forward.x.aligned);
      if (++w == p.w.size) w = 0, ++h;
      if (h == p.h.size) h = 0, ++f;
    }
    const int64_t left = last - n;
    const float count = static_cast<float>(left < kTile ? left : kTile), before = static_cast<float>(n - first);
    const float share = count / (before + count);
    float v[kTile][kPack];
#pragma unroll
    for (int k = 0; k < kTile; ++k) tile[k].widen(v[k]);
    for_each([&](int i) {
      float total = 0.0f, rest = 0.0f;
#pragma unroll
      for (int k = 0; k < kTile; ++k) total += k < left ? v[k][i] : 0.0f;
      const float tile_mean = total / count, away = tile_mean - mean[i];
#pragma unroll
      for (int k = 0; k < kTile; ++k) rest += k < left ? (v[k][i] - tile_mean) * (v[k][i] - tile_mean) : 0.0f;
      mean[i] += away * share;
      squares[i] += rest + away * away * before * share;
    });
  }
  float* out = a.parts + (b * a.runs + run) * 2 * p.c + column;
  Pack<float>::round(mean).store(out);
  Pack<float>::round(squares).store(out + p.c);
}

// A block joins the moments of one group: threads first, each its share in order, then pairs of lanes and warps.
__global__ void __launch_bounds__(kThreads) join_moments_kernel(const MomentArgs a) {
  __shared__ Shared<float, 3 * kThreads / kWarp> scratch;
  const Padding& p = a.forward.padding;
  const int64_t groups = a.forward.groups, size = p.c / groups, b = blockIdx.x / groups, g = blockIdx.x % groups;
  const int64_t positions = p.frames() * p.h.size * p.w.size;
  Moments all{};
  for (int64_t i = threadIdx.x; i < a.runs * size; i += kThreads) {
    const int64_t run = i / size, left = positions - run * kRunLength;
    const float* part = a.parts + (b * a.runs + run) * 2 * p.c + g * size + i % size;
    all.join({part[0], part[p.c], static_cast<float>(left < kRunLength ? left : kRunLength)});
  }
#pragma unroll
  for (int width = 1; width < kWarp; width *= 2) {
    const Moments other{__shfl_xor_sync(0xffffffffu, all.mean, width), __shfl_xor_sync(0xffffffffu, all.squares, width),
                        __shfl_xor_sync(0xffffffffu, all.count, width)};
    const bool upper = threadIdx.x & width;  // one order for both lanes
    const auto pick = [&](float low, float high) { return upper ? high : low; };
    const Moments second{pick(other.mean, all.mean), pick(other.squares, all.squares), pick(other.count, all.count)};
    all = {pick(all.mean, other.mean), pick(all.squares, other.squares), pick(all.count, other.count)};
    all.join(second);
  }
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    scratch[3 * warp] = all.mean;
    scratch[3 * warp + 1] = all.squares;
    scratch[3 * warp + 2] = all.count;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / kWarp; ++i) all.join({scratch[3 * i], scratch[3 * i + 1], scratch[3 * i + 2]});
  a.forward.mean[blockIdx.x] = all.mean;
  a.forward.rstd[blockIdx.x] = rsqrtf(all.squares / all.count + a.forward.eps);
}

// --- backward ---

struct BackwardArgs {
  PadBackward backward;
  float *bias_parts, *weight_parts;  // (blocks, C): a block's sums of dz, and of dz * normed
  const float* offsets;              // (B, G, 2): the means over a group of dn and of dn * normed
  int lanes, stretch;
};

enum class Pass { all, sums, dx };  // rms and none take one pass over the rows, a group two

// The sum of the gradients of a position's copies, in float32.
template <typename T, int kPacks>
__device__ inline void fold(const PadBackward& a, const Share& share, const Block& block, int64_t w,
                            float (&grad)[kPacks][kPack]) {
  for_each_element<kPacks>([&](int k, int i) { grad[k][i] = 0.0f; });
  const Padding& p = a.padding;
  const int64_t of_t = p.t.copies(block.t), of_h = p.h.copies(block.h), of_w = p.w.copies(w);
#pragma unroll 1
  for (int64_t copy = 0; copy < of_t * of_h * of_w; ++copy) {
    const int64_t t = p.t.copy(block.t, copy / of_w / of_h), h = p.h.copy(block.h, copy / of_w % of_h);
    const T* from = at<T>(a.dpadded, block.b, t, h, p.w.copy(w, copy % of_w));
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!share.has(k)) continue;
      float v[kPack];
      load_at(from + share.column(k), a.dpadded.aligned).widen(v);
      for_each([&](int i) { grad[k][i] += v[i]; });
    }
  }
}

// Writes the block's sums over its positions: two slots at a time.
template <int kPacks>
__device__ inline void store_sums(const Share& share, const float (&sums)[kPacks][kPack], float* out,
                                  Shared<float, kThreads * kPack>& scratch) {
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    __syncthreads();
    for_each([&](int i) { scratch[threadIdx.x * kPack + i] = sums[k][i]; });
    __syncthreads();
    if (share.slot != 0 || !share.has(k)) continue;
    float total[kPack] = {};
#pragma unroll 1
    for (int slot = 0; slot < share.slots; slot += 2)
      for_each([&](int i) {
        const auto of = [&](int k) -> float { return scratch[((slot + k) * share.lanes + share.lane) * kPack + i]; };
        total[i] += of(0) + of(1);
      });
    Pack<float>::round(total).store(out + share.column(k));
  }
}

template <PadNorm norm, Pass pass, typename T, int kPacks>
__global__ void __launch_bounds__(kThreads) pad_backward_kernel(const BackwardArgs args) {
  __shared__ Shared<float, kThreads * kPack> scratch;
  const PadBackward& a = args.backward;
  const Padding& p = a.padding;
  const Share share(args.lanes, p.c);
  const Block block(p.t.size, p.h.size, p.w.size, args.stretch);
  const bool cached = block.t < p.cached, plain = norm == PadNorm::none || cached;
  const int64_t frame = cached ? block.t : block.t - p.cached;
  const Video& grads = cached ? a.dcache : a.dx;
  NormChannels<norm, kPacks> channels;
  float dbias[kPacks][kPack] = {}, dweight[kPacks][kPack] = {};
  if constexpr (norm != PadNorm::none) {
    if (!plain) channels.load(a, share, block.b);
  }
#pragma unroll 1
  for (int64_t first = block.first; first < block.last; first += share.slots) {
    const int64_t w = first + share.slot;
    const bool inside = w < block.last;
    float grad[kPacks][kPack] = {};
    if (inside) fold<T>(a, share, block, w, grad);
    if constexpr (norm != PadNorm::none) {
      if (!plain) {
        float v[kPacks][kPack], along = 0.0f, rstd = 0.0f;
        Pack<T> packs[kPacks];
        const T* x = inside ? at<T>(a.x, block.b, frame, block.h, w) : nullptr;
#pragma unroll
        for (int k = 0; k < kPacks; ++k)
          packs[k] = inside && share.has(k) ? load_at(x + share.column(k), a.x.aligned) : Pack<T>{};
        widen(packs, v);
        if (norm == PadNorm::rms && inside)
          rstd = a.rstd[((block.b * p.frames() + frame) * p.h.size + block.h) * p.w.size + w];
        for_each_element<kPacks>([&](int k, int i) {
          if (!inside || !share.has(k)) return;
          const float n = v[k][i] = channels.normed(v[k][i], rstd, k, i);
          const float z = n * channels.weight[k][i] + channels.bias[k][i];
          const Gate gate = sigmoid(z);
          const float dz = grad[k][i] * (gate.open * (1.0f + z * gate.shut));
          if constexpr (pass != Pass::dx) {
            dbias[k][i] += dz;
            dweight[k][i] += dz * n;
          }
          grad[k][i] = dz * channels.weight[k][i];
          along += grad[k][i] * n;
        });
        if constexpr (norm == PadNorm::rms) {
          const float slope = share.sum(along) / static_cast<float>(share.c);
          for_each_element<kPacks>([&](int k, int i) { grad[k][i] = (grad[k][i] - v[k][i] * slope) * rstd; });
        } else if constexpr (pass == Pass::dx) {
          const int size = share.c / static_cast<int>(a.groups);
          for_each_element<kPacks>([&](int k, int i) {
            if (!share.has(k)) return;
            const float* of_group = args.offsets + 2 * (block.b * a.groups + (share.column(k) + i) / size);
            grad[k][i] = (grad[k][i] - of_group[0] - v[k][i] * of_group[1]) * channels.rstd[k][i];
          });
        }
      }
    }
    if (pass == Pass::sums || !inside) continue;
    T* out = at<T>(grads, block.b, frame, block.h, w);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (share.has(k)) Pack<T>::round(grad[k]).store(out + share.column(k));
  }
  if constexpr (norm != PadNorm::none && pass != Pass::dx) {
    if (plain) return;  // a whole block
    const int64_t per_row = (p.w.size + args.stretch - 1) / args.stretch;
    const int64_t row = (block.b * p.frames() + frame) * p.h.size + block.h;
    const int64_t part = (row * per_row + block.first / args.stretch) * p.c;
    store_sums(share, dbias, args.bias_parts + part, scratch);
    store_sums(share, dweight, args.weight_parts + part, scratch);
  }
}

constexpr int kColumns = 32, kSumRows = 8;  // of a block that adds up rows

struct SumArgs {  // both of (samples, rows, C) -> (samples, C)
  const float *bias_parts, *weight_parts;
  float *bias, *weight;
  int64_t rows, c;
};

__global__ void __launch_bounds__(kColumns* kSumRows) sum_rows_kernel(const SumArgs a) {
  __shared__ Shared<float, kColumns * kSumRows> scratch;
  const int64_t block = blockIdx.x / 2, blocks = (a.c + kColumns - 1) / kColumns, sample = block / blocks;
  const int64_t column = block % blocks * kColumns + threadIdx.x % kColumns;
  const bool of_bias = blockIdx.x % 2 == 0;
  const int slot = threadIdx.x / kColumns;
  float total = 0.0f;
  if (column < a.c) {
    const float* rows = (of_bias ? a.bias_parts : a.weight_parts) + sample * a.rows * a.c + column;
#pragma unroll 4
    for (int64_t row = slot; row < a.rows; row += kSumRows) total += rows[row * a.c];
  }
  scratch[threadIdx.x] = total;
  __syncthreads();
  if (slot != 0 || column >= a.c) return;
  for (int i = 1; i < kSumRows; ++i) total += scratch[i * kColumns + threadIdx.x];
  (of_bias ? a.bias : a.weight)[sample * a.c + column] = total;
}

struct GroupArgs {
  PadBackward backward;
  const float *bias_sums, *weight_sums;  // (B, C)
  float* offsets;                        // (B, G, 2)
};

// A thread makes the offset and the slope of a group.
__global__ void __launch_bounds__(kThreads) group_offsets_kernel(const GroupArgs a) {
  const Padding& p = a.backward.padding;
  const int64_t groups = a.backward.groups, size = p.c / groups;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, b = index / groups;
  if (b >= p.b) return;
  float grad = 0.0f, along = 0.0f;
  for (int64_t c = index % groups * size; c < (index % groups + 1) * size; ++c) {
    float weight[kPack];
    load_channels(a.backward.weight, static_cast<int>(c / kPack * kPack), 1.0f, weight);
    float of_channel = weight[0];
    for_each([&](int i) { of_channel = c % kPack == i ? weight[i] : of_channel; });
    grad += a.bias_sums[b * p.c + c] * of_channel;
    along += a.weight_sums[b * p.c + c] * of_channel;
  }
  const float count = static_cast<float>(p.frames() * p.h.size * p.w.size) * static_cast<float>(size);
  a.offsets[2 * index] = grad / count;
  a.offsets[2 * index + 1] = along / count;
}

// --- launches ---

struct Lanes {
  int lanes, packs;  // of a position, and of a lane
};

template <PadNorm norm>
Lanes lanes_of(int64_t c) {
  STD_TORCH_CHECK(c % kPack == 0 && c <= kMaxChannels, "C must be a multiple of ", kPack, " up to ", kMaxChannels,
                  ", got ", c);
  constexpr int kMostLanes = norm == PadNorm::rms ? kWarp : kMaxChannels / kPack;
  int lanes = 1, packs = 1;
  while (lanes * kPack < c && lanes < kMostLanes) lanes *= 2;
  while (lanes * packs * kPack < c) packs *= 2;
  return {lanes, packs};
}

// Calls f(integral_constant) with the packs of a lane.
template <PadNorm norm, typename F>
void with_packs(int packs, F f) {
  if constexpr (norm != PadNorm::rms) {
    f(std::integral_constant<int, 1>{});
  } else {
    switch (packs) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      default: return f(std::integral_constant<int, kMaxPacks>{});
    }
  }
}

int64_t stretches(int64_t width) { return (width + kStretch - 1) / kStretch; }

struct Cuda {
  static void group_statistics(const Tensor& x, const PadForward& a) {
    const Padding& p = a.padding;
    const int64_t runs = (p.frames() * p.h.size * p.w.size + kRunLength - 1) / kRunLength;
    const Tensor parts = empty_beside(x, {p.b, runs, 2, p.c}, ScalarType::Float);
    const MomentArgs args{a, parts.mutable_data_ptr<float>(), runs};
    const int64_t threads = p.b * runs * (p.c / kPack);
    with_type(a.dtype, [&](auto element) {
      launch(x, moments_kernel<decltype(element)>, (threads + kThreads - 1) / kThreads, kThreads, args);
    });
    launch(x, join_moments_kernel, p.b * a.groups, kThreads, args);
  }

  template <PadNorm norm>
  static void pad(const Tensor& x, const PadForward& a) {
    const auto [lanes, packs] = lanes_of<norm>(a.padding.c);
    if constexpr (norm == PadNorm::group) group_statistics(x, a);
    const int64_t blocks = a.padding.padded_rows() * stretches(a.padding.w.padded());
    with_type(a.dtype, [&, lanes = lanes](auto element) {
      with_packs<norm>(packs, [&](auto count) {
        launch(x, pad_kernel<norm, decltype(element), count.value>, blocks, kThreads, a, lanes, kStretch);
      });
    });
  }

  template <PadNorm norm, Pass pass>
  static void backward_rows(const Tensor& on, BackwardArgs args) {
    const Padding& p = args.backward.padding;
    const auto [lanes, packs] = lanes_of<norm>(p.c);
    args.lanes = lanes, args.stretch = kStretch;
    with_type(args.backward.dtype, [&](auto element) {
      with_packs<norm>(packs, [&](auto count) {
        launch(on, pad_backward_kernel<norm, pass, decltype(element), count.value>, p.rows() * stretches(p.w.size),
               kThreads, args);
      });
    });
  }

  static void sum_rows(const Tensor& on, int64_t samples, const SumArgs& args) {
    launch(on, sum_rows_kernel, 2 * samples * ((args.c + kColumns - 1) / kColumns), kColumns * kSumRows, args);
  }

  template <PadNorm norm>
  static void pad_backward(const Tensor& on, const PadBackward& a) {
    const Padding& p = a.padding;
    BackwardArgs args{a, nullptr, nullptr, nullptr, 0, 0};
    if constexpr (norm == PadNorm::none) {
      backward_rows<norm, Pass::all>(on, args);
    } else {
      const int64_t rows = p.frames() * p.h.size * stretches(p.w.size);  // partial sums of a sample
      const Tensor bias_parts = floats(on, {p.b, rows, p.c}), weight_parts = floats(on, {p.b, rows, p.c});
      args.bias_parts = bias_parts.mutable_data_ptr<float>();
      args.weight_parts = weight_parts.mutable_data_ptr<float>();
      if constexpr (norm == PadNorm::rms) {
        backward_rows<norm, Pass::all>(on, args);
        sum_rows(on, 1, {args.bias_parts, args.weight_parts, a.dbias, a.dweight, p.b * rows, p.c});
      } else {
        group_backward(on, args, rows);
      }
    }
  }

  static void group_backward(const Tensor& on, BackwardArgs args, int64_t rows) {
    const PadBackward& a = args.backward;
    const Padding& p = a.padding;
    backward_rows<PadNorm::group, Pass::sums>(on, args);
    const Tensor bias_sums = floats(on, {p.b, p.c}), weight_sums = floats(on, {p.b, p.c});
    const Tensor offsets = floats(on, {p.b, a.groups, 2});
    float *const bias = bias_sums.mutable_data_ptr<float>(), *const weight = weight_sums.mutable_data_ptr<float>();
    sum_rows(on, p.b, {args.bias_parts, args.weight_parts, bias, weight, rows, p.c});
    sum_rows(on, 1, {bias, weight, a.dbias, a.dweight, p.b, p.c});
    const GroupArgs of_groups{a, bias, weight, offsets.mutable_data_ptr<float>()};
    launch(on, group_offsets_kernel, (p.b * a.groups + kThreads - 1) / kThreads, kThreads, of_groups);
    args.offsets = of_groups.offsets;
    backward_rows<PadNorm::group, Pass::dx>(on, args);
  }

  static Tensor floats(const Tensor& on, std::initializer_list<int64_t> size) {
    return empty_beside(on, size, ScalarType::Float);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) { PadOperators<Cuda>::define(m); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) { PadOperators<Cuda>::implement(m); }

}  // namespace vidkern::cuda

// The padded input of a causal convolution on the CPU: a thread takes rows of positions; norm and SiLU on the way.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/conv3d.h"
#include "cpu/vec.h"

#pragma GCC optimize("fp-contract=fast")  // a * b + c in one instruction where there is one
#include "cpu/exp.h"

namespace vidkern::cpu {
namespace {

constexpr int64_t kTile = 8;                   // positions whose moments are taken at a time
constexpr int64_t kRunLength = 16;             // positions: as many are added one after another in a vector's gradient
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

// --- rows of channels, of any number ---

using cpu::load, cpu::store;

struct Whole {};
struct Part {
  int64_t count;
};

template <typename T>
VIDKERN_INLINE Vec load(const T* p, Whole) {
  return load(p);
}

template <typename T>
VIDKERN_INLINE Vec load(const T* p, Part part) {  // zeros beyond
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, part.count * sizeof(T));
  return load(lanes);
}

template <typename T>
VIDKERN_INLINE void store(T* p, Vec v, Whole) {
  store(p, v);
}

template <typename T>
VIDKERN_INLINE void store(T* p, Vec v, Part part) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, part.count * sizeof(T));
}

// Calls f(i, lanes) for i = 0, 8, 16, ... < c; the last lanes may be a part.
template <typename F>
VIDKERN_INLINE void for_each_lanes(int64_t c, F f) {
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) f(i, Whole{});
  if (i < c) f(i, Part{c - i});
}

constexpr int64_t whole_vecs(int64_t c) { return (c + kLanes - 1) / kLanes * kLanes; }

struct Gate {  // of SiLU: sigmoid(z) and 1 - sigmoid(z), each to full precision
  Vec open, shut;
};

VIDKERN_INLINE Gate sigmoid(Vec z) {
  const Vec e = exp_of_negative(z > 0.0f ? -z : z), near = 1.0f / (1.0f + e), far = e * near;
  return {z > 0.0f ? near : far, z > 0.0f ? far : near};
}

// The (C,) vector in float32, zeros beyond C up to a whole vector; `absent` where there is none.
VIDKERN_CLONES void load_vector(const ChannelVector& v, float absent, float* out, int64_t c) {
  if (v.data == nullptr) return void(std::fill_n(out, whole_vecs(c), absent));
  with_type(v.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    const auto* values = static_cast<const decltype(element)*>(v.data);
    for_each_lanes(c, [&](int64_t i, auto lanes) VIDKERN_INLINE_LAMBDA { store(out + i, load(values + i, lanes)); });
  });
}

// --- rows of positions ---

template <typename F>
void for_each_row(int64_t rows, int64_t elements, F f) {  // f(begin, end)
  torch::stable::parallel_for(0, rows, kElementsPerThread / std::max<int64_t>(elements, 1) + 1, f);
}

struct Row {  // frame t of the cache and x, or of what is padded
  int64_t b, t, h;

  Row(int64_t index, int64_t frames, int64_t height)
      : b(index / height / frames), t(index / height % frames), h(index % height) {}
};

template <typename T>
VIDKERN_INLINE T* at(const Video& video, int64_t b, int64_t f, int64_t h, int64_t w) {
  return static_cast<T*>(video.data) + video.offset(b, f, h, w);
}

// What a norm multiplies and adds: z = (x - mean) * rstd * weight + bias. The mean and rstd of a group are rows, too.
struct NormRows {
  float *weight, *bias, *mean, *rstd;
};

template <PadNorm norm>
VIDKERN_INLINE Vec normed(Vec x, const NormRows& rows, float rstd, int64_t i) {
  if constexpr (norm == PadNorm::group) return (x - load(rows.mean + i)) * load(rows.rstd + i);
  return x * rstd;
}

// A sample's statistics, one value per channel.
inline void spread(const float* groups, int64_t count, float* row, int64_t c) {
  for (int64_t g = 0; g < count; ++g) std::fill_n(row + g * (c / count), c / count, groups[g]);
  std::fill_n(row + c, whole_vecs(c) - c, 0.0f);
}

template <PadNorm norm, typename Args>
VIDKERN_INLINE void load_statistics(const Args& a, int64_t b, const NormRows& rows) {
  if constexpr (norm == PadNorm::group) {
    spread(a.mean + b * a.groups, a.groups, rows.mean, a.padding.c);
    spread(a.rstd + b * a.groups, a.groups, rows.rstd, a.padding.c);
  }
}

template <typename Args>
void load_vectors(const Args& a, const NormRows& rows) {
  load_vector(a.weight, 1.0f, rows.weight, a.padding.c);
  load_vector(a.bias, 0.0f, rows.bias, a.padding.c);
}

// --- forward ---

template <typename T>
VIDKERN_INLINE float rms_rstd(const T* x, int64_t c, float eps) {
  Sum squares;
  for_each_lanes(c, [&](int64_t i, auto lanes) VIDKERN_INLINE_LAMBDA {
    const Vec v = load(x + i, lanes);
    squares.chain[i / kLanes % 4] += v * v;
  });
  return 1.0f / std::sqrt(squares.total() / float(c) + eps);
}

template <PadNorm norm, typename T>
VIDKERN_INLINE void activate(const T* x, const NormRows& rows, float rstd, T* out, int64_t c) {
  for_each_lanes(c, [&](int64_t i, auto lanes) VIDKERN_INLINE_LAMBDA {
    const Vec z = normed<norm>(load(x + i, lanes), rows, rstd, i) * load(rows.weight + i) + load(rows.bias + i);
    store(out + i, z * sigmoid(z).open, lanes);
  });
}

template <typename T>
void copy_positions(const T* from, int64_t stride, T* to, int64_t count, int64_t c) {
  if (stride == c) return void(std::memcpy(to, from, count * c * sizeof(T)));
  for (int64_t w = 0; w < count; ++w) std::memcpy(to + w * c, from + w * stride, c * sizeof(T));
}

// The ends of a row that lie outside the video.
template <typename T>
void pad_ends(const Axis& axis, T* row, int64_t c) {
  const auto fill = [&](int64_t i) {
    const int64_t source = axis.source(i);
    if (source < 0) std::memset(row + i * c, 0, c * sizeof(T));
    else std::memcpy(row + i * c, row + (axis.before + source) * c, c * sizeof(T));
  };
  for (int64_t i = 0; i < axis.before; ++i) fill(i);
  for (int64_t i = axis.before + axis.size; i < axis.padded(); ++i) fill(i);
}

template <PadNorm norm, typename T>
VIDKERN_INLINE void pad_rows(const PadForward& a, int64_t begin, int64_t end) {
  const Padding& p = a.padding;
  const Scratch scratch(4, whole_vecs(p.c));
  const NormRows rows{scratch.row(0), scratch.row(1), scratch.row(2), scratch.row(3)};
  if constexpr (norm != PadNorm::none) load_vectors(a, rows);
  for (int64_t index = begin; index < end; ++index) {
    const Row row(index, p.t.size, p.h.size);
    T* const out = at<T>(a.padded, row.b, p.t.before + row.t, p.h.before + row.h, 0);
    T* const inside = out + p.w.before * p.c;
    const bool cached = row.t < p.cached;
    const Video& video = cached ? a.cache : a.x;
    const T* const in = at<T>(video, row.b, cached ? row.t : row.t - p.cached, row.h, 0);
    if (norm == PadNorm::none || cached) {
      copy_positions(in, video.stride_w, inside, p.w.size, p.c);
    } else {
      if (index == begin || row.h == 0) load_statistics<norm>(a, row.b, rows);
      const int64_t position = ((row.b * p.frames() + row.t - p.cached) * p.h.size + row.h) * p.w.size;
      for (int64_t w = 0; w < p.w.size; ++w) {
        const T* x = in + w * video.stride_w;
        float rstd = 0.0f;
        if constexpr (norm == PadNorm::rms) a.rstd[position + w] = rstd = rms_rstd(x, p.c, a.eps);
        activate<norm>(x, rows, rstd, inside + w * p.c, p.c);
      }
    }
    pad_ends(p.w, out, p.c);
  }
}

template <PadNorm norm>
VIDKERN_CLONES void pad_range(const PadForward& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA { pad_rows<norm, decltype(element)>(a, begin, end); });
}

// Rows of padding: zeros, or copies of rows that are written.
void pad_outside(const PadForward& a, int64_t bytes_per_element) {
  const Padding& p = a.padding;
  const int64_t elements = p.w.padded() * p.c;
  auto* const data = static_cast<char*>(a.padded.data);
  const auto row_at = [&](int64_t b, int64_t t, int64_t h) {
    return data + a.padded.offset(b, t, h, 0) * bytes_per_element;
  };
  for_each_row(p.padded_rows(), elements, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Row row(index, p.t.padded(), p.h.padded());
      if (p.t.inside(row.t) && p.h.inside(row.h)) continue;
      const int64_t t = p.t.source(row.t), h = p.h.source(row.h);
      char* const out = row_at(row.b, row.t, row.h);
      if (t < 0 || h < 0) std::memset(out, 0, elements * bytes_per_element);
      else std::memcpy(out, row_at(row.b, p.t.before + t, p.h.before + h), elements * bytes_per_element);
    }
  });
}

// --- the statistics of groups ---

struct Moments {
  double mean, squares;  // of the differences from the mean
};

// Joins the moments of parts of one size.
template <typename F>
Moments join(int64_t parts, double size, F part) {
  Moments all{};
  for (int64_t i = 0; i < parts; ++i) all.mean += part(i).mean / double(parts);
  for (int64_t i = 0; i < parts; ++i) {
    const double away = part(i).mean - all.mean;
    all.squares += part(i).squares + size * away * away;
  }
  return all;
}

// Each channel's moments over a row, a tile of positions at a time.
template <typename T>
VIDKERN_INLINE void channel_moments(const T* x, int64_t stride, int64_t width, int64_t c, float* mean, float* squares) {
  std::fill_n(mean, whole_vecs(c), 0.0f);
  std::fill_n(squares, whole_vecs(c), 0.0f);
  for (int64_t first = 0; first < width; first += kTile) {
    const int64_t count = std::min(kTile, width - first);
    const float share = float(count) / float(first + count), weight = float(first) * share;
    for_each_lanes(c, [&](int64_t i, auto lanes) VIDKERN_INLINE_LAMBDA {
      Vec values[kTile], total = {}, rest = {};
      for (int64_t k = 0; k < count; ++k) total += values[k] = load(x + (first + k) * stride + i, lanes);
      const Vec tile_mean = total / float(count), away = tile_mean - load(mean + i);
      for (int64_t k = 0; k < count; ++k) rest += (values[k] - tile_mean) * (values[k] - tile_mean);
      store(mean + i, load(mean + i) + away * share);
      store(squares + i, load(squares + i) + rest + away * away * weight);
    });
  }
}

template <typename T>
VIDKERN_INLINE void moments_rows(const PadForward& a, Moments* parts, int64_t begin, int64_t end) {
  const Padding& p = a.padding;
  const int64_t size = p.c / a.groups;
  const Scratch scratch(2, whole_vecs(p.c));
  float *mean = scratch.row(0), *squares = scratch.row(1);
  for (int64_t index = begin; index < end; ++index) {
    const Row row(index, p.frames(), p.h.size);
    channel_moments(at<T>(a.x, row.b, row.t, row.h, 0), a.x.stride_w, p.w.size, p.c, mean, squares);
    for (int64_t g = 0; g < a.groups; ++g)
      parts[index * a.groups + g] = join(size, double(p.w.size), [&](int64_t i) {
        return Moments{mean[g * size + i], squares[g * size + i]};
      });
  }
}

VIDKERN_CLONES void moments_range(const PadForward& a, Moments* parts, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA { moments_rows<decltype(element)>(a, parts, begin, end); });
}

void group_statistics(const PadForward& a) {
  const Padding& p = a.padding;
  const int64_t rows = p.frames() * p.h.size;  // of a sample
  std::vector<Moments> parts(p.b * rows * a.groups);
  for_each_row(p.b * rows, p.w.size * p.c,
               [&](int64_t begin, int64_t end) { moments_range(a, parts.data(), begin, end); });
  const double row_size = double(p.w.size) * double(p.c / a.groups);
  for (int64_t i = 0; i < p.b * a.groups; ++i) {
    const Moments all = join(rows, row_size, [&](int64_t row) {
      return parts[(i / a.groups * rows + row) * a.groups + i % a.groups];
    });
    a.mean[i] = float(all.mean);
    a.rstd[i] = float(1.0 / std::sqrt(all.squares / (row_size * double(rows)) + a.eps));
  }
}

// --- backward ---

// Sums over positions of dz and dz * normed: what the bias and the weight get.
struct VectorSums {
  float *bias, *weight;  // of at most kRunLength positions
  double* totals;        // (2, C): bias, weight
  int64_t c, count = 0;

  void flush() {
    for (int64_t i = 0; i < c; ++i) totals[i] += bias[i], totals[c + i] += weight[i];
    std::fill_n(bias, c, 0.0f);
    std::fill_n(weight, c, 0.0f);
    count = 0;
  }

  void next() {
    if (++count == kRunLength) flush();
  }
};

// The gradient of z, before SiLU.
template <PadNorm norm>
VIDKERN_INLINE Vec grad_of_z(Vec grad, Vec n, const NormRows& rows, int64_t i) {
  const Vec z = n * load(rows.weight + i) + load(rows.bias + i);
  const Gate gate = sigmoid(z);
  return grad * (gate.open * (1.0f + z * gate.shut));
}

// Adds a position to the sums and returns the sum of dn * normed over its channels; dn stays in a row for rms.
template <PadNorm norm, typename G, typename T>
VIDKERN_INLINE float sum_position(
    const G* grad, const T* x, float rstd, const NormRows& rows, const VectorSums& sums, float* dn_row, int64_t c) {
  Sum along;
  for_each_lanes(c, [&](int64_t i, auto lanes) VIDKERN_INLINE_LAMBDA {
    const Vec n = normed<norm>(load(x + i, lanes), rows, rstd, i);
    const Vec dz = grad_of_z<norm>(load(grad + i, lanes), n, rows, i), dn = dz * load(rows.weight + i);
    store(sums.bias + i, load(sums.bias + i) + dz);
    store(sums.weight + i, load(sums.weight + i) + dz * n);
    if constexpr (norm == PadNorm::rms) {
      store(dn_row + i, dn);
      along.chain[i / kLanes % 4] += dn * n;
    }
  });
  return along.total();
}

template <typename T>
VIDKERN_INLINE void rms_position(const float* dn, const T* x, float rstd, float slope, T* dx, int64_t c) {
  for_each_lanes(c, [&](int64_t i, auto lanes) VIDKERN_INLINE_LAMBDA {
    store(dx + i, (load(dn + i) - load(x + i, lanes) * rstd * slope) * rstd, lanes);
  });
}

template <typename G, typename T>
VIDKERN_INLINE void group_position(
    const G* grad, const T* x, const NormRows& rows, const float* offset, const float* slope, T* dx, int64_t c) {
  for_each_lanes(c, [&](int64_t i, auto lanes) VIDKERN_INLINE_LAMBDA {
    const Vec n = normed<PadNorm::group>(load(x + i, lanes), rows, 0.0f, i);
    const Vec dn = grad_of_z<PadNorm::group>(load(grad + i, lanes), n, rows, i) * load(rows.weight + i);
    store(dx + i, (dn - load(offset + i) - n * load(slope + i)) * load(rows.rstd + i), lanes);
  });
}

// The padded rows that a row of the video was copied to.
template <typename T>
void find_copies(const PadBackward& a, const Row& row, std::vector<const T*>& copies) {
  const Padding& p = a.padding;
  copies.clear();
  for (int64_t i = 0; i < p.t.copies(row.t); ++i)
    for (int64_t j = 0; j < p.h.copies(row.h); ++j)
      copies.push_back(at<const T>(a.dpadded, row.b, p.t.copy(row.t, i), p.h.copy(row.h, j), 0));
}

// The sum over a position's copies of their gradients, in float32.
template <typename T>
VIDKERN_INLINE void fold(const std::vector<const T*>& copies, const Axis& axis, int64_t stride, int64_t w, float* sum,
                         int64_t c) {
  std::fill_n(sum, whole_vecs(c), 0.0f);
  for (const T* row : copies)
    for (int64_t k = 0; k < axis.copies(w); ++k)
      for_each_lanes(c, [&](int64_t i, auto lanes) VIDKERN_INLINE_LAMBDA {
        store(sum + i, load(sum + i) + load(row + axis.copy(w, k) * stride + i, lanes));
      });
}

// Calls f(w, gradient) for the positions of a row: the gradient where it lies, or a float32 sum of the copies'.
template <typename T, typename F>
VIDKERN_INLINE void for_each_gradient(const PadBackward& a, const Row& row, std::vector<const T*>& copies, float* sum,
                                      F f) {
  const Axis& axis = a.padding.w;
  const int64_t stride = a.dpadded.stride_w;
  find_copies(a, row, copies);
  for (int64_t w = 0; w < axis.size; ++w) {
    if (copies.size() == 1 && axis.copies(w) == 1) {
      f(w, copies[0] + (axis.before + w) * stride);
    } else {
      fold(copies, axis, stride, w, sum, a.padding.c);
      f(w, static_cast<const float*>(sum));
    }
  }
}

// Offset and slope of a group: the means over it of dn and of dn * normed, a row of each for every sample.
struct GroupGradients {
  const float *offset, *slope;  // (B, whole vectors of C)
};

enum class Pass { all, sums, dx };  // rms and none take one pass over the rows, a group two

template <PadNorm norm, Pass pass, typename T>
VIDKERN_INLINE void backward_rows(const PadBackward& a, const GroupGradients& group, double* totals, int64_t begin,
                                  int64_t end) {
  const Padding& p = a.padding;
  const int64_t width = whole_vecs(p.c);
  const Scratch scratch(8, width);
  const NormRows rows{scratch.row(0), scratch.row(1), scratch.row(2), scratch.row(3)};
  float *const sum = scratch.row(4), *const dn = scratch.row(5);
  VectorSums sums{scratch.row(6), scratch.row(7), nullptr, p.c};
  std::fill_n(sums.bias, 2 * width, 0.0f);
  std::vector<const T*> copies;
  if constexpr (norm != PadNorm::none) load_vectors(a, rows);
  for (int64_t index = begin; index < end; ++index) {
    const Row row(index, p.t.size, p.h.size);
    const bool cached = row.t < p.cached;
    const Video& grads = cached ? a.dcache : a.dx;
    const int64_t frame = cached ? row.t : row.t - p.cached;
    const auto dx_at = [&](int64_t w) { return at<T>(grads, row.b, frame, row.h, w); };
    if (norm == PadNorm::none || cached) {
      if (pass == Pass::sums) continue;
      for_each_gradient(a, row, copies, sum, [&](int64_t w, const auto* grad) VIDKERN_INLINE_LAMBDA {
        T* const dx = dx_at(w);
        for_each_lanes(p.c, [&](int64_t i, auto lanes) VIDKERN_INLINE_LAMBDA {
          store(dx + i, load(grad + i, lanes), lanes);
        });
      });
      continue;
    }
    if (index == begin || row.h == 0) load_statistics<norm>(a, row.b, rows);
    const int64_t position = ((row.b * p.frames() + frame) * p.h.size + row.h) * p.w.size;
    sums.totals = totals + 2 * p.c * ((row.b * p.frames() + frame) * p.h.size + row.h);
    for_each_gradient(a, row, copies, sum, [&](int64_t w, const auto* grad) VIDKERN_INLINE_LAMBDA {
      const T* const x = at<const T>(a.x, row.b, frame, row.h, w);
      const float rstd = norm == PadNorm::rms ? a.rstd[position + w] : 0.0f;
      if constexpr (pass != Pass::dx) {
        const float along = sum_position<norm>(grad, x, rstd, rows, sums, dn, p.c);
        if constexpr (norm == PadNorm::rms) rms_position(dn, x, rstd, along / float(p.c), dx_at(w), p.c);
        sums.next();
      } else {
        const int64_t sample = row.b * width;
        group_position(grad, x, rows, group.offset + sample, group.slope + sample, dx_at(w), p.c);
      }
    });
    if constexpr (pass != Pass::dx) sums.flush();
  }
}

template <PadNorm norm, Pass pass>
VIDKERN_CLONES void backward_range(const PadBackward& a, const GroupGradients& group, double* totals, int64_t begin,
                                   int64_t end) {
  with_type(a.dtype, [&](auto element) VIDKERN_INLINE_LAMBDA {
    backward_rows<norm, pass, decltype(element)>(a, group, totals, begin, end);
  });
}

template <PadNorm norm, Pass pass>
void backward_pass(const PadBackward& a, const GroupGradients& group, double* totals) {
  for_each_row(a.padding.rows(), a.padding.w.size * a.padding.c, [&](int64_t begin, int64_t end) {
    backward_range<norm, pass>(a, group, totals, begin, end);
  });
}

// (B, rows, 2 C) -> (B, 2 C)
std::vector<double> sum_rows(const std::vector<double>& totals, int64_t samples, int64_t columns) {
  const int64_t rows = samples > 0 ? static_cast<int64_t>(totals.size()) / samples / std::max<int64_t>(columns, 1) : 0;
  std::vector<double> sums(samples * columns);
  for (int64_t b = 0; b < samples; ++b)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < columns; ++i) sums[b * columns + i] += totals[(b * rows + row) * columns + i];
  return sums;
}

void vector_grads(const PadBackward& a, const std::vector<double>& sums) {  // of (B, 2 C)
  const int64_t c = a.padding.c;
  for (int64_t i = 0; i < c; ++i) {
    double bias = 0.0, weight = 0.0;
    for (int64_t b = 0; b < a.padding.b; ++b) bias += sums[2 * b * c + i], weight += sums[(2 * b + 1) * c + i];
    a.dbias[i] = float(bias);
    a.dweight[i] = float(weight);
  }
}

void group_backward(const PadBackward& a, std::vector<double>& totals) {
  const Padding& p = a.padding;
  const int64_t width = whole_vecs(p.c), size = p.c / a.groups;
  backward_pass<PadNorm::group, Pass::sums>(a, {}, totals.data());
  const std::vector<double> sums = sum_rows(totals, p.b, 2 * p.c);
  const double count = double(p.frames() * p.h.size * p.w.size * size);
  std::vector<float> weight(width), offset(p.b * width), slope(p.b * width);
  load_vector(a.weight, 1.0f, weight.data(), p.c);
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t first = 0; first < p.c; first += size) {
      const double* const bias_sums = sums.data() + 2 * b * p.c;
      double grad = 0.0, along = 0.0;
      for (int64_t i = first; i < first + size; ++i)
        grad += bias_sums[i] * weight[i], along += bias_sums[p.c + i] * weight[i];
      std::fill_n(offset.data() + b * width + first, size, float(grad / count));
      std::fill_n(slope.data() + b * width + first, size, float(along / count));
    }
  backward_pass<PadNorm::group, Pass::dx>(a, {offset.data(), slope.data()}, nullptr);
  vector_grads(a, sums);
}

struct Cpu {
  template <PadNorm norm>
  static void pad(const Tensor& x, const PadForward& a) {
    if constexpr (norm == PadNorm::group) group_statistics(a);
    for_each_row(a.padding.rows(), a.padding.w.size * a.padding.c,
                 [&](int64_t begin, int64_t end) { pad_range<norm>(a, begin, end); });
    pad_outside(a, static_cast<int64_t>(x.element_size()));
  }

  template <PadNorm norm>
  static void pad_backward(const Tensor&, const PadBackward& a) {
    const Padding& p = a.padding;
    if constexpr (norm == PadNorm::none) return backward_pass<norm, Pass::all>(a, {}, nullptr);
    std::vector<double> totals(p.b * p.frames() * p.h.size * 2 * p.c);
    if constexpr (norm == PadNorm::group) return group_backward(a, totals);
    backward_pass<norm, Pass::all>(a, {}, totals.data());
    vector_grads(a, sum_rows(totals, p.b, 2 * p.c));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) { PadOperators<Cpu>::define(m); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) { PadOperators<Cpu>::implement(m); }

}  // namespace vidkern::cpu

// One token of the modulation family: residual, norm, shift and scale, and their gradients, in float32 vectors.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/vec.h"

namespace vidkern::cpu {

enum class Norm { none, layer, rms };

// A member of the family: with or without a residual before the norm.
struct Kind {
  bool residual;
  Norm norm;
};

struct Statistics {
  float mean, rstd;
};

// A frame's vectors in float32, and a row to work in.
struct ForwardRows {
  const float *gate, *gain, *shift;  // gain = 1 + scale
  float* z;
};

template <typename T>
struct ForwardToken {
  const T *x, *y;
  T *z, *h;
};

// x + gate * y; without a residual, x.
template <Kind kind, typename T>
VIDKERN_INLINE Vec residual(const T* x, const T* y, const float* gate, int64_t i) {
  if constexpr (kind.residual) return load(x + i) + load(gate + i) * load(y + i);
  return load(x + i);
}

// The mean is taken twice: `slip` is what rounding left over, and matters where |mean| is far above the deviation.
// The norm is taken of z before it is rounded to T.
template <Kind kind, typename T>
VIDKERN_INLINE Statistics forward_token(const ForwardToken<T>& token, const ForwardRows& rows, int64_t d, float eps) {
  constexpr bool kInPlace = std::is_same_v<T, float>;  // z in float32 lies in memory already
  const float* row = rows.z;
  if constexpr (kInPlace) row = kind.residual ? token.z : token.x;
  Sum total, rest, squares;
  for_each_vec(d, [&](int64_t i, int k) VIDKERN_INLINE_LAMBDA {
    const Vec z = residual<kind>(token.x, token.y, rows.gate, i);
    if constexpr (kind.residual) store(token.z + i, z);
    if constexpr (kind.norm != Norm::none && !kInPlace) store(rows.z + i, z);
    if constexpr (kind.norm == Norm::layer) total.chain[k] += z;
    if constexpr (kind.norm == Norm::rms) squares.chain[k] += z * z;
  });
  if constexpr (kind.norm == Norm::none) return {};
  float mean = 0.0f, slip = 0.0f;
  if constexpr (kind.norm == Norm::layer) {
    mean = total.total() / float(d);
    for_each_vec(d, [&](int64_t i, int k) VIDKERN_INLINE_LAMBDA {
      const Vec centered = load(row + i) - mean;
      rest.chain[k] += centered;
      squares.chain[k] += centered * centered;
    });
    slip = rest.total() / float(d);
  }
  const float variance = squares.total() / float(d) - slip * slip;
  const float rstd = 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + eps);
  for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
    Vec z = load(row + i);
    if constexpr (kind.norm == Norm::layer) z = z - mean - slip;
    store(token.h + i, z * rstd * load(rows.gain + i) + load(rows.shift + i));
  });
  return {mean + slip, rstd};
}

// A frame's vectors in float32, and sums over a run's tokens of their gradients.
struct BackwardRows {
  const float *gate, *gain;
  float *dgate, *dshift, *dscale;
};

template <typename T>
struct BackwardToken {
  const T *dh, *dz, *x, *y;  // dz is null where nothing else reads z
  T *dx, *dy;
  Statistics statistics;
};

template <Kind kind, typename T>
VIDKERN_INLINE Vec normed(const BackwardToken<T>& token, const BackwardRows& rows, int64_t i) {
  const Vec z = residual<kind>(token.x, token.y, rows.gate, i);
  return (kind.norm == Norm::layer ? z - token.statistics.mean : z) * token.statistics.rstd;
}

// The normed token is computed twice: a row that is written and read again would wait behind the stores of dx and dy.
template <Kind kind, typename T>
VIDKERN_INLINE void backward_token(const BackwardToken<T>& token, const BackwardRows& rows, int64_t d) {
  Sum grad, along;
  if constexpr (kind.norm != Norm::none) {
    for_each_vec(d, [&](int64_t i, int k) VIDKERN_INLINE_LAMBDA {
      const Vec n = normed<kind>(token, rows, i), dh = load(token.dh + i), dn = dh * load(rows.gain + i);
      if constexpr (kind.norm == Norm::layer) grad.chain[k] += dn;
      along.chain[k] += dn * n;
      store(rows.dshift + i, load(rows.dshift + i) + dh);
      store(rows.dscale + i, load(rows.dscale + i) + dh * n);
    });
  }
  const float grad_mean = grad.total() / float(d), along_mean = along.total() / float(d);
  for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
    Vec dz = {};
    if constexpr (kind.norm != Norm::none) {
      const Vec n = normed<kind>(token, rows, i), dn = load(token.dh + i) * load(rows.gain + i);
      dz = token.statistics.rstd * (dn - grad_mean - n * along_mean);
      if (kind.residual && token.dz != nullptr) dz += load(token.dz + i);
      store(token.dx + i, dz);
    } else {
      dz = load(token.dz + i);
    }
    if constexpr (kind.residual) {
      store(token.dy + i, load(rows.gate + i) * dz);
      store(rows.dgate + i, load(rows.dgate + i) + dz * load(token.y + i));
    }
  });
}

}  // namespace vidkern::cpu

// One token of the modulation family: residual, norm, shift and scale, and their gradients, in float32 vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/modulation.h"
#include "cpu/vec.h"

namespace vidkern::cpu {

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

// The mean of a token's first channels: differences from it stay small however far the mean is above the deviation.
template <Kind kind, typename T>
VIDKERN_INLINE float guess_mean(const ForwardToken<T>& token, const ForwardRows& rows, int64_t d) {
  const int64_t count = d < 4 * kLanes ? kLanes : 4 * kLanes;
  Vec total = {};
  for (int64_t i = 0; i < count; i += kLanes) total += residual<kind>(token.x, token.y, rows.gate, i) * (1.0f / count);
  return sum(total);
}

// One pass for both moments, of the differences from a guess of the mean; a second one where the guess was bad, as when
// only the first channels are large. The norm is taken of z before it is rounded to T.
template <Kind kind, typename T>
VIDKERN_INLINE Statistics forward_token(const ForwardToken<T>& token, const ForwardRows& rows, int64_t d, float eps) {
  constexpr bool kKeepsRow = kind.residual && kind.norm != Norm::none && !std::is_same_v<T, float>;
  float guess = kind.norm == Norm::layer ? guess_mean<kind>(token, rows, d) : 0.0f, rest = 0.0f, variance = 0.0f;
  for (int pass = 0; pass == 0 || (pass == 1 && rest * rest > 0.25f * variance); ++pass) {
    guess += rest;
    Sum total, squares;
    for_each_vec(d, [&](int64_t i, int k) VIDKERN_INLINE_LAMBDA {
      const Vec z = residual<kind>(token.x, token.y, rows.gate, i);
      const Vec centered = kind.norm == Norm::layer ? z - guess : z;
      if constexpr (kind.residual) store_plain(token.z + i, z);
      if constexpr (kKeepsRow) store(rows.z + i, z);
      if constexpr (kind.norm == Norm::layer) total.chain[k] += centered;
      if constexpr (kind.norm != Norm::none) squares.chain[k] += centered * centered;
    });
    if constexpr (kind.norm == Norm::none) return {};
    rest = total.total() / float(d);
    variance = squares.total() / float(d) - std::min(rest * rest, std::numeric_limits<float>::max());
  }
  const float rstd = 1.0f / std::sqrt(std::max(variance, 0.0f) + eps), shift = rest * rstd;
  for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
    Vec z = {};
    if constexpr (kKeepsRow) {
      z = load(rows.z + i);
    } else {
      z = load((kind.residual ? token.z : token.x) + i);
    }
    const Vec n = kind.norm == Norm::layer ? (z - guess) * rstd - shift : z * rstd;
    store_plain(token.h + i, n * load(rows.gain + i) + load(rows.shift + i));
  });
  return {guess + rest, rstd};
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
  const auto [mean, rstd] = token.statistics;
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
  const float offset = grad.total() / float(d) * rstd, slope = along.total() / float(d) * rstd * rstd;
  for_each_vec(d, [&](int64_t i, int) VIDKERN_INLINE_LAMBDA {
    Vec dz = {};
    if constexpr (kind.norm != Norm::none) {
      const Vec z = residual<kind>(token.x, token.y, rows.gate, i), dn = load(token.dh + i) * load(rows.gain + i);
      dz = dn * rstd - ((kind.norm == Norm::layer ? z - mean : z) * slope + offset);
      if (kind.residual && token.dz != nullptr) dz += load(token.dz + i);
      store_plain(token.dx + i, dz);
    } else {
      dz = load(token.dz + i);
    }
    if constexpr (kind.residual) {
      store_plain(token.dy + i, load(rows.gate + i) * dz);
      store(rows.dgate + i, load(rows.dgate + i) + dz * load(token.y + i));
    }
  });
}

}  // namespace vidkern::cpu

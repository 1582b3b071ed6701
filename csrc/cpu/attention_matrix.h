// Small float32 matrices in a thread's caches: products by register tiles, transposes, softmax and its gradient.
//
// Rows and columns of frames are padded to a multiple of eight. Columns of padding hold 0 after a softmax.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/vec.h"

#pragma GCC optimize("fp-contract=fast")  // a * b + c rounds once where the processor can: faster, and closer
#include "cpu/exp.h"

namespace vidkern::cpu {

constexpr int64_t kTileRows = 4;
constexpr int64_t kChain = 16;

using VecInts = int32_t __attribute__((vector_size(32)));
using VecDouble = double __attribute__((vector_size(64)));

constexpr int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

VIDKERN_INLINE VecDouble widen(Vec v) { return __builtin_convertvector(v, VecDouble); }

// The left factor of a product: element (i, l) lies at i * row + l * column, so that it can be a transpose.
struct Left {
  const float* data;
  int64_t row, column;
};

struct Rows {
  float* data;
  int64_t stride;
};

// c = a b, or c += a b: kChain terms are added one after another, then what they sum to.
template <int kVecs>
VIDKERN_INLINE void multiply_tile(Left a, const float* b, int64_t b_stride, Rows c, int64_t inner, bool add) {
  for (int64_t begin = 0; begin < inner; begin += kChain) {
    const int64_t end = inner - begin < kChain ? inner : begin + kChain;
    Vec sums[kTileRows][kVecs] = {};
    for (int64_t l = begin; l < end; ++l) {
      Vec row[kVecs];
      for (int j = 0; j < kVecs; ++j) row[j] = load(b + l * b_stride + j * kLanes);
      for (int i = 0; i < kTileRows; ++i) {
        const float left = a.data[i * a.row + l * a.column];
        for (int j = 0; j < kVecs; ++j) sums[i][j] += left * row[j];
      }
    }
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < kVecs; ++j) {
        float* out = c.data + i * c.stride + j * kLanes;
        store(out, add ? load(out) + sums[i][j] : sums[i][j]);
      }
    add = true;
  }
}

template <int kVecs>
VIDKERN_INLINE void multiply_columns(Left a, Rows b, Rows c, int64_t j, int64_t rows, int64_t inner, bool add) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const Left above{a.data + i * a.row, a.row, a.column};
    multiply_tile<kVecs>(above, b.data + j, b.stride, {c.data + i * c.stride + j, c.stride}, inner, add);
  }
}

// c (rows x columns) = a (rows x inner) b (inner x columns), plus c itself if `add`. Rows count as a multiple of
// kTileRows, columns are one of kLanes.
VIDKERN_INLINE void multiply(Left a, Rows b, Rows c, int64_t rows, int64_t inner, int64_t columns, bool add) {
  int64_t j = 0;
  for (int64_t left = columns; left >= 3 * kLanes && left != 4 * kLanes; left -= 3 * kLanes, j += 3 * kLanes)
    multiply_columns<3>(a, b, c, j, rows, inner, add);
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) multiply_columns<2>(a, b, c, j, rows, inner, add);
  if (j < columns) multiply_columns<1>(a, b, c, j, rows, inner, add);
}

VIDKERN_INLINE void transpose_8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  Vec pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    const Vec a = load(in + i * in_stride), b = load(in + (i + 1) * in_stride);
    pairs[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = __builtin_shufflevector(pairs[i + j], pairs[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
      quads[i + 2 * j + 1] = __builtin_shufflevector(pairs[i + j], pairs[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    store(out + i * out_stride, __builtin_shufflevector(quads[i], quads[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
    store(out + (i + 4) * out_stride, __builtin_shufflevector(quads[i], quads[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  }
}

// out (columns x rows) = in (rows x columns)^T, both sizes multiples of 8.
VIDKERN_INLINE void transpose(Rows in, Rows out, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 8)
    for (int64_t j = 0; j < columns; j += 8)
      transpose_8x8(in.data + i * in.stride + j, in.stride, out.data + j * out.stride + i, out.stride);
}

VIDKERN_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

VIDKERN_INLINE float maximum(Vec v) {
  v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  v = larger(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
  return v[0];
}

// What a query sees: `keys` frames from the first on, of `frames` (padded to whole vectors).
struct Visible {
  int64_t keys, frames;

  VIDKERN_INLINE Vec select(Vec v, int64_t j, float elsewhere) const {
    const VecInts column = VecInts{0, 1, 2, 3, 4, 5, 6, 7} + int32_t(j);
    return column < int32_t(keys) ? v : Vec{} + elsewhere;
  }
};

// Replaces a row of products by softmax(scale * product + bias); zeros for a query with every key masked. A row
// without a bias passes null. The maximum ignores NaN, which comes back through its own e^NaN.
VIDKERN_INLINE void softmax_row(float* row, const float* bias, float scale, Visible visible) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  Vec most = Vec{} + kNothing, total = {};
  for (int64_t j = 0; j < visible.frames; j += kLanes) {
    Vec score = load(row + j) * scale;
    if (bias != nullptr) score += load(bias + j);
    score = visible.select(score, j, kNothing);
    most = larger(score, most);
    store(row + j, score);
  }
  const float highest = maximum(most), shift = highest == kNothing ? 0.0f : highest;
  for (int64_t j = 0; j < visible.frames; j += kLanes) {
    const Vec e = exp_of_negative(load(row + j) - shift);
    total += e;
    store(row + j, e);
  }
  const float sum_of_row = sum(total), divisor = sum_of_row == 0.0f ? 1.0f : sum_of_row;
  for (int64_t j = 0; j < visible.frames; j += kLanes) store(row + j, load(row + j) / divisor);
}

VIDKERN_INLINE double sum(VecDouble v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Replaces a row of dp by ds = p * (dp - sum(p * dp)), in float64 as the difference is often small. The sum is divided
// by that of p, which rounding leaves beside 1: what all dp have in common then drops out.
VIDKERN_INLINE void softmax_row_backward(const float* p, float* dp, Visible all) {
  VecDouble total = {}, mass = {};
  for (int64_t j = 0; j < all.frames; j += kLanes) {
    const Vec grad = all.select(load(dp + j), j, 0.0f);  // padding may hold NaN
    total += widen(load(p + j)) * widen(grad);
    mass += widen(load(p + j));
    store(dp + j, grad);
  }
  const double whole = sum(mass), delta = sum(total) / (whole == 0.0 ? 1.0 : whole);
  for (int64_t j = 0; j < all.frames; j += kLanes) {
    const Vec ds = __builtin_convertvector(widen(load(p + j)) * (widen(load(dp + j)) - delta), Vec);
    store(dp + j, all.select(ds, j, 0.0f));
  }
}

}  // namespace vidkern::cpu

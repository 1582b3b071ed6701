// Sixteen frames of a head in the registers of a warp, and the two products of attention with them.
//
// Lane l is (g, t) = (l / 4, l % 4) and holds columns of rows g and g + 8. The order of columns is free in both
// products, so a lane takes eight neighbours, one 16-byte load: no shared memory, and results are stored likewise.
#pragma once

#include "common/device.h"
#include "common/mma.h"

namespace vidkern::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_g() { return threadIdx.x % kWarp / 4; }
__device__ inline int lane_t() { return threadIdx.x % 4; }

template <typename T>
struct WordOf {  // two neighbouring columns
  using type = uint32_t;
  __device__ static float2 widen(uint32_t word) { return Pair<T>::widen(word); }
  __device__ static uint32_t round(float x, float y) { return Pair<T>::round(x, y); }
};
template <>
struct WordOf<float> {
  using type = float2;
  __device__ static float2 widen(float2 word) { return word; }
  __device__ static float2 round(float x, float y) { return {x, y}; }
};
template <typename T>
using Word = typename WordOf<T>::type;

// kWords words of each of a lane's two rows: 8 * kWords columns in all lanes.
template <typename T, int kWords>
struct Tile {
  Word<T> rows[2][kWords];
};

// A product's rows g, columns 2t, 2t + 1; then the same of row g + 8.
using Fragment = float[4];
using Scores = float[2][4];  // 16 x 16: columns 0 to 7, then 8 to 15

__device__ inline int row_of(int i) { return lane_g() + 8 * (i / 2); }
__device__ inline int column_of(int half, int i) { return 8 * half + 2 * lane_t() + i % 2; }

// One problem's rows of a tensor.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  int count;     // F
  bool aligned;
};

// --- loops ---

template <typename F>
__device__ inline void for_each_score(F f) {  // f(half, element of the fragment)
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(half, i);
  }
}

template <int kWords, typename F>
__device__ inline void for_each_fragment(F f) {  // f(word, element of its fragment)
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(w, i);
  }
}

// --- loads and stores, in chunks of at most four words, the width of a load ---

template <int kValue>
struct Constant {
  __host__ __device__ constexpr operator int() const { return kValue; }
};

// f(first word, words), as compile-time numbers, for every chunk of kWords words.
template <int kWords, int kFirst = 0, typename F>
__device__ inline void for_each_chunk(F f) {
  if constexpr (kFirst < kWords) {
    constexpr int kCount = kWords - kFirst < 4 ? kWords - kFirst : 4;
    static_assert(kCount != 3);
    f(Constant<kFirst>{}, Constant<kCount>{});
    for_each_chunk<kWords, kFirst + kCount>(f);
  }
}

template <typename T, int kCount>
struct alignas(kCount * sizeof(Word<T>) < 16 ? kCount * sizeof(Word<T>) : 16) Chunk {
  Word<T> words[kCount];

  template <bool kAligned>
  __device__ static Chunk load(const T* p) {
    if constexpr (kAligned) {
      return *reinterpret_cast<const Chunk*>(p);
    } else {
      T elements[2 * kCount];
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) elements[i] = p[i];
      Chunk chunk;
      memcpy(&chunk, elements, sizeof(chunk));
      return chunk;
    }
  }
};

// The lane's first column of a chunk.
template <int kFirst, int kCount>
__device__ inline int chunk_column() {
  return 8 * kFirst + 2 * kCount * lane_t();
}

template <bool kAligned, typename T, int kWords>
__device__ inline void load_words(const Rows<const T>& rows, int first_row, int first_column, Tile<T, kWords>& tile) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int f = first_row + lane_g() + 8 * r;
    const T* row = rows.data + f * rows.stride + first_column;
    for_each_chunk<kWords>([&](auto first, auto count) {
      Chunk<T, count> chunk = {};
      if (f < rows.count) chunk = Chunk<T, count>::template load<kAligned>(row + chunk_column<first, count>());
#pragma unroll
      for (int w = 0; w < count; ++w) tile.rows[r][first + w] = chunk.words[w];
    });
  }
}

// Sixteen rows' columns from `first_column` on; zeros from row F on.
template <typename T, int kWords>
__device__ inline void load(const Rows<const T>& rows, int first_row, int first_column, Tile<T, kWords>& tile) {
  if (rows.aligned) {
    load_words<true>(rows, first_row, first_column, tile);
  } else {
    load_words<false>(rows, first_row, first_column, tile);
  }
}

template <typename T, int kWords>
__device__ inline void store(const Rows<T>& rows, int first_row, int first_column, const Fragment (&o)[kWords]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int f = first_row + lane_g() + 8 * r;
    if (f >= rows.count) continue;
    T* row = rows.data + f * rows.stride + first_column;
    for_each_chunk<kWords>([&](auto first, auto count) {
      Chunk<T, count> chunk;
#pragma unroll
      for (int w = 0; w < count; ++w)
        chunk.words[w] = WordOf<T>::round(o[first + w][2 * r], o[first + w][2 * r + 1]);
      *reinterpret_cast<Chunk<T, count>*>(row + chunk_column<first, count>()) = chunk;
    });
  }
}

// --- rows of scores: the four lanes of a row each hold four ---

__device__ inline float row_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

__device__ inline float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}

// --- the products; a tile's rows are those of one matrix and the columns of the other ---

// s += a b^T, over the tiles' columns.
template <typename T, int kWords>
__device__ inline void dot(Scores& s, const Tile<T, kWords>& a, const Tile<T, kWords>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int w = 0; w + 1 < kWords; w += 2) {
      const uint32_t steps[4] = {a.rows[0][w], a.rows[1][w], a.rows[0][w + 1], a.rows[1][w + 1]};
      mma_k16<T>(s[half], steps, b.rows[half][w], b.rows[half][w + 1]);
    }
    if constexpr (kWords % 2 == 1)
      mma_k8<T>(s[half], a.rows[0][kWords - 1], a.rows[1][kWords - 1], b.rows[half][kWords - 1]);
  }
}

// o += p b, with p rounded to the tiles' type.
template <typename T, int kWords>
__device__ inline void accumulate(Fragment* o, const Scores& p, const Tile<T, kWords>& b) {
  const uint32_t steps[4] = {Pair<T>::round(p[0][0], p[0][1]), Pair<T>::round(p[0][2], p[0][3]),
                             Pair<T>::round(p[1][0], p[1][1]), Pair<T>::round(p[1][2], p[1][3])};
#pragma unroll
  for (int w = 0; w < kWords; ++w) mma_k16<T>(o[w], steps, transpose(b.rows[0][w]), transpose(b.rows[1][w]));
}

// The same in float32, by multiply-adds: row n of b comes from the lanes that hold it, for the lane's own columns.
__device__ inline float2 shuffle(float2 word, int lane) {
  return bit_cast<float2>(__shfl_sync(kAllLanes, bit_cast<unsigned long long>(word), lane));
}

template <int kWords>
__device__ inline void dot(Scores& s, const Tile<float, kWords>& a, const Tile<float, kWords>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1
    for (int holder = 0; holder < 4; ++holder) {  // the lane of a row that keeps columns n, n + 1
      float2 sums[4] = {};
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 word = shuffle(b.rows[half][w], 4 * (2 * holder + i) + lane_t());
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sums[2 * r + i].x = fmaf(a.rows[r][w].x, word.x, sums[2 * r + i].x);
            sums[2 * r + i].y = fmaf(a.rows[r][w].y, word.y, sums[2 * r + i].y);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = row_sum(sums[i].x + sums[i].y);
        if (lane_t() == holder) s[half][i] += sum;
      }
    }
  }
}

// Eight rows are summed on their own first: over many tiles, short sums lose less.
template <int kWords>
__device__ inline void accumulate(Fragment* o, const Scores& p, const Tile<float, kWords>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Fragment sums[kWords] = {};
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float upper = __shfl_sync(kAllLanes, p[half][i], 4 * lane_g() + pair);
        const float lower = __shfl_sync(kAllLanes, p[half][2 + i], 4 * lane_g() + pair);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const float2 word = shuffle(b.rows[half][w], 4 * (2 * pair + i) + lane_t());
          sums[w][0] = fmaf(upper, word.x, sums[w][0]), sums[w][1] = fmaf(upper, word.y, sums[w][1]);
          sums[w][2] = fmaf(lower, word.x, sums[w][2]), sums[w][3] = fmaf(lower, word.y, sums[w][3]);
        }
      }
    }
    for_each_fragment<kWords>([&](int w, int i) { o[w][i] += sums[w][i]; });
  }
}

}  // namespace vidkern::cuda

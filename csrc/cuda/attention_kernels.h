// Temporal attention's kernels: the forward pass, and the backward pass of up to 16 frames and of more.
#pragma once

#include <limits>

#include "cuda/attention.h"
#include "cuda/attention_tile.h"

namespace vidkern::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Registers a thread where this many blocks share a multiprocessor's 65536.
constexpr int registers_of(int blocks) { return blocks == 4 ? 128 : blocks == 3 ? 168 : 255; }

// --- one problem ---

struct Position {
  int b, n, h;

  __device__ Position(const Problems& a, int position, int h) : b(position / a.n), n(position % a.n), h(h) {}
};

template <typename T>
__device__ inline Rows<T> rows_of(const Problems& a, const Heads& x, const Position& at) {
  T* data = static_cast<T*>(x.data) + at.b * x.stride_b + at.n * x.stride_n + at.h * x.stride_h;
  return {data, x.stride_f, a.f, x.aligned};
}

// --- rotary positions ---

// f(word, row of the lane's two, cos, sin) for every word of a tile.
template <int kWords, typename F>
__device__ inline void for_each_turn(const Problems& a, int first_row, int first_column, F f) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int frame = first_row + lane_g() + 8 * r;
    if (frame >= a.f) continue;
    const float *cos = a.cos + frame * a.d + first_column, *sin = a.sin + frame * a.d + first_column;
    for_each_chunk<kWords>([&](auto first, auto count) {
      constexpr int kHalf = count == 1 ? 1 : 2;
#pragma unroll
      for (int w = 0; w < count; w += kHalf) {
        using Angles = Chunk<float, kHalf>;
        const int column = chunk_column<first, count>() + 2 * w;
        const Angles cos_chunk = Angles::template load<true>(cos + column);
        const Angles sin_chunk = Angles::template load<true>(sin + column);
#pragma unroll
        for (int i = 0; i < kHalf; ++i) f(first + w + i, r, cos_chunk.words[i], sin_chunk.words[i]);
      }
    });
  }
}

// Rotates a tile of q or k by the angles of its frames.
template <typename T, int kWords>
__device__ inline void turn(const Problems& a, int first_row, int first_column, Tile<T, kWords>& tile) {
  if (a.cos == nullptr) return;
  for_each_turn<kWords>(a, first_row, first_column, [&](int w, int r, float2 cos, float2 sin) {
    const float2 x = WordOf<T>::widen(tile.rows[r][w]);
    tile.rows[r][w] = WordOf<T>::round(x.x * cos.x - x.y * sin.x, x.y * cos.y + x.x * sin.y);
  });
}

// Scales the gradient of a tile of q or k and rotates it back.
template <int kWords>
__device__ inline void turn_back(const Problems& a, int first_row, Fragment (&grad)[kWords]) {
  for_each_fragment<kWords>([&](int w, int i) { grad[w][i] *= a.scale; });
  if (a.cos == nullptr) return;
  for_each_turn<kWords>(a, first_row, 0, [&](int w, int r, float2 cos, float2 sin) {
    float &x = grad[w][2 * r], &y = grad[w][2 * r + 1];
    const float before = x;
    x = before * cos.x + y * sin.y;
    y = y * cos.y - before * sin.x;
  });
}

// --- sixteen rows of q, k, v or grad_o: in registers (kHeld), or read again, a chunk at a time, by every product ---

template <typename T, int D, bool kHeld, bool kTurned>
struct Sixteen {
  const Problems& all;
  Rows<const T> rows;
  int first;
  Tile<T, kHeld ? D / 8 : 1> tile;

  __device__ Sixteen(const Problems& all, const Rows<const T>& rows, int first) : all(all), rows(rows), first(first) {
    if constexpr (kHeld) load(rows, first, 0, tile);
  }

  // What comes after all loads are under way.
  __device__ void prepare() {
    if constexpr (kHeld && kTurned) turn(all, first, 0, tile);
  }

  template <int kWords>
  __device__ Tile<T, kWords> read(int first_column) const {
    Tile<T, kWords> chunk;
    load(rows, first, first_column, chunk);
    if constexpr (kTurned) turn(all, first, first_column, chunk);
    return chunk;
  }
};

// s += x y^T.
template <typename T, int D, bool kHeld, bool kTurned>
__device__ inline void dot(
    Scores& s, const Sixteen<T, D, kHeld, kTurned>& x, const Sixteen<T, D, kHeld, kTurned>& y) {
  if constexpr (kHeld) {
    dot(s, x.tile, y.tile);
  } else {
    constexpr int kChunk = 32, kRest = D % kChunk;
#pragma unroll 1
    for (int column = 0; column + kChunk <= D; column += kChunk)
      dot(s, x.template read<kChunk / 8>(column), y.template read<kChunk / 8>(column));
    if constexpr (kRest > 0) dot(s, x.template read<kRest / 8>(D - kRest), y.template read<kRest / 8>(D - kRest));
  }
}

// o += p x.
template <typename T, int D, bool kHeld, bool kTurned>
__device__ inline void accumulate(Fragment* o, const Scores& p, const Sixteen<T, D, kHeld, kTurned>& x) {
  if constexpr (kHeld) {
    accumulate(o, p, x.tile);
  } else {
    for_each_chunk<D / 8>([&](auto first, auto count) { accumulate(o + first, p, x.template read<count>(8 * first)); });
  }
}

// --- scores ---

// The queries and keys of 16 x 16 scores; kTransposed has keys as rows.
template <bool kTransposed>
struct Pairs {
  int first_query, first_key;

  __device__ int query(int half, int i) const { return first_query + (kTransposed ? column_of(half, i) : row_of(i)); }
  __device__ int key(int half, int i) const { return first_key + (kTransposed ? row_of(i) : column_of(half, i)); }
};

// Turns products of q and k into scores; -inf where a query does not see a key.
template <bool kTransposed>
__device__ inline void score(const Problems& a, int h, const Pairs<kTransposed>& at, Scores& s) {
  Scores bias = {};
  if (a.bias != nullptr) {
    const float* of_head = a.bias + static_cast<int64_t>(h) * a.f * a.f;
    for_each_score([&](int half, int i) {
      const int query = at.query(half, i), key = at.key(half, i);
      if (query < a.f && key < a.f) bias[half][i] = of_head[query * a.f + key];
    });
  }
  for_each_score([&](int half, int i) {
    const bool seen = at.key(half, i) < a.f && !(a.causal && at.key(half, i) > at.query(half, i));
    const float x = fmaf(s[half][i], a.scale, bias[half][i]);
    s[half][i] = seen ? x : -kInfinity;
  });
}

// The sums over keys of a lane's two rows of queries.
struct Running {
  float top[2] = {-kInfinity, -kInfinity}, base[2], sum[2] = {};

  // Takes 16 more keys: their scores become exp(score - base). What was summed with them before is to be faded.
  __device__ void take(Scores& s, float (&fade)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = top[r];
      top[r] = fmaxf(before, row_max(fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]))));
      base[r] = top[r] == -kInfinity ? 0.0f : top[r];  // a query that sees no key
      fade[r] = expf(before - base[r]);
      sum[r] *= fade[r];
    }
    for_each_score([&](int half, int i) {
      s[half][i] = expf(s[half][i] - base[i / 2]);
      sum[i / 2] += s[half][i];
    });
  }

  __device__ float inverse(int r) const {
    const float total = row_sum(sum[r]);
    return total == 0.0f ? 0.0f : 1.0f / total;
  }
};

// --- forward: a warp takes 16 queries ---

template <typename T, int D>
__global__ void __maxnreg__(registers_of(sizeof(T) == 4 ? 3 : D <= 32 ? 4 : D <= 72 ? 3 : 2))
temporal_attention_kernel(const Forward a) {
  constexpr int kRowBytes = D * sizeof(T);
  constexpr bool kHeld = kRowBytes <= 256, kValuesAtOnce = kRowBytes <= 192;  // what fits in the registers
  const Problems& all = a.problems;
  const int tiles = (all.f + kTile - 1) / kTile;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  const int64_t problem = index / tiles;
  if (problem >= static_cast<int64_t>(all.runs) * all.h) return;
  const int first_query = static_cast<int>(index % tiles) * kTile;
  const Position at(all, static_cast<int>(problem / all.h), static_cast<int>(problem % all.h));
  const auto k_rows = rows_of<const T>(all, a.k, at), v_rows = rows_of<const T>(all, a.v, at);

  Sixteen<T, D, kHeld, true> q(all, rows_of<const T>(all, a.q, at), first_query);
  Fragment o[D / 8] = {};
  Running softmax;
#pragma unroll 1
  for (int first_key = 0; first_key < all.f; first_key += kTile) {
    Sixteen<T, D, kHeld, true> k(all, k_rows, first_key);
    Sixteen<T, D, kValuesAtOnce, false> v(all, v_rows, first_key);
    if (first_key == 0) q.prepare();
    k.prepare();
    Scores s = {};
    float fade[2];
    dot(s, q, k);
    score(all, at.h, Pairs<false>{first_query, first_key}, s);
    softmax.take(s, fade);
    for_each_fragment<D / 8>([&](int w, int i) { o[w][i] *= fade[i / 2]; });
    accumulate(o, s, v);
  }
  const float inverse[2] = {softmax.inverse(0), softmax.inverse(1)};
  for_each_fragment<D / 8>([&](int w, int i) { o[w][i] *= inverse[i / 2]; });
  store(rows_of<T>(all, a.o, at), first_query, 0, o);
}

// --- backward ---

// What a query leaves for its keys: p = exp(score - base) * inverse, ds = p * (dp - delta).
struct Query {
  float base, inverse, delta;
};

// Turns products of q and k into probabilities, and those of grad_o and v into the scores' gradients. query(half, i)
// is what the query left.
template <bool kTransposed, typename F>
__device__ inline void differentiate(
    const Problems& a, int h, const Pairs<kTransposed>& at, Scores& s, Scores& ds, F query) {
  score(a, h, at, s);
  for_each_score([&](int half, int i) {
    const Query of = query(half, i);
    const bool inside = at.query(half, i) < a.f && at.key(half, i) < a.f;
    const float p = expf(s[half][i] - of.base) * of.inverse, grad = p * (ds[half][i] - of.delta);
    s[half][i] = inside ? p : 0.0f;
    ds[half][i] = inside ? grad : 0.0f;
  });
}

// Adds a tile of scores' gradients to a run's row of the bias's.
__device__ inline void add_bias_grad(
    const Backward& a, int64_t row, bool first, const Pairs<false>& at, const Scores& ds) {
  if (a.grad_bias == nullptr) return;
  const int frames = a.problems.f;
  float* grad = a.grad_bias + row * frames * frames;
  for_each_score([&](int half, int i) {
    const int query = at.query(half, i), key = at.key(half, i);
    if (query >= frames || key >= frames) return;
    float& sum = grad[query * frames + key];
    sum = first ? ds[half][i] : sum + ds[half][i];
  });
}

template <typename T>
struct ProblemRows {
  Rows<const T> q, k, v, grad_o;
  Rows<T> grad_q, grad_k, grad_v;

  __device__ ProblemRows(const Backward& a, const Position& at)
      : q(rows_of<const T>(a.problems, a.q, at)),
        k(rows_of<const T>(a.problems, a.k, at)),
        v(rows_of<const T>(a.problems, a.v, at)),
        grad_o(rows_of<const T>(a.problems, a.grad_o, at)),
        grad_q(rows_of<T>(a.problems, a.grad_q, at)),
        grad_k(rows_of<T>(a.problems, a.grad_k, at)),
        grad_v(rows_of<T>(a.problems, a.grad_v, at)) {}
};

// The positions that one row of the bias's gradient is of.
struct Run {
  int h, first, last;

  __device__ Run(const Problems& a, int64_t row) : h(static_cast<int>(row % a.h)) {
    const int64_t start = row / a.h * a.run, end = static_cast<int64_t>(a.b) * a.n;
    first = static_cast<int>(start), last = static_cast<int>(start + a.run < end ? start + a.run : end);
  }
};

// At most 16 frames: a warp has all of a problem in its registers.
template <typename T, int D>
__global__ void __maxnreg__(registers_of(D <= 32 ? 4 : D <= 80 ? 3 : 2))
temporal_attention_backward_one_tile_kernel(const Backward a) {
  const Problems& all = a.problems;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  if (row >= static_cast<int64_t>(all.runs) * all.h) return;
  const Run run(all, row);
#pragma unroll 1
  for (int position = run.first; position < run.last; ++position) {
    const ProblemRows<T> rows(a, Position(all, position, run.h));
    Sixteen<T, D, true, true> q(all, rows.q, 0), k(all, rows.k, 0);
    const Sixteen<T, D, true, false> v(all, rows.v, 0), grad_o(all, rows.grad_o, 0);
    q.prepare();
    k.prepare();

    Scores s = {}, ds = {}, s_t = {}, ds_t = {}, p;  // queries x keys, keys x queries
    dot(s, q, k);
    dot(s_t, k, q);
    dot(ds, grad_o, v);
    dot(ds_t, v, grad_o);
    for_each_score([&](int half, int i) { p[half][i] = s[half][i]; });
    score(all, run.h, Pairs<false>{}, p);
    Running softmax;
    float fade[2], delta[2] = {};
    softmax.take(p, fade);
    for_each_score([&](int half, int i) { delta[i / 2] += p[half][i] * ds[half][i]; });
    Query query[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = softmax.inverse(r);
      query[r] = {softmax.base[r], inverse, row_sum(delta[r]) * inverse};
    }
    differentiate(all, run.h, Pairs<false>{}, s, ds, [&](int, int i) { return query[i / 2]; });
    differentiate(all, run.h, Pairs<true>{}, s_t, ds_t, [&](int half, int i) {
      const int holder = 4 * column_of(0, i);  // a lane that has this column's query
      return Query{__shfl_sync(kAllLanes, query[half].base, holder),
                   __shfl_sync(kAllLanes, query[half].inverse, holder),
                   __shfl_sync(kAllLanes, query[half].delta, holder)};
    });
    add_bias_grad(a, row, position == run.first, Pairs<false>{}, ds);
    Fragment grad_q[D / 8] = {};
    accumulate(grad_q, ds, k);
    turn_back(all, 0, grad_q);
    store(rows.grad_q, 0, 0, grad_q);
    Fragment grad_v[D / 8] = {}, grad_k[D / 8] = {};
    accumulate(grad_v, s_t, grad_o);
    store(rows.grad_v, 0, 0, grad_v);
    accumulate(grad_k, ds_t, q);
    turn_back(all, 0, grad_k);
    store(rows.grad_k, 0, 0, grad_k);
  }
}

// Warps that share a problem, each taking every team-th tile of queries, then of keys.
__host__ __device__ inline int team_of(int frames) {
  const int tiles = (frames + kTile - 1) / kTile;
  return tiles > 2 ? kWarps : tiles;
}

// Any number of frames: the queries' sums and gradients first, then, with these sums, the keys' and values' gradients.
template <typename T, int D>
__global__ void __maxnreg__(registers_of(D * sizeof(T) <= 64 ? 3 : 2))
temporal_attention_backward_kernel(const Backward a) {
  constexpr bool kHeld = D * sizeof(T) <= 160;  // what fits in the registers
  using Queries = Sixteen<T, D, kHeld, true>;  // and keys
  using Values = Sixteen<T, D, kHeld, false>;
  __shared__ Shared<Query, kMaxFrames> queries;
  const Problems& all = a.problems;
  const int team = team_of(all.f), warp = threadIdx.x / kWarp, step = team * kTile;
  const int start = warp % team * kTile, first_of_team = warp / team * step;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps / team) + warp / team;
  const bool exists = row < static_cast<int64_t>(all.runs) * all.h;
  const Run run(all, row);
#pragma unroll 1
  for (int visit = 0; visit < all.run; ++visit) {
    const int position = run.first + visit;
    const bool active = exists && position < run.last;
    const ProblemRows<T> rows(a, Position(all, position, run.h));
    const int end = active ? all.f : 0;
#pragma unroll 1
    for (int first_query = start; first_query < end; first_query += step) {
      Queries q(all, rows.q, first_query);
      const Values grad_o(all, rows.grad_o, first_query);
      Running softmax;
      float fade[2], delta[2] = {};
#pragma unroll 1
      for (int first_key = 0; first_key < all.f; first_key += kTile) {
        Queries k(all, rows.k, first_key);
        const Values v(all, rows.v, first_key);
        if (first_key == 0) q.prepare();
        k.prepare();
        Scores s = {}, dp = {};
        dot(s, q, k);
        dot(dp, grad_o, v);
        score(all, run.h, Pairs<false>{first_query, first_key}, s);
        softmax.take(s, fade);
        delta[0] *= fade[0], delta[1] *= fade[1];
        for_each_score([&](int half, int i) { delta[i / 2] += s[half][i] * dp[half][i]; });
      }
      Query query[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float inverse = softmax.inverse(r);
        query[r] = {softmax.base[r], inverse, row_sum(delta[r]) * inverse};
        if (lane_t() == 0) queries[first_of_team + first_query + row_of(2 * r)] = query[r];
      }
      Fragment grad_q[D / 8] = {};
#pragma unroll 1
      for (int first_key = 0; first_key < all.f; first_key += kTile) {
        Queries k(all, rows.k, first_key);
        const Values v(all, rows.v, first_key);
        k.prepare();
        Scores s = {}, ds = {};
        dot(s, q, k);
        dot(ds, grad_o, v);
        const Pairs<false> pairs = {first_query, first_key};
        differentiate(all, run.h, pairs, s, ds, [&](int, int i) { return query[i / 2]; });
        add_bias_grad(a, row, visit == 0, pairs, ds);
        accumulate(grad_q, ds, k);
      }
      turn_back(all, first_query, grad_q);
      store(rows.grad_q, first_query, 0, grad_q);
    }
    __syncthreads();
#pragma unroll 1
    for (int first_key = start; first_key < end; first_key += step) {
      Queries k(all, rows.k, first_key);
      const Values v(all, rows.v, first_key);
      k.prepare();
      Fragment grad_k[D / 8] = {}, grad_v[D / 8] = {};
#pragma unroll 1
      for (int first_query = 0; first_query < all.f; first_query += kTile) {
        Queries q(all, rows.q, first_query);
        const Values grad_o(all, rows.grad_o, first_query);
        q.prepare();
        Scores s = {}, ds = {};  // keys x queries
        dot(s, k, q);
        dot(ds, v, grad_o);
        const Pairs<true> pairs = {first_query, first_key};
        differentiate(all, run.h, pairs, s, ds, [&](int half, int i) -> Query {
          return queries[first_of_team + pairs.query(half, i)];
        });
        accumulate(grad_v, s, grad_o);
        accumulate(grad_k, ds, q);
      }
      store(rows.grad_v, first_key, 0, grad_v);
      turn_back(all, first_key, grad_k);
      store(rows.grad_k, first_key, 0, grad_k);
    }
    __syncthreads();
  }
}

// Calls f(Constant<d>{}).
template <typename F>
void with_head_size(int d, F f) {
  switch (d) {
    case 32: return f(Constant<32>{});
    case 64: return f(Constant<64>{});
    case 72: return f(Constant<72>{});
    case 80: return f(Constant<80>{});
    case 96: return f(Constant<96>{});
    case 128: return f(Constant<128>{});
    default: STD_TORCH_CHECK(false, "d must be 32, 64, 72, 80, 96 or 128, got ", d);
  }
}

int64_t blocks_of(int64_t items, int per_block) { return (items + per_block - 1) / per_block; }

}  // namespace

template <typename T>
void launch_forward(const Tensor& on, const Forward& call) {
  const Problems& all = call.problems;
  const int64_t warps = static_cast<int64_t>(all.runs) * all.h * blocks_of(all.f, kTile);
  with_head_size(all.d, [&](auto d) {
    launch(on, temporal_attention_kernel<T, d>, blocks_of(warps, kWarps), kThreads, call);
  });
}

template <typename T>
void launch_backward(const Tensor& on, const Backward& call) {
  const Problems& all = call.problems;
  const int64_t rows = static_cast<int64_t>(all.runs) * all.h;
  if (all.f == 0) return;
  with_head_size(all.d, [&](auto d) {
    if constexpr (sizeof(T) == 2) {
      if (all.f <= kTile)
        return launch(on, temporal_attention_backward_one_tile_kernel<T, d>, blocks_of(rows, kWarps), kThreads, call);
    }
    launch(on, temporal_attention_backward_kernel<T, d>, blocks_of(rows, kWarps / team_of(all.f)), kThreads, call);
  });
}

}  // namespace vidkern::cuda

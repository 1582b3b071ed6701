// Temporal attention on the CPU: a thread copies the frames of some heads of a token into its caches, attends, and
// writes them back.
#include <algorithm>
#include <optional>
#include <tuple>

#include "common/attention.h"
#include "common/tensor.h"
#include "cpu/attention_matrix.h"

namespace vidkern::cpu {
namespace {

constexpr int64_t kRunLength = 16;             // tokens: as many are added one after another in the bias's gradient
constexpr int64_t kQueryRows = 32;             // queries whose scores are held at a time
constexpr int64_t kGroupBytes = 524288;        // of the matrices of the heads that are copied at a time
constexpr int64_t kLineBytes = 64;             // of a cache
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

struct Sizes {
  int64_t b, f, n, h, d;
};

// (B, F, N, H, d), unit stride in d.
struct Heads {
  void* data;
  int64_t stride_b, stride_f, stride_n, stride_h;

  template <typename T>
  VIDKERN_INLINE T* at(int64_t b, int64_t f, int64_t n, int64_t h) const {
    return static_cast<T*>(data) + b * stride_b + f * stride_f + n * stride_n + h * stride_h;
  }
};

// A matrix (F, columns) for each head, or one for all; null where the call has none.
struct Table {
  const void* data;
  int64_t stride_h, stride_f;
  Dtype dtype;
};

// The same heads of a run of tokens, which are counted over b and n.
struct Task {
  int64_t first_token, last_token, first_head, heads, run;
};

// Tasks depend on the shape alone, so the sums over a run do too. Those of one group of heads follow one another.
struct Plan {
  Sizes sizes;
  int64_t group, groups, runs;

  Plan(Sizes sizes, int64_t matrices) : sizes(sizes) {
    const int64_t bytes = matrices * padded(sizes.f) * sizes.d * int64_t(sizeof(float));
    group = std::clamp(kGroupBytes / std::max<int64_t>(bytes, 1), int64_t{1}, sizes.h);
    groups = (sizes.h + group - 1) / group;
    runs = (sizes.b * sizes.n + kRunLength - 1) / kRunLength;
  }

  int64_t count() const { return sizes.f == 0 ? 0 : groups * runs; }
  int64_t matrix() const { return padded(sizes.f) * sizes.d + kLanes; }  // elements; apart from powers of two

  Task operator[](int64_t index) const {
    const int64_t run = index % runs, head = index / runs * group;
    return {run * kRunLength, std::min((run + 1) * kRunLength, sizes.b * sizes.n), head,
            std::min(group, sizes.h - head), run};
  }
};

template <typename F>
void for_each_task(const Plan& plan, F f) {
  const int64_t elements = kRunLength * plan.group * plan.sizes.f * plan.sizes.d;
  torch::stable::parallel_for(0, plan.count(), kElementsPerThread / (elements + 1) + 1, f);
}

// What the operators take besides the tokens.
struct Options {
  Table bias, cos, sin;
  float scale;
  bool causal;
};

// --- the rotation ---

struct Rope {
  const float *cos, *sin;  // (F, d), null without; sin with even channels negated
};

VIDKERN_INLINE Vec swap_pairs(Vec v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6); }

VIDKERN_INLINE Vec rotate(Vec x, Rope rope, int64_t i) {
  return rope.cos == nullptr ? x : x * load(rope.cos + i) + swap_pairs(x) * load(rope.sin + i);
}

VIDKERN_INLINE Vec rotate_backward(Vec grad, Rope rope, int64_t i) {
  return rope.cos == nullptr ? grad : grad * load(rope.cos + i) + swap_pairs(grad * load(rope.sin + i));
}

// --- between tensors and matrices: every head's (F, d) in float32, with zeros in the rows of padding ---

// Heads of a token in a tensor, and their matrices. With a rope, they are rotated on the way in, their gradients back
// on the way out.
struct Operand {
  Heads tensor;
  float* matrices;
  Rope rope;
};

template <typename T>
VIDKERN_INLINE void prefetch(const T* row, int64_t d) {  // into the second level
  for (int64_t i = 0; i < d; i += kLineBytes / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// The operands lie beside each other in a packed tensor, so all are read frame by frame; the next frame, which lies
// megabytes away, is on its way meanwhile.
template <typename T, size_t kCount>
VIDKERN_INLINE void gather(const Operand (&operands)[kCount], const Plan& plan, const Task& task, int64_t token) {
  const auto [batch, frames, tokens, all_heads, d] = plan.sizes;
  const int64_t b = token / tokens, n = token % tokens;
  for (int64_t f = 0; f < frames; ++f)
    for (const Operand& x : operands)
      for (int64_t h = 0; h < task.heads; ++h) {
        const T* in = x.tensor.at<const T>(b, f, n, task.first_head + h);
        float* out = x.matrices + h * plan.matrix() + f * d;
        prefetch(in + (f + 1 < frames ? x.tensor.stride_f : x.tensor.stride_n - f * x.tensor.stride_f), d);
        for (int64_t i = 0; i < d; i += kLanes) store(out + i, rotate(load(in + i), x.rope, f * d + i));
      }
  for (const Operand& x : operands)
    for (int64_t h = 0; h < task.heads; ++h) {
      float* matrix = x.matrices + h * plan.matrix();
      std::fill(matrix + frames * d, matrix + padded(frames) * d, 0.0f);
    }
}

template <typename T, size_t kCount>
VIDKERN_INLINE void scatter(const Operand (&operands)[kCount], const Plan& plan, const Task& task, int64_t token) {
  const auto [batch, frames, tokens, all_heads, d] = plan.sizes;
  const int64_t b = token / tokens, n = token % tokens;
  for (int64_t f = 0; f < frames; ++f)
    for (const Operand& x : operands)
      for (int64_t h = 0; h < task.heads; ++h) {
        const float* in = x.matrices + h * plan.matrix() + f * d;
        T* out = x.tensor.at<T>(b, f, n, task.first_head + h);
        for (int64_t i = 0; i < d; i += kLanes) store(out + i, rotate_backward(load(in + i), x.rope, f * d + i));
      }
}

// Rows of any length in float32, each at a multiple of kLanes.
template <typename T>
VIDKERN_INLINE void widen_rows(const Table& table, int64_t h, int64_t rows, int64_t columns, float* out) {
  for (int64_t f = 0; f < rows; ++f) {
    const T* in = static_cast<const T*>(table.data) + h * table.stride_h + f * table.stride_f;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes, out += kLanes) store(out, load(in + j));
    if (j == columns) continue;
    T rest[kLanes] = {};
    std::copy(in + j, in + columns, rest);
    store(out, load(rest));
    out += kLanes;
  }
}

VIDKERN_CLONES void widen(const Table& table, int64_t h, int64_t rows, int64_t columns, float* out) {
  switch (table.dtype) {
    case Dtype::float32: return widen_rows<float>(table, h, rows, columns, out);
    case Dtype::bfloat16: return widen_rows<bfloat16>(table, h, rows, columns, out);
    case Dtype::float16: return widen_rows<float16>(table, h, rows, columns, out);
  }
}

// A thread's float32 copies of the tables.
class Tables {
 public:
  Tables(const Plan& plan, const Options& options)
      : plan_(plan), options_(options),
        rope_(options.cos.data == nullptr ? 0 : 2, plan.matrix()),
        bias_(options.bias.data == nullptr ? 0 : plan.group, head()) {
    if (options.cos.data == nullptr) return;
    widen(options.cos, 0, plan.sizes.f, plan.sizes.d, rope_.row(0));
    widen(options.sin, 0, plan.sizes.f, plan.sizes.d, rope_.row(1));
    for (int64_t i = 0; i < plan.sizes.f * plan.sizes.d; i += 2) rope_.row(1)[i] = -rope_.row(1)[i];
  }

  Rope rope() const {
    return options_.cos.data == nullptr ? Rope{nullptr, nullptr} : Rope{rope_.row(0), rope_.row(1)};
  }

  void load_bias(const Task& task) {
    if (options_.bias.data == nullptr || task.first_head == first_head_) return;
    first_head_ = task.first_head;
    for (int64_t h = 0; h < task.heads; ++h)
      widen(options_.bias, first_head_ + h, plan_.sizes.f, plan_.sizes.f, bias_.row(h));
  }

  const float* bias(int64_t h) const { return options_.bias.data == nullptr ? nullptr : bias_.row(h); }

 private:
  int64_t head() const { return plan_.sizes.f * padded(plan_.sizes.f); }

  const Plan& plan_;
  const Options& options_;
  Scratch rope_, bias_;
  int64_t first_head_ = -1;
};

// --- one head of one token ---

struct Problem {
  int64_t frames, d;
  const float* bias;  // (F, padded F), null without
  float scale;
  bool causal;
};

// p (rows, padded F), the probabilities of the queries from `first` on; keys transposed.
VIDKERN_INLINE void probabilities(const Problem& a, const float* q, Rows kt, int64_t first, int64_t rows, Rows p) {
  multiply({q + first * a.d, a.d, 1}, kt, p, rows, a.d, p.stride, false);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t query = first + i;
    const float* bias = a.bias == nullptr ? nullptr : a.bias + query * p.stride;
    softmax_row(p.data + i * p.stride, bias, a.scale, {a.causal ? query + 1 : a.frames, p.stride});
  }
}

// o takes the place of q. `work`: (d + kQueryRows, padded F).
VIDKERN_CLONES void forward_head(const Problem& a, float* q, float* k, float* v, float* work) {
  const int64_t width = padded(a.frames);
  const Rows kt{work, width}, p{work + a.d * width, width};
  transpose({k, a.d}, kt, width, a.d);
  for (int64_t first = 0; first < a.frames; first += kQueryRows) {
    const int64_t rows = std::min(kQueryRows, a.frames - first);
    probabilities(a, q, kt, first, rows, p);
    multiply({p.data, width, 1}, {v, a.d}, {q + first * a.d, a.d}, rows, a.frames, a.d, false);
  }
}

// dq takes the place of q, dv that of v. `work`: (2 d + 2 kQueryRows, padded F). `dbias` (F, padded F) is null, or
// gets ds, added to what is there if `add`.
VIDKERN_CLONES void backward_head(
    const Problem& a, float* q, float* k, float* v, const float* dout, float* dk, float* dbias, bool add, float* work) {
  const int64_t width = padded(a.frames);
  const Rows kt{work, width}, vt{kt.data + a.d * width, width};
  const Rows p{vt.data + a.d * width, width}, ds{p.data + kQueryRows * width, width};
  transpose({k, a.d}, kt, width, a.d);
  transpose({v, a.d}, vt, width, a.d);
  for (int64_t first = 0; first < a.frames; first += kQueryRows) {
    const int64_t rows = std::min(kQueryRows, a.frames - first);
    const Rows queries{q + first * a.d, a.d}, grads{const_cast<float*>(dout) + first * a.d, a.d};
    probabilities(a, q, kt, first, rows, p);
    multiply({grads.data, a.d, 1}, vt, ds, rows, a.d, width, false);
    for (int64_t i = 0; i < rows; ++i)
      softmax_row_backward(p.data + i * width, ds.data + i * width, {a.frames, width});
    if (dbias != nullptr)
      for (int64_t i = 0; i < rows * width; i += kLanes) {
        float* sums = dbias + first * width + i;
        store(sums, load(ds.data + i) + (add ? load(sums) : Vec{}));
      }
    for (int64_t i = 0; i < rows * width; i += kLanes) store(ds.data + i, load(ds.data + i) * a.scale);
    multiply({ds.data, 1, width}, queries, {dk, a.d}, width, rows, a.d, first > 0);
    multiply({p.data, 1, width}, grads, {v, a.d}, width, rows, a.d, first > 0);
    multiply({ds.data, width, 1}, {k, a.d}, queries, rows, a.frames, a.d, false);
  }
}

// --- all of them ---

struct Forward {
  Plan plan;
  Dtype dtype;
  Options options;
  Heads q, k, v, o;
};

template <typename T>
VIDKERN_INLINE void forward_tasks(const Forward& a, int64_t begin, int64_t end) {
  const auto [batch, frames, tokens, heads, d] = a.plan.sizes;
  Tables tables(a.plan, a.options);
  const Scratch matrices(3 * a.plan.group, a.plan.matrix()), work(d + kQueryRows, padded(frames));
  float *q = matrices.row(0), *k = matrices.row(a.plan.group), *v = matrices.row(2 * a.plan.group);
  for (int64_t index = begin; index < end; ++index) {
    const Task task = a.plan[index];
    tables.load_bias(task);
    for (int64_t token = task.first_token; token < task.last_token; ++token) {
      gather<T>({{a.q, q, tables.rope()}, {a.k, k, tables.rope()}, {a.v, v, {}}}, a.plan, task, token);
      for (int64_t h = 0; h < task.heads; ++h) {
        const int64_t at = h * a.plan.matrix();
        const Problem problem{frames, d, tables.bias(h), a.options.scale, a.options.causal};
        forward_head(problem, q + at, k + at, v + at, work.row(0));
      }
      scatter<T>({{a.o, q, {}}}, a.plan, task, token);
    }
  }
}

VIDKERN_CLONES void forward_range(const Forward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::float32: return forward_tasks<float>(a, begin, end);
    case Dtype::bfloat16: return forward_tasks<bfloat16>(a, begin, end);
    case Dtype::float16: return forward_tasks<float16>(a, begin, end);
  }
}

void forward(const Forward& a) {
  for_each_task(a.plan, [&](int64_t begin, int64_t end) { forward_range(a, begin, end); });
}

struct Backward {
  Plan plan;
  Dtype dtype;
  Options options;
  Heads grad, q, k, v, dq, dk, dv;
  float* dbias;  // (runs, H, F, padded F), null where it is not asked for
};

template <typename T>
VIDKERN_INLINE void backward_tasks(const Backward& a, int64_t begin, int64_t end) {
  const auto [batch, frames, tokens, heads, d] = a.plan.sizes;
  const int64_t group = a.plan.group, square = frames * padded(frames);
  Tables tables(a.plan, a.options);
  const Scratch matrices(5 * group, a.plan.matrix()), work(2 * d + 2 * kQueryRows, padded(frames));
  float *q = matrices.row(0), *k = matrices.row(group), *v = matrices.row(2 * group);
  float *grad = matrices.row(3 * group), *dk = matrices.row(4 * group);
  for (int64_t index = begin; index < end; ++index) {
    const Task task = a.plan[index];
    tables.load_bias(task);
    for (int64_t token = task.first_token; token < task.last_token; ++token) {
      gather<T>({{a.q, q, tables.rope()}, {a.k, k, tables.rope()}, {a.v, v, {}}, {a.grad, grad, {}}}, a.plan, task,
                token);
      for (int64_t h = 0; h < task.heads; ++h) {
        const int64_t at = h * a.plan.matrix();
        const Problem problem{frames, d, tables.bias(h), a.options.scale, a.options.causal};
        float* dbias = a.dbias == nullptr ? nullptr : a.dbias + (task.run * heads + task.first_head + h) * square;
        backward_head(problem, q + at, k + at, v + at, grad + at, dk + at, dbias, token > task.first_token,
                      work.row(0));
      }
      scatter<T>({{a.dq, q, tables.rope()}, {a.dk, dk, tables.rope()}, {a.dv, v, {}}}, a.plan, task, token);
    }
  }
}

VIDKERN_CLONES void backward_range(const Backward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::float32: return backward_tasks<float>(a, begin, end);
    case Dtype::bfloat16: return backward_tasks<bfloat16>(a, begin, end);
    case Dtype::float16: return backward_tasks<float16>(a, begin, end);
  }
}

// Adds rows of F in padded rows, in the order of the runs; in float64, as there may be thousands.
VIDKERN_CLONES void add_runs(const float* partial, int64_t runs, int64_t stride, int64_t columns, float* sums) {
  for (int64_t j = 0; j < columns; ++j) {
    double total = 0.0;
    for (int64_t run = 0; run < runs; ++run) total += partial[run * stride + j];
    sums[j] = float(total);
  }
}

Tensor sum_runs(const Tensor& partial, const Sizes& s) {  // (runs, H, F, padded F) -> (H, F, F)
  const Tensor sums = empty_beside(partial, {s.h, s.f, s.f}, ScalarType::Float);
  const float* rows = partial.const_data_ptr<float>();
  float* out = sums.mutable_data_ptr<float>();
  const int64_t runs = partial.size(0), width = padded(s.f), stride = s.h * s.f * width;
  const int64_t rows_per_thread = kElementsPerThread / (runs * width + 1) + 1;
  torch::stable::parallel_for(0, s.h * s.f, rows_per_thread, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) add_runs(rows + row * width, runs, stride, s.f, out + row * s.f);
  });
  return sums;
}

// --- the operators ---

Sizes sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(-2), x.size(-1)}; }

Heads heads_of(const Tensor& x) {  // (B, F, N, H, d)
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

Heads part_of(const Tensor& qkv, int64_t part) {  // (B, F, N, 3, H, d)
  char* data = static_cast<char*>(qkv.data_ptr()) + part * qkv.stride(3) * static_cast<int64_t>(qkv.element_size());
  return {data, qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(4)};
}

Table table_of(const std::optional<Tensor>& table) {  // (H, F, F) or (F, d)
  if (!table) return {};
  return {table->data_ptr(), table->dim() == 3 ? table->stride(0) : 0, table->stride(-2), dtype_of(*table)};
}

using MaybeTensor = std::optional<Tensor>;

Options options_of(
    const MaybeTensor& bias, const MaybeTensor& cos, const MaybeTensor& sin, double scale, bool causal) {
  return {table_of(bias), table_of(cos), table_of(sin), float(scale), causal};
}

Tensor empty_heads(const Tensor& like, const Sizes& s) {
  return empty_beside(like, {s.b, s.f, s.n, s.h, s.d}, like.scalar_type());
}

Tensor temporal_attention(const Tensor& q, const Tensor& k, const Tensor& v, MaybeTensor bias, MaybeTensor cos,
                          MaybeTensor sin, double scale, bool causal) {
  const Sizes sizes = sizes_of(q);
  const Tensor o = empty_heads(q, sizes);
  forward({Plan(sizes, 3), dtype_of(q), options_of(bias, cos, sin, scale, causal), heads_of(q), heads_of(k),
           heads_of(v), heads_of(o)});
  return o;
}

Tensor temporal_attention_packed(const Tensor& qkv, MaybeTensor bias, MaybeTensor cos, MaybeTensor sin, double scale,
                                 bool causal) {
  const Sizes sizes = sizes_of(qkv);
  const Tensor o = empty_heads(qkv, sizes);
  forward({Plan(sizes, 3), dtype_of(qkv), options_of(bias, cos, sin, scale, causal), part_of(qkv, 0),
           part_of(qkv, 1), part_of(qkv, 2), heads_of(o)});
  return o;
}

// Runs the backward pass and returns dbias, empty where it is not asked for.
Tensor backward(Backward a, const Tensor& beside, bool bias_grad) {
  const Sizes& s = a.plan.sizes;
  if (!bias_grad) {
    for_each_task(a.plan, [&](int64_t begin, int64_t end) { backward_range(a, begin, end); });
    return empty_beside(beside, {0}, ScalarType::Float);
  }
  const Tensor partial = empty_beside(beside, {a.plan.runs, s.h, s.f, padded(s.f)}, ScalarType::Float);
  a.dbias = partial.mutable_data_ptr<float>();
  for_each_task(a.plan, [&](int64_t begin, int64_t end) { backward_range(a, begin, end); });
  return sum_runs(partial, s);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> temporal_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, MaybeTensor bias, MaybeTensor cos,
    MaybeTensor sin, double scale, bool causal, bool bias_grad) {
  const Sizes sizes = sizes_of(q);
  const Tensor dq = empty_heads(q, sizes), dk = empty_heads(q, sizes), dv = empty_heads(q, sizes);
  const Tensor dbias = backward({Plan(sizes, 5), dtype_of(q), options_of(bias, cos, sin, scale, causal),
                                 heads_of(grad), heads_of(q), heads_of(k), heads_of(v), heads_of(dq), heads_of(dk),
                                 heads_of(dv), nullptr}, q, bias_grad);
  return {dq, dk, dv, dbias};
}

std::tuple<Tensor, Tensor> temporal_attention_packed_backward(
    const Tensor& grad, const Tensor& qkv, MaybeTensor bias, MaybeTensor cos, MaybeTensor sin, double scale,
    bool causal, bool bias_grad) {
  const Sizes sizes = sizes_of(qkv);
  const Tensor dqkv = empty_beside(qkv, {sizes.b, sizes.f, sizes.n, 3, sizes.h, sizes.d}, qkv.scalar_type());
  const Tensor dbias = backward({Plan(sizes, 5), dtype_of(qkv), options_of(bias, cos, sin, scale, causal),
                                 heads_of(grad), part_of(qkv, 0), part_of(qkv, 1), part_of(qkv, 2), part_of(dqkv, 0),
                                 part_of(dqkv, 1), part_of(dqkv, 2), nullptr}, qkv, bias_grad);
  return {dqkv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) { define_temporal_attention(m); }

STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) {
  m.impl("temporal_attention", TORCH_BOX(&temporal_attention));
  m.impl("temporal_attention_backward", TORCH_BOX(&temporal_attention_backward));
  m.impl("temporal_attention_packed", TORCH_BOX(&temporal_attention_packed));
  m.impl("temporal_attention_packed_backward", TORCH_BOX(&temporal_attention_packed_backward));
}

}  // namespace vidkern::cpu

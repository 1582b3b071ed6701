// AdamW with a moving average on the CPU, one pass: a thread takes a stretch of the elements of all parameters.
#include <algorithm>

#include <torch/csrc/stable/macros.h>

#include "common/optimizer.h"
#include "cpu/vec.h"

namespace vidkern::cpu {
namespace {

using optimizer::Lists;
using optimizer::Settings;
using optimizer::Update;

constexpr int64_t kStretch = 16384;  // elements that a thread takes at a time
constexpr int64_t kRow = 512;        // of them at once as floats, in the first cache

struct Arrays {  // of one parameter
  void *p, *m, *v, *average;
  const void* g;
  int64_t count, first_stretch;
  Update update;
};

struct Work {
  std::vector<Arrays> arrays;
  int64_t stretches;
};

Work work_of(const Lists& lists, const Settings& settings) {
  Work work = {};
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const int64_t count = lists.params[i].numel();
    if (count == 0) continue;
    work.arrays.push_back({lists.params[i].data_ptr(), lists.means[i].data_ptr(), lists.squares[i].data_ptr(),
                           lists.averages.empty() ? nullptr : lists.averages[i].data_ptr(), lists.grads[i].data_ptr(),
                           count, work.stretches,
                           optimizer::update_of(settings, *lists.steps[i].const_data_ptr<float>())});
    work.stretches += (count + kStretch - 1) / kStretch;
  }
  return work;
}

VIDKERN_INLINE void move_row(const Update& u, float* __restrict p, const float* __restrict g, float* __restrict m,
                             float* __restrict v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const optimizer::Moments next = optimizer::moved(u, p[i], g[i], m[i], v[i]);
    p[i] = next.p, m[i] = next.m, v[i] = next.v;
  }
}

VIDKERN_INLINE void average_row(
    const Update& u, const float* __restrict p, float* __restrict average, int64_t count) {
  for (int64_t i = 0; i < count; ++i) average[i] = optimizer::averaged(u, average[i], p[i]);
}

// A row of an array as floats: where it lies, or widened into a buffer and rounded back by `put`.
template <typename T>
struct Row {
  float values[kRow + kLanes];

  VIDKERN_INLINE float* get(const void* array, int64_t first, int64_t count) {
    const T* from = static_cast<const T*>(array) + first;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(values + i, load(from + i));
    T rest[kLanes] = {};
    std::copy_n(from + i, count - i, rest);
    store(values + i, load(rest));
    return values;
  }

  VIDKERN_INLINE void put(void* array, int64_t first, int64_t count) {
    T* to = static_cast<T*>(array) + first;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(values + i));
    T rest[kLanes];
    store(rest, load(values + i));
    std::copy_n(rest, count - i, to + i);
  }
};

template <>
struct Row<float> {
  VIDKERN_INLINE float* get(const void* array, int64_t first, int64_t) {
    return static_cast<float*>(const_cast<void*>(array)) + first;
  }
  VIDKERN_INLINE void put(void*, int64_t, int64_t) {}
};

template <typename T, typename A>
VIDKERN_INLINE void move_stretch(const Arrays& a, int64_t first, int64_t last) {
  const Update update = a.update;
  for (; first < last; first += kRow) {
    const int64_t count = std::min(kRow, last - first);
    Row<T> p_row, g_row, m_row, v_row;
    float *p = p_row.get(a.p, first, count), *m = m_row.get(a.m, first, count), *v = v_row.get(a.v, first, count);
    move_row(update, p, g_row.get(a.g, first, count), m, v, count);
    p_row.put(a.p, first, count), m_row.put(a.m, first, count), v_row.put(a.v, first, count);
    if (a.average == nullptr) continue;
    Row<A> average_row_;
    float* average = average_row_.get(a.average, first, count);
    average_row(update, p_row.get(a.p, first, count), average, count);  // of the weights as they were rounded
    average_row_.put(a.average, first, count);
  }
}

template <typename T, typename A>
VIDKERN_CLONES void move_stretches(const Work& work, int64_t begin, int64_t end) {
  for (int64_t stretch = begin; stretch < end; ++stretch) {
    size_t low = 0, high = work.arrays.size();  // the last array that begins at or before the stretch
    while (high - low > 1) {
      const size_t middle = (low + high) / 2;
      (work.arrays[middle].first_stretch <= stretch ? low : high) = middle;
    }
    const Arrays& arrays = work.arrays[low];
    const int64_t first = (stretch - arrays.first_stretch) * kStretch;
    move_stretch<T, A>(arrays, first, std::min(first + kStretch, arrays.count));
  }
}

struct Cpu {
  static void step(const Lists& lists, const Settings& settings) {
    const Work work = work_of(lists, settings);
    optimizer::with_types<bfloat16, float16>(lists, [&]<typename T, typename A>(T, A) {
      torch::stable::parallel_for(
          0, work.stretches, 2, [&](int64_t begin, int64_t end) { move_stretches<T, A>(work, begin, end); });
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) { optimizer::Operator<Cpu>::define(m); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) { optimizer::Operator<Cpu>::implement(m); }

}  // namespace vidkern::cpu

// AdamW with a moving average on CUDA: one launch for hundreds of parameters, whose pointers are the kernel's argument.
#include "common/device.h"
#include "common/launch.h"
#include "common/optimizer.h"

namespace vidkern::cuda {
namespace {

using optimizer::Lists;
using optimizer::Settings;
using optimizer::Update;

constexpr int kThreads = 128;
constexpr int64_t kChunk = 8 * kThreads * kPack;  // elements of a block

// A kernel of CUDA 12.1 and later takes 32764 bytes of arguments, before that 4096.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kMaxArrays = 56;
#else
constexpr int kMaxArrays = 384;
#endif

struct Arrays {  // of one parameter
  void *p, *m, *v, *average;
  const void* g;
  const float* step;
  int64_t count;
  int first_block;
  bool aligned;  // every array to 16 bytes
};

struct Arguments {
  Settings settings;
  int count;
  Arrays arrays[kMaxArrays];
};

template <typename T>
__device__ inline void load(const void* array, int64_t first, int count, bool wide, float (&v)[kPack]) {
  const T* from = static_cast<const T*>(array) + first;
  if (wide) return Pack<T>::aligned(from).widen(v);
  T values[kPack] = {};
  for_each([&](int i) {
    if (i < count) values[i] = from[i];
  });
  Pack<T>::unaligned(values).widen(v);
}

template <typename T>
__device__ inline void store(void* array, int64_t first, int count, bool wide, const float (&v)[kPack]) {
  T* to = static_cast<T*>(array) + first;
  const Pack<T> pack = Pack<T>::round(v);
  if (wide) return pack.store(to);
  T values[kPack];
  memcpy(values, &pack, sizeof(values));
  for_each([&](int i) {
    if (i < count) to[i] = values[i];
  });
}

__device__ inline int array_of_block(const Arguments& a, int block) {  // the last that begins at or before it
  int low = 0, high = a.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.arrays[middle].first_block <= block ? low : high) = middle;
  }
  return low;
}

template <typename T, typename A>
__global__ void __launch_bounds__(kThreads) adamw_ema_kernel(const __grid_constant__ Arguments a) {
  __shared__ Shared<Update, 1> shared;
  const Arrays arrays = a.arrays[array_of_block(a, static_cast<int>(blockIdx.x))];
  if (threadIdx.x == 0) shared[0] = optimizer::update_of(a.settings, *arrays.step);
  __syncthreads();
  const Update update = shared[0];
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - arrays.first_block) * kChunk;
  const int64_t end = begin + kChunk < arrays.count ? begin + kChunk : arrays.count;
  for (int64_t first = begin + threadIdx.x * kPack; first < end; first += kThreads * kPack) {
    const int count = end - first < kPack ? static_cast<int>(end - first) : kPack;
    const bool wide = arrays.aligned && count == kPack, averages = arrays.average != nullptr;
    float p[kPack], g[kPack], m[kPack], v[kPack], average[kPack];
    load<T>(arrays.p, first, count, wide, p);
    load<T>(arrays.g, first, count, wide, g);
    load<T>(arrays.m, first, count, wide, m);
    load<T>(arrays.v, first, count, wide, v);
    if (averages) load<A>(arrays.average, first, count, wide, average);
    for_each([&](int i) {
      const optimizer::Moments next = optimizer::moved(update, p[i], g[i], m[i], v[i]);
      p[i] = next.p, m[i] = next.m, v[i] = next.v;
    });
    store<T>(arrays.p, first, count, wide, p);
    store<T>(arrays.m, first, count, wide, m);
    store<T>(arrays.v, first, count, wide, v);
    if (!averages) continue;
    Pack<T>::round(p).widen(p);  // the average is of the weights as they were rounded
    for_each([&](int i) { average[i] = optimizer::averaged(update, average[i], p[i]); });
    store<A>(arrays.average, first, count, wide, average);
  }
}

bool aligned(const Arrays& arrays) {
  const auto lies = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return lies(arrays.p) && lies(arrays.g) && lies(arrays.m) && lies(arrays.v) && lies(arrays.average);
}

Arrays arrays_of(const Lists& lists, size_t i) {
  Arrays arrays = {};
  arrays.p = lists.params[i].data_ptr(), arrays.g = lists.grads[i].data_ptr();
  arrays.m = lists.means[i].data_ptr(), arrays.v = lists.squares[i].data_ptr();
  if (!lists.averages.empty()) arrays.average = lists.averages[i].data_ptr();
  arrays.step = lists.steps[i].const_data_ptr<float>();
  arrays.count = lists.params[i].numel();
  arrays.aligned = aligned(arrays);
  return arrays;
}

template <typename T, typename A>
void run(const Lists& lists, const Settings& settings) {
  Arguments arguments = {};
  arguments.settings = settings;
  int64_t blocks = 0;
  for (size_t i = 0; i < lists.params.size(); ++i) {
    Arrays arrays = arrays_of(lists, i);
    if (arrays.count > 0) {
      arrays.first_block = static_cast<int>(blocks);
      arguments.arrays[arguments.count++] = arrays;
      blocks += (arrays.count + kChunk - 1) / kChunk;
    }
    if (arguments.count == kMaxArrays || (i + 1 == lists.params.size() && arguments.count > 0)) {
      launch(lists.params[0], adamw_ema_kernel<T, A>, blocks, kThreads, arguments);
      arguments.count = 0, blocks = 0;
    }
  }
}

struct Cuda {
  static void step(const Lists& lists, const Settings& settings) {
    optimizer::with_types<__nv_bfloat16, __half>(
        lists, [&]<typename T, typename A>(T, A) { run<T, A>(lists, settings); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) { optimizer::Operator<Cuda>::define(m); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) { optimizer::Operator<Cuda>::implement(m); }

}  // namespace vidkern::cuda

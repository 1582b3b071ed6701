// One warp multiplies two matrices by csrc/common/mma.h: a (16, K) times the transpose of b (8, K), K = 16 or 8.
#include "common/device.h"
#include "common/launch.h"
#include "common/mma.h"

namespace vidkern::cuda {
namespace {

template <typename T>
struct Product {
  const T *a, *b;
  float* c;
  int k;
  bool twice_turned, lane_leaves;
};

template <typename T>
__global__ void product_kernel(const Product<T> p) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  if (p.lane_leaves && threadIdx.x == 9) return;
  const auto word = [&](const T* rows, int row, int column) {
    const auto* words = reinterpret_cast<const uint32_t*>(rows + row * p.k + column);
    return p.twice_turned ? transpose(transpose(words[0])) : words[0];
  };
  float c[4] = {};
  if (p.k == 16) {
    const uint32_t a[4] = {word(p.a, g, 2 * t), word(p.a, g + 8, 2 * t), word(p.a, g, 2 * t + 8),
                           word(p.a, g + 8, 2 * t + 8)};
    mma_k16<T>(c, a, word(p.b, g, 2 * t), word(p.b, g, 2 * t + 8));
  } else {
    mma_k8<T>(c, word(p.a, g, 2 * t), word(p.a, g + 8, 2 * t), word(p.b, g, 2 * t));
  }
  for (int i = 0; i < 4; ++i) p.c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

template <typename T>
void run(const Tensor& a, const Tensor& b, const Tensor& c, bool twice_turned, bool lane_leaves) {
  const Product<T> product = {static_cast<const T*>(a.data_ptr()), static_cast<const T*>(b.data_ptr()),
                              c.mutable_data_ptr<float>(), static_cast<int>(a.size(1)), twice_turned, lane_leaves};
  launch(a, product_kernel<T>, 1, kWarp, product);
}

Tensor product(const Tensor& a, const Tensor& b, bool twice_turned, bool lane_leaves) {
  const Tensor c = empty_beside(a, {16, 8}, ScalarType::Float);
  if (dtype_of(a) == Dtype::float16) {
    run<__half>(a, b, c, twice_turned, lane_leaves);
  } else {
    run<__nv_bfloat16>(a, b, c, twice_turned, lane_leaves);
  }
  return c;
}

__global__ void turn_kernel(const uint32_t* x, uint32_t* out) { out[threadIdx.x] = transpose(x[threadIdx.x]); }

Tensor turn(const Tensor& x) {  // (8, 8), 16-bit
  const Tensor out = empty_beside(x, {8, 8}, x.scalar_type());
  launch(x, turn_kernel, 1, kWarp, static_cast<const uint32_t*>(x.data_ptr()), static_cast<uint32_t*>(out.data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) {
  m.def("product(Tensor a, Tensor b, bool twice_turned, bool lane_leaves) -> Tensor");
  m.def("turn(Tensor x) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) {
  m.impl("product", TORCH_BOX(&product));
  m.impl("turn", TORCH_BOX(&turn));
}

}  // namespace vidkern::cuda

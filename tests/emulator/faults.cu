// One small kernel with each of the faults that the emulator must catch: it reverses the rows of a block's tokens.
#include "common/device.h"
#include "common/launch.h"

namespace vidkern::cuda {
namespace {

constexpr int kThreads = 64;

enum Fault {
  kNone,
  kMissingBarrier,
  kOutOfBounds,
  kUnwrittenOutput,
  kLaneOutsideMask,
  kSourceOutsideMask,
  kLaneThatNeverComes,
  kBarrierNotReached,
  kReadBeforeWrite,
  kOverwriteAfterRead,
  kMisaligned,
  kTooManyThreads,
};

// out[i] = x[63 - i], through shared memory, plus the sum of a warp's lane numbers, through shuffles.
__global__ void reverse_kernel(const float* x, float* out, int fault) {
  __shared__ Shared<float, kThreads> values;
  const int i = threadIdx.x, lane = i % kWarp;
  if (!(fault == kReadBeforeWrite && i == 0)) values[i] = x[i];
  if (fault == kBarrierNotReached && i == 5) return;
  if (fault != kMissingBarrier) __syncthreads();
  float reversed = values[fault == kOutOfBounds ? kThreads - i : kThreads - 1 - i];
  if (fault == kOverwriteAfterRead && i > 0) values[kThreads - i] = 0.0f;

  unsigned mask = 0xffffffffu;
  if (fault == kLaneOutsideMask) mask = 0xfffffffeu;
  if (fault == kSourceOutsideMask) mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  float total = static_cast<float>(lane);
  for (int width = kWarp / 2; width > 0; width /= 2) {
    if (fault == kLaneThatNeverComes && lane == 7) break;
    total += __shfl_xor_sync(mask, total, width);
  }
  if (fault == kUnwrittenOutput && i == 9) return;
  if (fault == kMisaligned && i == 3) total += Pack<float>::aligned(x + 1).low.x;
  out[i] = reversed + total;
}

Tensor reverse(const Tensor& x, int64_t fault) {
  const Tensor out = empty_beside(x, {x.size(0)}, ScalarType::Float);
  launch(x, reverse_kernel, 1, fault == kTooManyThreads ? 2048 : kThreads, x.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
         static_cast<int>(fault));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) { m.def("reverse(Tensor x, int fault) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, VIDKERN_CUDA_KEY, m) { m.impl("reverse", TORCH_BOX(&reverse)); }

}  // namespace vidkern::cuda

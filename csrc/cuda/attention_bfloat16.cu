// Temporal attention on CUDA: its kernels for bfloat16.
#include "cuda/attention_kernels.h"

namespace vidkern::cuda {

template void launch_forward<__nv_bfloat16>(const Tensor&, const Forward&);
template void launch_backward<__nv_bfloat16>(const Tensor&, const Backward&);

}  // namespace vidkern::cuda

// Temporal attention on CUDA: its kernels for float32.
#include "cuda/attention_kernels.h"

namespace vidkern::cuda {

template void launch_forward<float>(const Tensor&, const Forward&);
template void launch_backward<float>(const Tensor&, const Backward&);

}  // namespace vidkern::cuda

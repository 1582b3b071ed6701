// Temporal attention on CUDA: its kernels for float16.
#include "cuda/attention_kernels.h"

namespace vidkern::cuda {

template void launch_forward<__half>(const Tensor&, const Forward&);
template void launch_backward<__half>(const Tensor&, const Backward&);

}  // namespace vidkern::cuda

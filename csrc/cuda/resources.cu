// Asks CUDA what each launched kernel needs: in this library, whose CUDA runtime knows the kernels.
#include "common/resources.h"

#include <cuda_runtime.h>

namespace vidkern::cuda {

extern "C" __attribute__((visibility("default"))) const char* vidkern_report_launches(
    void (*add)(void* list, const KernelResources&), void* list) {
  const std::lock_guard lock(launches.mutex);
  for (const auto& [kernel, threads] : launches.seen) {
    cudaFuncAttributes attributes = {};
    const char* name = nullptr;
    int blocks = 0;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) error = cudaFuncGetName(&name, kernel);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    add(list, {name, threads, attributes.numRegs, static_cast<int>(attributes.sharedSizeBytes),
               static_cast<int>(attributes.localSizeBytes), blocks});
  }
  return nullptr;
}

}  // namespace vidkern::cuda

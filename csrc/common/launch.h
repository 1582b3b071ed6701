// Launches a kernel on the device and the current stream of a tensor.
#pragma once

#include <string>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/resources.h"
#include "common/tensor.h"

#ifndef VIDKERN_CUDA_KEY  // the emulator serves CPU tensors
#define VIDKERN_CUDA_KEY CUDA
#endif

namespace vidkern::cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;

template <typename... Parameters, typename... Arguments>
void launch(const Tensor& on, void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "the tensors need ", blocks, " blocks; a launch takes at most ", kMaxBlocks);
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  note_launch(kernel, threads);
}

}  // namespace vidkern::cuda

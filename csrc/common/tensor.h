// Tensors of the video layout as kernels see them, and what every launcher needs of PyTorch's stable ABI.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/layout.h"

namespace vidkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16");
  }
}

inline Shape shape_of(const Tensor& tokens) {  // (B, F, N, D)
  return {tokens.size(0), tokens.size(1), tokens.size(2), tokens.size(3)};
}

// Whether every row, along the last dimension, starts at a multiple of 16 bytes.
inline bool rows_aligned(const Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) aligned = aligned && tensor.stride(dim) * bytes % 16 == 0;
  return aligned;
}

inline Tokens tokens_of(const Tensor& tensor) {  // (B, F, N, D), any strides but the last
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), rows_aligned(tensor)};
}

inline FrameVector vector_of(const Tensor& tensor) {  // (B, F, D), any strides but the last
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor), rows_aligned(tensor)};
}

// An uninitialised contiguous tensor on the device of another. Not new_empty, which looks its operator up by name.
inline Tensor empty_beside(const Tensor& other, std::initializer_list<int64_t> size, ScalarType dtype) {
  constexpr size_t kMaxDims = 8;
  STD_TORCH_CHECK(size.size() <= kMaxDims, "at most ", kMaxDims, " dimensions");
  int64_t strides[kMaxDims], stride = 1;
  for (size_t dim = size.size(); dim-- > 0; stride *= std::max<int64_t>(size.begin()[dim], 1)) strides[dim] = stride;
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(other.get(), &device_index));
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(size.size()), size.begin(), strides, dtype_code, device_type, device_index, &made));
  const Tensor tensor(made);
#ifdef VIDKERN_EMULATOR  // NaN in every dtype, where a kernel leaves an element unwritten
  if (tensor.numel() > 0) std::memset(tensor.data_ptr(), 0xff, tensor.numel() * tensor.element_size());
#endif
  return tensor;
}

inline Tensor empty_tokens(const Tensor& tokens) {
  return empty_beside(tokens, {tokens.size(0), tokens.size(1), tokens.size(2), tokens.size(3)}, tokens.scalar_type());
}

inline Tensor empty_statistics(const Tensor& tokens) {  // float32 (B, F, N)
  return empty_beside(tokens, {tokens.size(0), tokens.size(1), tokens.size(2)}, ScalarType::Float);
}

}  // namespace vidkern

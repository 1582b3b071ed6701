// Stands in for NVIDIA's header: float16 as kernels use it.
#pragma once

#include "cuda_runtime.h"

using __half = _Float16;
struct __half2 {
  __half x, y;
};

inline float __half2float(__half v) { return static_cast<float>(v); }
inline float2 __half22float2(__half2 v) { return {static_cast<float>(v.x), static_cast<float>(v.y)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {static_cast<__half>(a), static_cast<__half>(b)}; }

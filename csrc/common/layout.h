// The video layout on host and device: tokens (B, F, N, D), per-frame vectors (B, F, D), runs of a frame's tokens.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VIDKERN_HOST_DEVICE __host__ __device__
#else
#define VIDKERN_HOST_DEVICE
#endif

namespace vidkern {

enum class Dtype { float32, bfloat16, float16 };

struct Shape {
  int64_t b, f, n, d;
};

// Elements from the start to token (b, f, n) or to vector (b, f); stride 0 where a vector is expanded.
struct Tokens {
  void* data;
  int64_t stride_b, stride_f, stride_n;
  bool aligned;  // every row starts at a multiple of 16 bytes

  VIDKERN_HOST_DEVICE int64_t offset(int64_t b, int64_t f, int64_t n) const {
    return b * stride_b + f * stride_f + n * stride_n;
  }
};

struct FrameVector {
  const void* data;
  int64_t stride_b, stride_f;
  Dtype dtype;
  bool aligned;

  VIDKERN_HOST_DEVICE int64_t offset(int64_t b, int64_t f) const { return b * stride_b + f * stride_f; }
};

// A run is a stretch of one frame's tokens that one block or thread takes; its vectors are loaded once, and its
// part of their gradients is one row of a (B, F, runs, D) tensor. Runs depend on the shape alone, so sums do too.
struct Run {
  int64_t b, f, first, last;  // tokens first <= n < last
};

struct Runs {
  Shape shape;
  int64_t length, per_frame;

  VIDKERN_HOST_DEVICE Runs(Shape shape, int64_t length)
      : shape(shape), length(length), per_frame((shape.n + length - 1) / length) {}

  VIDKERN_HOST_DEVICE int64_t count() const { return shape.b * shape.f * per_frame; }

  VIDKERN_HOST_DEVICE Run operator[](int64_t index) const {
    const int64_t frame = index / per_frame, first = (index % per_frame) * length;
    const int64_t last = first + length < shape.n ? first + length : shape.n;
    return {frame / shape.f, frame % shape.f, first, last};
  }
};

}  // namespace vidkern

// Temporal attention on CUDA: a call as its kernels see it.
//
// A problem is one (b, n, h): F queries and F keys of a head. Warps take a run of positions (b, n) of one head, so that
// each run leaves one row of the bias's gradient.
#pragma once

#include "common/launch.h"

namespace vidkern::cuda {

constexpr int kMaxFrames = 256;
constexpr int kTile = 16;  // frames that a warp takes at a time

struct Heads {  // (B, F, N, H, d), any strides but the last
  void* data;
  int64_t stride_b, stride_f, stride_n, stride_h;
  bool aligned;  // every row starts at a multiple of 16 bytes
};

struct Problems {
  int b, f, n, h, d;
  int run, runs;  // positions that a warp takes, and how many such runs there are
  const float *bias, *cos, *sin;  // (H, F, F), (F, d), (F, d), contiguous; null where there is none
  float scale;
  bool causal;
};

struct Forward {
  Problems problems;
  Heads q, k, v, o;
};

struct Backward {
  Problems problems;
  Heads q, k, v, grad_o, grad_q, grad_k, grad_v;
  float* grad_bias;  // (runs, H, F, F), null where it is not wanted
};

// One file for each element type has these.
template <typename T>
void launch_forward(const Tensor& on, const Forward& call);
template <typename T>
void launch_backward(const Tensor& on, const Backward& call);

}  // namespace vidkern::cuda

// Causal 3D convolution of float32 on the CPU: products of register tiles, straight from (cache, x), without a padded copy.
//
// A thread takes runs of a frame's output positions. An output element is a sum over taps and blocks of channels in one fixed order,
// whatever frames come with it, and the blocks are short: closer to the exact sum than one long chain.
#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/conv3d.h"
#include "cpu/vec.h"

#pragma GCC optimize("fp-contract=fast")  // a * b + c in one instruction where there is one

namespace vidkern::cpu {
namespace {

constexpr int64_t kTurned = 16;               // input channels whose weights are turned at a time
constexpr int64_t kChannels = 128;           // of a block: as many products are added one after another
constexpr int64_t kChannelsOfOneTap = 16;    // where a sum has no other pieces
constexpr int64_t kVecs = 3, kTileRows = 12;  // accumulators of a tile: kTileRows / vecs positions x vecs vectors
constexpr int64_t kPositions = 12;           // every tile's positions divide them
constexpr int64_t kRunLength = 120;          // positions of a frame that share a panel of the weight in the first cache

struct Triple {
  int64_t t, h, w;

  explicit Triple(const std::vector<int64_t>& v) : t(v[0]), h(v[1]), w(v[2]) {}
  int64_t product() const { return t * h * w; }
};

struct Convolution {
  Padding padding;
  Triple kernel, stride, dilation, out;
  int64_t cout;
  Video x, cache, residual, y;
  const float *packed, *bias;

  int64_t runs_per_frame() const { return (out.h * out.w + kRunLength - 1) / kRunLength; }
};

// Output channels are taken in blocks of up to kVecs vectors; f(first, vecs).
template <typename F>
VIDKERN_INLINE void for_each_block(int64_t cout, F f) {
  for (int64_t first = 0; first < cout; first += kVecs * kLanes)
    f(first, std::min(kVecs, (cout - first + kLanes - 1) / kLanes));
}

// (Cout, Cin, taps), any strides -> for each block of output channels (taps, Cin, channels of the block), zeros beyond.
// A few input channels at a time: they are read in order, turned in the cache, and written in stretches.
std::unique_ptr<float[]> pack(const Tensor& weight, const Triple& kernel) {
  const int64_t cout = weight.size(0), cin = weight.size(1), taps = kernel.product();
  const int64_t stride_o = weight.stride(0), stride_c = weight.stride(1);
  const float* from = weight.const_data_ptr<float>();
  std::vector<int64_t> tap_offsets;
  for (int64_t i = 0; i < kernel.t; ++i)
    for (int64_t j = 0; j < kernel.h; ++j)
      for (int64_t k = 0; k < kernel.w; ++k)
        tap_offsets.push_back(i * weight.stride(2) + j * weight.stride(3) + k * weight.stride(4));
  auto packed = std::make_unique_for_overwrite<float[]>((cout + kLanes) * cin * taps);
  const auto turn = [&](int64_t first, int64_t columns, int64_t channel, int64_t count, float* turned) {
    for (int64_t o = 0; o < std::min(columns, cout - first); ++o)
      for (int64_t c = 0; c < count; ++c) {
        const float* source = from + (first + o) * stride_o + (channel + c) * stride_c;
        float* to = turned + c * columns + o;
        for (int64_t tap = 0; tap < taps; ++tap) to[tap * kTurned * columns] = source[tap_offsets[tap]];
      }
  };
  torch::stable::parallel_for(0, (cin + kTurned - 1) / kTurned, 1, [&](int64_t begin, int64_t end) {
    for_each_block(cout, [&](int64_t first, int64_t vecs) {
      const int64_t columns = vecs * kLanes;
      std::vector<float> turned(taps * kTurned * columns);
      for (int64_t channel = begin * kTurned; channel < std::min(end * kTurned, cin); channel += kTurned) {
        const int64_t count = std::min(kTurned, cin - channel);
        turn(first, columns, channel, count, turned.data());
        for (int64_t tap = 0; tap < taps; ++tap)
          std::copy_n(turned.data() + tap * kTurned * columns, count * columns,
                      packed.get() + first * taps * cin + (tap * cin + channel) * columns);
      }
    });
  });
  return packed;
}

// sums (positions x vecs * 8) += inputs (positions x count) panel (count x vecs * 8)
template <int vecs>
VIDKERN_INLINE void add_tile(const float* const* inputs, int64_t channel, const float* panel, int64_t count, float* sums) {
  constexpr int positions = kTileRows / vecs;
  Vec tile[positions][vecs] = {};
  for (int64_t c = 0; c < count; ++c) {
    Vec row[vecs];
    for (int j = 0; j < vecs; ++j) row[j] = load(panel + (c * vecs + j) * kLanes);
    for (int i = 0; i < positions; ++i) {
      const float input = inputs[i][channel + c];
      for (int j = 0; j < vecs; ++j) tile[i][j] += input * row[j];
    }
  }
  for (int i = 0; i < positions; ++i)
    for (int j = 0; j < vecs; ++j) {
      float* sum = sums + (i * vecs + j) * kLanes;
      store(sum, load(sum) + tile[i][j]);
    }
}

// Output positions first <= n < last of frame t, row after row.
struct Run {
  int64_t b, t, first, last;

  int64_t width() const { return (last - first + kPositions - 1) / kPositions * kPositions; }  // of whole tiles
};

// Where each tap of each position of a run is read: (taps, width).
void find_inputs(const Convolution& a, const Run& run, const float* zeros, std::vector<const float*>& inputs) {
  const Padding& p = a.padding;
  size_t next = 0;
  for (int64_t i = 0; i < a.kernel.t; ++i)
    for (int64_t j = 0; j < a.kernel.h; ++j)
      for (int64_t k = 0; k < a.kernel.w; ++k) {
        const int64_t frame = p.t.source(run.t * a.stride.t + i * a.dilation.t);
        const bool cached = frame < p.cached;
        const Video& video = cached ? a.cache : a.x;
        for (int64_t n = run.first; n < run.first + run.width(); ++n) {
          const int64_t position = std::min(n, run.last - 1), h = position / a.out.w, w = position % a.out.w;
          const int64_t row = p.h.source(h * a.stride.h + j * a.dilation.h);
          const int64_t column = p.w.source(w * a.stride.w + k * a.dilation.w);
          const bool inside = frame >= 0 && row >= 0 && column >= 0;
          const auto* data = static_cast<const float*>(video.data);
          inputs[next++] = inside ? data + video.offset(run.b, cached ? frame : frame - p.cached, row, column) : zeros;
        }
      }
}

template <int vecs>
VIDKERN_INLINE void add_products(const Convolution& a, const std::vector<const float*>& inputs, int64_t width,
                                 const float* panels, float* sums) {
  const int64_t cin = a.padding.c, columns = vecs * kLanes, taps = a.kernel.product();
  const int64_t block = taps == 1 ? kChannelsOfOneTap : kChannels;
  std::fill_n(sums, width * columns, 0.0f);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t channel = 0; channel < cin; channel += block) {
      const int64_t count = std::min(block, cin - channel);
      const float* panel = panels + (tap * cin + channel) * columns;
      for (int64_t w = 0; w < width; w += kTileRows / vecs)
        add_tile<vecs>(inputs.data() + tap * width + w, channel, panel, count, sums + w * columns);
    }
}

// Rounds a block of output channels of a run: sums + bias + residual.
VIDKERN_INLINE void finish(const Convolution& a, const Run& run, int64_t first, int64_t vecs, const float* sums) {
  const int64_t columns = vecs * kLanes, count = std::min(columns, a.cout - first);
  const auto* residual = static_cast<const float*>(a.residual.data);
  for (int64_t n = run.first; n < run.last; ++n, sums += columns) {
    const int64_t h = n / a.out.w, w = n % a.out.w;
    float* y = static_cast<float*>(a.y.data) + a.y.offset(run.b, run.t, h, w) + first;
    const float* added = residual == nullptr ? nullptr : residual + a.residual.offset(run.b, run.t, h, w) + first;
    for (int64_t o = 0; o < count; ++o) {
      const float sum = a.bias == nullptr ? sums[o] : sums[o] + a.bias[first + o];
      y[o] = added == nullptr ? sum : sum + added[o];
    }
  }
}

VIDKERN_CLONES void convolve_runs(const Convolution& a, int64_t begin, int64_t end) {
  const int64_t taps = a.kernel.product(), positions = a.out.h * a.out.w, runs = a.runs_per_frame();
  const Scratch scratch(kRunLength, kVecs * kLanes);
  float* const sums = scratch.row(0);
  const std::vector<float> zeros(a.padding.c);
  std::vector<const float*> inputs(taps * kRunLength);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index % runs * kRunLength, frame = index / runs;
    const Run run{frame / a.out.t, frame % a.out.t, first, std::min(first + kRunLength, positions)};
    find_inputs(a, run, zeros.data(), inputs);
    for_each_block(a.cout, [&](int64_t channel, int64_t vecs) VIDKERN_INLINE_LAMBDA {
      const float* panels = a.packed + channel * taps * a.padding.c;
      if (vecs == 3) add_products<3>(a, inputs, run.width(), panels, sums);
      else if (vecs == 2) add_products<2>(a, inputs, run.width(), panels, sums);
      else add_products<1>(a, inputs, run.width(), panels, sums);
      finish(a, run, channel, vecs, sums);
    });
  }
}

Tensor causal_conv3d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> cache,
                     std::optional<Tensor> residual, std::vector<int64_t> stride, std::vector<int64_t> dilation,
                     std::string time_pad, std::string space_pad) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32");
  const std::vector<int64_t> kernel{weight.size(2), weight.size(3), weight.size(4)};
  const Padding p = padding_of(x, cache, kernel, dilation, time_pad, space_pad);
  const auto outputs = [&](const Axis& axis, int i) {
    return std::max<int64_t>(0, (axis.padded() - (kernel[i] - 1) * dilation[i] - 1) / stride[i] + 1);
  };
  const std::vector<int64_t> out{outputs(p.t, 0), outputs(p.h, 1), outputs(p.w, 2)};
  const Tensor y = empty_video(x, p.b, weight.size(0), out[0], out[1], out[2]);
  const Triple sizes(kernel);
  const auto packed = pack(weight, sizes);
  const Convolution a{
      .padding = p, .kernel = sizes, .stride = Triple(stride), .dilation = Triple(dilation), .out = Triple(out),
      .cout = weight.size(0), .x = video_of(x), .cache = cache ? video_of(*cache) : Video{},
      .residual = residual ? video_of(*residual) : Video{}, .y = video_of(y), .packed = packed.get(),
      .bias = bias ? bias->const_data_ptr<float>() : nullptr};
  torch::stable::parallel_for(0, p.b * out[0] * a.runs_per_frame(), 1,
                              [&](int64_t begin, int64_t end) { convolve_runs(a, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cpu, m) {
  m.def("causal_conv3d(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, Tensor? residual, int[] stride,"
        " int[] dilation, str time_pad, str space_pad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vidkern_cpu, CPU, m) { m.impl("causal_conv3d", TORCH_BOX(&causal_conv3d)); }

}  // namespace vidkern::cpu

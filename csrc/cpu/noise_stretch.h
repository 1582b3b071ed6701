// What the noise and sampling kernels share: stretches of a clip as rows of floats, and the noise that meets them.
//
// A thread takes a stretch of a sample's elements through all frames, so that noise which frames share is drawn once.
#pragma once

#include <algorithm>

#include "common/noise.h"

namespace vidkern::cpu {

constexpr int64_t kStretch = 1024;            // elements: a few rows of floats in the first cache
constexpr int64_t kElementsPerThread = 8192;  // below this a second thread costs more than it brings

// Elements first <= e < first + count of every frame of sample b.
struct Stretch {
  int64_t b, first, count;
};

struct Stretches {
  Frames frames;
  int64_t per_sample;

  explicit Stretches(const Frames& frames)
      : frames(frames), per_sample((frames.elements + kStretch - 1) / kStretch) {}

  Stretch operator[](int64_t index) const {
    const int64_t first = index % per_sample * kStretch;
    return {index / per_sample, first, std::min(kStretch, frames.elements - first)};
  }
};

template <typename F>
void for_each_stretch(const Stretches& stretches, F f) {
  const int64_t elements = kStretch * stretches.frames.f;
  const int64_t count = elements == 0 ? 0 : stretches.frames.b * stretches.per_sample;
  torch::stable::parallel_for(0, count, (kElementsPerThread + elements - 1) / std::max<int64_t>(elements, 1),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t index = begin; index < end; ++index) f(stretches[index]);
                              });
}

struct alignas(64) Row {
  float values[kStretch];
};

// The noise of a stretch, frame after frame. Source: Noise or StepNoise.
template <typename Source>
class StretchNoise {
 public:
  StretchNoise(const Source& noise, const Stretch& stretch)
      : noise_(noise), stretch_(stretch), key_(noise.key()) {
    if (noise.draws_base()) draw_row(noise.base_stream(stretch.b), 0, base_);
  }

  const float* frame(int64_t f);

 private:
  void draw_row(uint32_t stream, int64_t f, Row& row) const;

  const Source& noise_;
  Stretch stretch_;
  philox::Key key_;
  Row base_, own_;
};

// Returns the stretch of frame f as floats: in `row`, or where it lies.
const float* read(const Clip& clip, const Stretch& stretch, int64_t f, Row& row);

// Where the stretch of frame f of a contiguous clip can be computed: where it lies if it is floats, else in `row`.
float* place(const Clip& clip, const Stretch& stretch, int64_t f, Row& row);

// Rounds a row, or what is in its place already, into the stretch of frame f of a contiguous clip.
void write(const Clip& clip, const Stretch& stretch, int64_t f, const float* row);

// Puts the stretch of frame f into that of a contiguous clip of its dtype, bit for bit.
void copy(const Clip& from, const Clip& to, const Stretch& stretch, int64_t f);

}  // namespace vidkern::cpu

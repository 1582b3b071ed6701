// What temporal attention is in every compiled library.
#pragma once

namespace vidkern {

// The operators' schemas, the same in every compiled library.
template <typename Library>
void define_temporal_attention(Library& m) {
  m.def("temporal_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cos, Tensor? sin, float scale,"
        " bool causal) -> Tensor");
  m.def("temporal_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cos, Tensor? sin,"
        " float scale, bool causal, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("temporal_attention_packed(Tensor qkv, Tensor? bias, Tensor? cos, Tensor? sin, float scale, bool causal)"
        " -> Tensor");
  m.def("temporal_attention_packed_backward(Tensor do, Tensor qkv, Tensor? bias, Tensor? cos, Tensor? sin,"
        " float scale, bool causal, bool bias_grad) -> (Tensor, Tensor)");
}

}  // namespace vidkern

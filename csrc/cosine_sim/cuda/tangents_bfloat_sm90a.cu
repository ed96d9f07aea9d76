#include "cosine_sim/cuda/tangents.cuh"

namespace attn::cuda::cosine {

template <>
void tangents<BFloat>(const TangentCall& call) {
  choose_tangents<BFloat>(call);
}

}  // namespace attn::cuda::cosine

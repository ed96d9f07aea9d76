#include "cosine_sim/cuda/forward.cuh"

namespace attn::cuda::cosine {

template <>
void forward<BFloat>(const ForwardCall& call) {
  choose_forward<BFloat>(call);
}

}  // namespace attn::cuda::cosine

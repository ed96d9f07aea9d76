#include "cosine_sim/cuda/backward.cuh"

namespace attn::cuda::cosine {

template <>
void backward<BFloat>(const BackwardCall& call) {
  choose_backward<BFloat>(call);
}

}  // namespace attn::cuda::cosine

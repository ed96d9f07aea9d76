#include "cosine_sim/cuda/backward.cuh"

namespace attn::cuda::cosine {

template <>
void backward<Half>(const BackwardCall& call) {
  choose_backward<Half>(call);
}

}  // namespace attn::cuda::cosine

#include "cosine_sim/cuda/forward.cuh"

namespace attn::cuda::cosine {

template <>
void forward<Half>(const ForwardCall& call) {
  choose_forward<Half>(call);
}

}  // namespace attn::cuda::cosine

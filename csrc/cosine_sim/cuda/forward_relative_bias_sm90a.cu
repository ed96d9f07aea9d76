#include "cosine_sim/cuda/forward.cuh"

namespace attn::cuda::cosine {

void forward_with_bias(const ForwardCall& call) {
  if (call.query.size(3) <= 64) {
    launch_forward<Plan<BFloat, 64, 3, 2, true, true, false, true>>(call);
  } else {
    launch_forward<Plan<BFloat, 128, 2, 1, true, true, true, true>>(call);
  }
}

}  // namespace attn::cuda::cosine

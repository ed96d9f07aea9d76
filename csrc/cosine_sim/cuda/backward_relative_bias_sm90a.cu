#include "cosine_sim/cuda/backward.cuh"

namespace attn::cuda::cosine {

void backward_with_bias(const BackwardCall& call) {
  if (call.query.size(3) <= 64) {
    launch_backward<BackwardPlan<BFloat, 64, true>>(call);
  } else {
    launch_backward<BackwardPlan<BFloat, 128, true>>(call);
  }
}

}  // namespace attn::cuda::cosine

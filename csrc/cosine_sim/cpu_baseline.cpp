#define ATTN_ISA_LEVEL 0
#include "cosine_sim/kernels.h"

namespace attn::cosine_sim {
const Kernels& baseline_kernels() {
  return baseline::kKernels;
}
}  // namespace attn::cosine_sim

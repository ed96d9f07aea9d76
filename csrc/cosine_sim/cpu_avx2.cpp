#if defined(__x86_64__)
#define ATTN_ISA_LEVEL 1
#include "cosine_sim/kernels.h"

namespace attn::cosine_sim {
const Kernels& avx2_kernels() {
  return avx2::kKernels;
}
}  // namespace attn::cosine_sim
#endif

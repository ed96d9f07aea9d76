#if defined(__x86_64__)
#define ATTN_ISA_LEVEL 2
#include "cosine_sim/kernels.h"

namespace attn::cosine_sim {
const Kernels& avx512_kernels() {
  return avx512::kKernels;
}
}  // namespace attn::cosine_sim
#endif

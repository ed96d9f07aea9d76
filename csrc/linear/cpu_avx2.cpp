#if defined(__x86_64__)
#define ATTN_ISA_LEVEL 1
#include "linear/kernels.h"

namespace attn::linear {
const Kernels& avx2_kernels() {
  return avx2::kKernels;
}
}  // namespace attn::linear
#endif

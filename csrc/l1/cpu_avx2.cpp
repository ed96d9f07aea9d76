#if defined(__x86_64__)
#define ATTN_ISA_LEVEL 1
#include "l1/kernels.h"

namespace attn::l1 {
const Kernels& avx2_kernels() {
  return avx2::kKernels;
}
}  // namespace attn::l1
#endif

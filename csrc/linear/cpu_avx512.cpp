#if defined(__x86_64__)
#define ATTN_ISA_LEVEL 2
#include "linear/kernels.h"

namespace attn::linear {
const Kernels& avx512_kernels() {
  return avx512::kKernels;
}
}  // namespace attn::linear
#endif

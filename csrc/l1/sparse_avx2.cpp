#if defined(__x86_64__)
#define ATTN_ISA_LEVEL 1
#include "l1/sparse_kernels.h"

namespace attn::l1::sparse {
const Kernels& avx2_kernels() {
  return avx2::kKernels;
}
}  // namespace attn::l1::sparse
#endif

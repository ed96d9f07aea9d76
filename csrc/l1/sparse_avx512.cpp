#if defined(__x86_64__)
#define ATTN_ISA_LEVEL 2
#include "l1/sparse_kernels.h"

namespace attn::l1::sparse {
const Kernels& avx512_kernels() {
  return avx512::kKernels;
}
}  // namespace attn::l1::sparse
#endif

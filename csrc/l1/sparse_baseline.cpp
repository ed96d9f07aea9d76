#define ATTN_ISA_LEVEL 0
#include "l1/sparse_kernels.h"

namespace attn::l1::sparse {
const Kernels& baseline_kernels() {
  return baseline::kKernels;
}
}  // namespace attn::l1::sparse

#define ATTN_ISA_LEVEL 0
#include "l1/kernels.h"

namespace attn::l1 {
const Kernels& baseline_kernels() {
  return baseline::kKernels;
}
}  // namespace attn::l1

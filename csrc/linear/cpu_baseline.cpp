#define ATTN_ISA_LEVEL 0
#include "linear/kernels.h"

namespace attn::linear {
const Kernels& baseline_kernels() {
  return baseline::kKernels;
}
}  // namespace attn::linear

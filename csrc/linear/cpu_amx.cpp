#if defined(__x86_64__)
#include <immintrin.h>

#define ATTN_ISA_LEVEL 3
#include "linear/amx_kernels.h"

namespace attn::linear {
const AmxKernels& amx_kernels() {
  return amx::kKernels;
}
}  // namespace attn::linear
#endif

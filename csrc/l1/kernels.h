// The kernels of one instruction set: cpu_<isa>.cpp defines ATTN_ISA_LEVEL and includes this.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "l1/problem.h"
#include "l1/slices.h"

#include "common/isa_begin.h"

#include "common/attention_kernels.h"

#include "l1/distance.h"

#include "l1/forward.h"

#include "l1/signs.h"

#include "l1/backward.h"

#include "l1/scores.h"

namespace attn::l1::ATTN_ISA {

constexpr Kernels kKernels{forward<float>,         forward<double>,        backward<float>,
                           backward<double>,       scores<float>,          scores<double>,
                           scores_backward<float>, scores_backward<double>};

}  // namespace attn::l1::ATTN_ISA

#include "common/isa_end.h"

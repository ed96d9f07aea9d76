// The kernels of one instruction set: cpu_<isa>.cpp defines ATTN_ISA_LEVEL and includes this.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>

#include "cosine_sim/problem.h"

#include "common/isa_begin.h"

#include "common/attention_kernels.h"

#include "cosine_sim/pack.h"

#include "cosine_sim/normalize.h"

#include "cosine_sim/few_queries.h"

#include "cosine_sim/forward.h"

#include "cosine_sim/backward.h"

#include "cosine_sim/backward_keys.h"

namespace attn::cosine_sim::ATTN_ISA {

constexpr Kernels kKernels{forward<float>,          forward<double>,
                           backward<float>,         backward<double>,
                           normalize_tensor<float>, normalize_tensor_backward<float>};

}  // namespace attn::cosine_sim::ATTN_ISA

#include "common/isa_end.h"

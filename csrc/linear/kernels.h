// The kernels of one instruction set: cpu_<isa>.cpp defines ATTN_ISA_LEVEL and includes this.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>

#include "linear/plan.h"

#include "common/isa_begin.h"

#include "common/simd.h"

#include "common/convert.h"
#include "common/tiles.h"

#include "common/rows.h"

#include "linear/features.h"

#include "linear/state.h"

#include "linear/chunk.h"

#include "linear/forward.h"

#include "linear/backward.h"

#include "linear/backward_keys.h"

#include "linear/step.h"

namespace attn::linear::ATTN_ISA {

constexpr Kernels kKernels{forward<float>,   forward<double>, backward<float>,
                           backward<double>, step<float>,     step<double>};

}  // namespace attn::linear::ATTN_ISA

#include "common/isa_end.h"

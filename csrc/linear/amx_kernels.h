// The kernels of AMX, on top of those of AVX-512 whose pieces they use.
#include <algorithm>
#include <cstdint>
#include <cstring>
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

#include "linear/amx.h"

#include "linear/amx_forward.h"

#include "linear/amx_backward.h"

#include "linear/amx_backward_keys.h"

namespace attn::linear::ATTN_ISA {

constexpr AmxKernels kKernels{half_forward, half_backward};

}  // namespace attn::linear::ATTN_ISA

#include "common/isa_end.h"

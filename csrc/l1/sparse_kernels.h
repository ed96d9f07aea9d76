// The kernels of one instruction set: sparse_<isa>.cpp defines ATTN_ISA_LEVEL and includes this.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "l1/problem.h"
#include "l1/slices.h"
#include "l1/sparse_problem.h"

#include "common/isa_begin.h"

#include "common/attention_kernels.h"

#include "l1/distance.h"

#include "l1/signs.h"

#include "l1/sparse_rows.h"

#include "l1/sparse_forward.h"

#include "l1/sparse_backward.h"

namespace attn::l1::sparse::ATTN_ISA {

constexpr Kernels kKernels{forward<float>, forward<double>, backward<float>, backward<double>};

}  // namespace attn::l1::sparse::ATTN_ISA

#include "common/isa_end.h"

// One call of attn::_cosine_sim_fwd or _bwd as the kernels see it. The law and the shapes are in
// attn_ops/cosine_sim/reference.py.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/attention.h"
#include "common/parallel.h"

namespace attn::cosine_sim {

struct Problem : AttentionProblem {
  int64_t groups;  // 0: query and key are taken as they are
  double scale;
  View head_scale;            // [H]
  View query_gain, key_gain;  // [H,D], [Hk,D]
};

struct Gradients : AttentionGradients {
  View head_scale, query_gain, key_gain;  // zeroed
};

// The kernels of one instruction set.
struct Kernels {
  void (*forward_float)(const Problem&);
  void (*forward_double)(const Problem&);
  void (*backward_float)(const Problem&, const Gradients&);
  void (*backward_double)(const Problem&, const Gradients&);
  // Rows of [B, heads, length, D] through the norm; (grad, source, ...) back through it.
  void (*normalize_float)(const Problem&, const View& source, int64_t heads, int64_t length,
                          const View& target);
  void (*normalize_backward_float)(const Problem&, const View& grad, const View& source,
                                   int64_t heads, int64_t length, const View& target);
};

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace attn::cosine_sim

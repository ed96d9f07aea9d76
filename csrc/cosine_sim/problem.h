// One call of attn::_cosine_sim_fwd or _bwd as the kernels see it. The law and the shapes are in
// attn_ops/cosine_sim/reference.py.
//
// B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width, E value width.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/view.h"
#include "common/visibility.h"

namespace attn::cosine_sim {

struct Problem {
  int64_t B, H, Hk, M, N, D, E;
  int64_t groups;  // 0: query and key are taken as they are
  double scale;
  Visibility visible;
  View query, key, value;
  View mask;                  // bool [B,H,M,N], broadcast by strides
  View bias;                  // [B,H,M,N], broadcast by strides
  View relative_bias;         // [H,M+N-1]
  View head_scale, sink;      // [H]
  View query_gain, key_gain;  // [H,D], [Hk,D]
  View out, lse;              // [B,H,M,E], [B,H,M]

  // Anything that is added to scores, -inf for what an element mask hides.
  bool has_extras() const { return mask || bias || relative_bias; }
};

// What the backward reads and writes besides. An absent gradient is not wanted.
struct Gradients {
  View grad_out, grad_lse;
  View query, key, value;
  View bias;  // compute dtype, zeroed, contiguous, stride 0 where bias is broadcast
  int64_t bias_size = 0;
  // Whether the gradient of bias is summed over a dimension.
  bool sum_over_batch = false, sum_over_heads = false, sum_over_queries = false;
  View relative_bias, head_scale, query_gain, key_gain, sink;
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

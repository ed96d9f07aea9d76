// One call of attn::_linear_fwd, _linear_bwd or _linear_step as the kernels see it. The law is in
// attn_ops/linear/reference.py, the shapes are at the top of attn_ops/linear/ops.py.
//
// B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width, F features,
// E value width.
#pragma once

#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "common/view.h"

namespace attn::linear {

enum class FeatureMap { identity, elu_plus_one, relu, softplus, taylor };

struct Problem {
  int64_t B, H, Hk, M, N, D, F, E;
  bool causal;
  bool normalized;
  double eps;
  FeatureMap feature_map;
  View query, key, value;
  View mask;            // bool [B, 1 or H, 1, N]
  View decay;           // [H]
  View state, key_sum;  // [B,H,F,E], [B,H,F]
  View offsets;         // int32 [num_sequences + 1]
  int64_t num_sequences = 0;
  View out, denominator;            // [B,H,M,E], [B,H,M]
  View final_state, final_key_sum;  // contiguous, with state only
};

// What the backward reads and writes besides. An absent gradient is not wanted.
struct Gradients {
  View grad_out, grad_final_state, grad_final_key_sum;
  View query, key, value, state, key_sum;
};

// The kernels of one instruction set.
struct Kernels {
  void (*forward_float)(const Problem&);
  void (*forward_double)(const Problem&);
  void (*backward_float)(const Problem&, const Gradients&);
  void (*backward_double)(const Problem&, const Gradients&);
  // state and key_sum are updated in place.
  void (*step_float)(const Problem&);
  void (*step_double)(const Problem&);
};

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// bfloat16 on the matrix instructions of AMX: products of 16-bit operands, sums in float32.
struct AmxKernels {
  void (*forward)(const Problem&);
  void (*backward)(const Problem&, const Gradients&);
};
const AmxKernels& amx_kernels();
#endif

}  // namespace attn::linear

// One call of attn::_l1_fwd, _l1_bwd, _l1_scores_fwd or _l1_scores_bwd as the CPU kernels see it.
// The law and the shapes are in attn_ops/l1/reference.py.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/attention.h"
#include "common/parallel.h"

namespace attn::l1 {

using Gradients = AttentionGradients;

struct Problem : AttentionProblem {
  bool inverse;  // score = 1 / (eps + scale * distance), else -scale * distance
  double scale, eps;
};

// The kernels of one instruction set. Scores are written to `out`, and their gradient is read from
// `grad_out`, both [B,H,M,N].
struct Kernels {
  void (*forward_float)(const Problem&);
  void (*forward_double)(const Problem&);
  void (*backward_float)(const Problem&, const Gradients&);
  void (*backward_double)(const Problem&, const Gradients&);
  void (*scores_float)(const Problem&);
  void (*scores_double)(const Problem&);
  void (*scores_backward_float)(const Problem&, const Gradients&);
  void (*scores_backward_double)(const Problem&, const Gradients&);
};

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace attn::l1

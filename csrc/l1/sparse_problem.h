// One call of attn::_l1_sparse_fwd or _bwd as the kernels see it. The law and the shapes are in
// attn_ops/l1/sparse_reference.py.
//
// B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width, E value width,
// L edges.
#pragma once

#include "common/parallel.h"
#include "common/view.h"

namespace attn::l1::sparse {

// The edges sorted by (query, key), which is the row order, and by (key, query).
struct Edges {
  int64_t count;                           // L
  const int64_t *row_start, *row_keys;     // [M+1], [L]
  const int64_t *col_start, *col_queries;  // [N+1], [L]
  const int64_t* col_edges;                // [L], the place in row order
};

struct Problem {
  int64_t B, H, Hk, M, N, D, E;
  Edges edges;
  bool softmax, sink;
  double scale;
  View query, key, value;
  View reverse;  // [B,Hk,M,E] with M = N, or absent
  View out;      // [B,H,M,E]
  View weight;   // [B,H,L] in row order, compute dtype, contiguous
};

// What the backward reads and writes besides. An absent gradient is not wanted.
struct Gradients {
  View grad_out;
  View grad_score;  // [B,H,L] like weight; absent if neither query nor key has a gradient
  View query, key, value, reverse;
};

// The kernels of one instruction set.
struct Kernels {
  void (*forward_float)(const Problem&);
  void (*forward_double)(const Problem&);
  void (*backward_float)(const Problem&, const Gradients&);
  void (*backward_double)(const Problem&, const Gradients&);
};

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace attn::l1::sparse

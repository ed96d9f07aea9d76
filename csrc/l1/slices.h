// A large problem as a sequence of smaller ones: some of the heads at a time, so that what is
// packed and summed for them stays small beside the inputs.
#pragma once

#include <algorithm>

#include "l1/problem.h"

namespace attn::l1 {

constexpr int64_t kSliceBytes = int64_t{16} << 20;

inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Bool:
      return 1;
    default:
      return 2;
  }
}

// Moves an optional view to index i of its first dimension, j of its second.
inline void move(View& v, int64_t i, int64_t j = 0) {
  if (!v) return;
  v.data = static_cast<char*>(v.data) + (i * v.stride[0] + j * v.stride[1]) * bytes_of(v.dtype);
}

// Some batches of all heads, or some heads of one batch.
struct Slice {
  int64_t batch, batches, kv_head, kv_heads;

  // Query heads per key head; there may be no heads at all.
  static int64_t group(const Problem& p) { return p.H / std::max<int64_t>(p.Hk, 1); }

  Problem of(const Problem& whole) const {
    const int64_t heads = kv_heads * group(whole), head = kv_head * group(whole);
    Problem p = whole;
    p.B = batches;
    p.H = heads;
    p.Hk = kv_heads;
    for (View* v : {&p.query, &p.mask, &p.bias, &p.out, &p.lse}) move(*v, batch, head);
    for (View* v : {&p.key, &p.value}) move(*v, batch, kv_head);
    for (View* v : {&p.relative_bias, &p.sink}) move(*v, head);
    for (View* v : {&p.visible.start, &p.visible.stop}) move(*v, batch);
    return p;
  }

  Gradients of(const Gradients& whole, const Problem& p) const {
    const int64_t heads = kv_heads * group(p), head = kv_head * group(p);
    Gradients g = whole;
    for (View* v : {&g.grad_out, &g.grad_lse, &g.query, &g.bias}) move(*v, batch, head);
    for (View* v : {&g.key, &g.value}) move(*v, batch, kv_head);
    for (View* v : {&g.relative_bias, &g.sink}) move(*v, head);
    if (!g.sum_over_batch && p.B > 0) g.bias_size = g.bias_size / p.B * batches;
    if (!g.sum_over_heads && p.H > 0) g.bias_size = g.bias_size / p.H * heads;
    return g;
  }
};

// body(slice) for slices of about kSliceBytes, one after the other.
template <class Body>
void for_each_slice(const Problem& p, int64_t bytes_per_kv_head, const Body& body) {
  const int64_t threads = num_threads();
  int64_t heads = kSliceBytes / std::max<int64_t>(bytes_per_kv_head, 1);
  // Whole rounds of the threads.
  heads = std::max(heads / threads * threads, threads);
  if (p.B * p.Hk <= heads) return body(Slice{0, p.B, 0, p.Hk});
  const int64_t kv_heads = std::min(heads, p.Hk);
  const int64_t batches = kv_heads == p.Hk ? heads / p.Hk : 1;
  for (int64_t b = 0; b < p.B; b += batches) {
    for (int64_t k = 0; k < p.Hk; k += kv_heads) {
      body(Slice{b, std::min(batches, p.B - b), k, std::min(kv_heads, p.Hk - k)});
    }
  }
}

}  // namespace attn::l1

// relative_bias as kernels read it: in bits, with room for tiles past the ends of queries and keys,
// and for each query the greatest of those that its keys have.
#pragma once

#include <cfloat>

#include "cosine_sim/cuda/band.cuh"
#include "cosine_sim/cuda/rows.cuh"

namespace attn::cuda::cosine {

// The pair of query m and key n has the diagonal n - m.
struct RelativeBias {
  const float* bits;      // [H, columns], that of diagonal x at x + origin; or null, where none is
  const float* greatest;  // [H, padded]: of each query, in nats; -inf where it sees no key
  const float* shift;     // [H, padded]: the same in bits, but 0 for -inf
  float* grad;            // [H, span], of diagonal x at x + queries - 1; or null
  int columns, origin, padded, span, queries;

  // What comes before the first diagonal: tiles of 192 queries begin there.
  static constexpr int kBefore = 192;
  // What comes behind the last one: tiles of 128 keys end there, in pieces of 16 bytes.
  static constexpr int kBehind = 136;

  ATTN_DEVICE const float* from(int head, int diagonal) const {
    return bits + int64_t{head} * columns + (diagonal + origin);
  }
};

// A finite number remains one.
ATTN_DEVICE float in_bits(float nats) {
  const float x = nats * static_cast<float>(kBitsPerNat);
  if (x == INFINITY && nats < INFINITY) return FLT_MAX;
  return x == -INFINITY && nats > -INFINITY ? -FLT_MAX : x;
}

}  // namespace attn::cuda::cosine

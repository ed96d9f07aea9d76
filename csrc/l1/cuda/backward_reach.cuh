// Which tiles of queries and of keys see each other.
#pragma once

#include "l1/cuda/problem.cuh"

namespace attn::cuda::l1 {

// Which tiles of keys a tile of queries sees. Both ends of the interval of a query never decrease
// along the queries (masks.py).
struct Reach {
  int first, last;
};

template <class P>
ATTN_DEVICE Reach reach_of(const Problem& p, int b, int first_query) {
  const int past = first_query + P::kQueries;
  const Interval first = visible_keys(p, b, first_query);
  const Interval last = visible_keys(p, b, (past < p.M ? past : p.M) - 1);
  if (first.begin >= last.end) return {1, 0};
  return {first.begin / P::kKeys, (last.end - 1) / P::kKeys};
}

// Tiles of queries among which are all that the band lets see a tile of keys.
template <class P>
ATTN_DEVICE Interval query_tiles(const Problem& p, int first_key) {
  const int64_t shift = int64_t{p.N} - p.M;
  int64_t begin = first_key - p.right - shift;
  int64_t end = first_key + P::kKeys + p.left - shift;
  begin = begin > 0 ? begin : 0;
  end = end < p.M ? end : p.M;
  if (begin >= end) return {0, 0};
  return {static_cast<int>(begin / P::kQueries),
          static_cast<int>((end + P::kQueries - 1) / P::kQueries)};
}

}  // namespace attn::cuda::l1

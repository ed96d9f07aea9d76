// Which keys a query sees, before element masks: one interval per query.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/view.h"

namespace attn {

struct Interval {
  int64_t begin;
  int64_t end;
};

// The band p - left <= n <= p + right around p = m + (N - M), intersected with [start, stop).
// Both ends are non-decreasing in m, so a block of queries sees [begin of its first, end of its
// last) and all of its queries see [begin of its last, end of its first).
struct Visibility {
  static constexpr int64_t kUnbounded = int64_t{1} << 40;

  int64_t num_queries = 0;
  int64_t num_keys = 0;
  int64_t left = kUnbounded;
  int64_t right = kUnbounded;
  View start;  // int32 [1 or B, M], with stop or absent
  View stop;

  static int64_t clamp_band(int64_t width) {
    return std::min(std::max(width, -kUnbounded), kUnbounded);
  }

  Interval of(int64_t batch, int64_t query) const {
    const int64_t position = query + num_keys - num_queries;
    int64_t begin = std::max<int64_t>(position - left, 0);
    int64_t end = std::min(position + right + 1, num_keys);
    if (start) {
      begin = std::max(begin, at(start, batch, query));
      end = std::min(end, at(stop, batch, query));
    }
    // An empty interval may lie anywhere; keep it inside the keys.
    return {std::min(begin, num_keys), std::max<int64_t>(end, 0)};
  }

 private:
  static int64_t at(const View& v, int64_t batch, int64_t query) {
    return static_cast<const int32_t*>(v.data)[batch * v.stride[0] + query * v.stride[1]];
  }
};

}  // namespace attn

// The softmax of the forward: what every query sees, weights with a running maximum, row sums.
#pragma once

#include "l1/cuda/distance.cuh"

namespace attn::cuda::l1 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The keys that some of a set of queries see, and those that all of them see.
struct Span {
  int begin, end;
  int full_begin, full_end;

  // Queries that see no key, and those past the last, do not widen `begin`..`end`.
  static ATTN_DEVICE Span of_query(const Interval& keys, int N, bool exists) {
    const bool none = keys.begin >= keys.end;
    return {none ? N : keys.begin, none ? 0 : keys.end,
            !exists ? 0
            : none  ? N
                    : keys.begin,
            !exists ? N
            : none  ? 0
                    : keys.end};
  }
  ATTN_DEVICE void join(const Span& other) {
    begin = begin < other.begin ? begin : other.begin;
    end = end > other.end ? end : other.end;
    full_begin = full_begin > other.full_begin ? full_begin : other.full_begin;
    full_end = full_end < other.full_end ? full_end : other.full_end;
  }
  ATTN_DEVICE void join_warp() {
    ATTN_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      join({shuffle_xor(begin, mask), shuffle_xor(end, mask), shuffle_xor(full_begin, mask),
            shuffle_xor(full_end, mask)});
    }
  }
};

// What is left of a row: the factor of its sum of weighted values, and its lse.
struct RowSums {
  float factor, lse;
};

// How scores are held until they are weights.
template <bool kExtras>
struct Units;

// Distances below zero, unchanged, so that weights are one fused operation and 2^x away:
// 2^(unit * x - reference). References are in base 2.
template <>
struct Units<false> {
  float unit;

  ATTN_DEVICE Units(const Problem& p, float down) : unit(p.scale * kLog2e * down) {
    // In range: a hidden or a zero distance times zero or infinity would be NaN.
    unit = fminf(fmaxf(unit, 1e-45f), 3.4028235e38f);
  }
  ATTN_DEVICE float reference(float x) const { return x * unit; }
  ATTN_DEVICE float weight(float x, float reference) const {
    return fast_exp2(fmaf(x, unit, -reference));
  }
  ATTN_DEVICE float between(float before, float now) const { return fast_exp2(before - now); }
  ATTN_DEVICE float natural(float reference) const { return reference * kLn2; }
};

// Natural scores: a bias may be as large as it likes, only differences are multiplied.
template <>
struct Units<true> {
  ATTN_DEVICE Units(const Problem&, float) {}
  ATTN_DEVICE float reference(float x) const { return x; }
  ATTN_DEVICE float weight(float x, float reference) const {
    return fast_exp2((x - reference) * kLog2e);
  }
  ATTN_DEVICE float between(float before, float now) const { return weight(before, now); }
  ATTN_DEVICE float natural(float reference) const { return reference; }
};

// The four rows of a thread.
template <class T, bool kExtras>
class Softmax {
 public:
  ATTN_DEVICE Softmax(const Problem& p, int b, int h, int first_query, const Interval* visible,
                      float down)
      : p_(p),
        b_(b),
        h_(h),
        first_query_(first_query),
        visible_(visible),
        down_(down),
        units_(p, down) {}

  // Turns distances to the keys from `first` on into weights. Earlier sums shrink by `keep`.
  template <int kKeys>
  ATTN_DEVICE void weigh(Tile<kKeys>& tile, int first, bool full, float (&keep)[4]) {
    if constexpr (kExtras) {
      score(tile, first);
    } else if (!full) {
      hide(tile, first);
    }
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float largest = units_.reference(row_max(tile, i));
      const float before = reference_[i];
      reference_[i] = fmaxf(before, largest);
      // A row that has seen no key yet: subtracting its reference would give NaN.
      const float now = reference_[i] == -INFINITY ? 0.0f : reference_[i];
      keep[i] = units_.between(before, now);
      float sum = 0.0f;
      ATTN_UNROLL
      for (int h = 0; h < kKeys / 8; ++h) {
        ATTN_UNROLL
        for (int c = 0; c < 2; ++c) {
          float& x = tile.at[i / 2][h][2 * (i % 2) + c];
          x = units_.weight(kExtras ? x : -x, now);
          sum += x;
        }
      }
      sum_[i] = fmaf(sum_[i], keep[i], sum);
    }
  }

  ATTN_DEVICE void finish(RowSums (&rows)[4]) const {
    const float sink = p_.sink.data ? *p_.sink.at<float>(h_) : -INFINITY;
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      float sum = sum_[i] + shuffle_xor(sum_[i], 1);
      sum += shuffle_xor(sum, 2);
      const float reference = units_.natural(reference_[i]);
      const float top = fmaxf(reference, sink);
      const float shown = top == -INFINITY ? 0.0f : top;
      const float share = fast_exp2((reference - shown) * kLog2e);
      const float total = fmaf(sum, share, fast_exp2((sink - shown) * kLog2e));
      rows[i] = {total > 0 ? share / total : 0.0f, shown + logf(total)};
    }
  }

 private:
  template <int kKeys>
  static ATTN_DEVICE float row_max(const Tile<kKeys>& tile, int i) {
    float largest = -INFINITY;
    ATTN_UNROLL
    for (int h = 0; h < kKeys / 8; ++h) {
      ATTN_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float x = tile.at[i / 2][h][2 * (i % 2) + c];
        largest = fmaxf(largest, kExtras ? x : -x);
      }
    }
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    return fmaxf(largest, shuffle_xor(largest, 2));
  }

  // f(value, query of the block, key) for every pair that this thread owns.
  template <int kKeys, class F>
  static ATTN_DEVICE void for_each(Tile<kKeys>& tile, int first, F f) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    ATTN_UNROLL
    for (int m = 0; m < 2; ++m) {
      ATTN_UNROLL
      for (int h = 0; h < kKeys / 8; ++h) {
        ATTN_UNROLL
        for (int c = 0; c < 4; ++c) {
          const int query = warp * kWarpQueries + query_of(g, m, c);
          f(tile.at[m][h][c], query, first + key_of(t, h, c));
        }
      }
    }
  }

  template <int kKeys>
  ATTN_DEVICE void hide(Tile<kKeys>& tile, int first) const {
    for_each(tile, first, [&](float& distance, int query, int key) {
      const Interval keys = visible_[query];
      if (key < keys.begin || key >= keys.end) distance = INFINITY;
    });
  }

  template <int kKeys>
  ATTN_DEVICE void score(Tile<kKeys>& tile, int first) const {
    for_each(tile, first, [&](float& x, int query, int key) {
      const Interval keys = visible_[query];
      const bool visible = key >= keys.begin && key < keys.end;
      x = visible
              ? score_of(p_, x * down_) + added_to_score<T>(p_, b_, h_, first_query_ + query, key)
              : -INFINITY;
    });
  }

  const Problem& p_;
  int b_, h_, first_query_;
  const Interval* visible_;
  float down_;
  Units<kExtras> units_;
  float reference_[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  float sum_[4] = {};
};

}  // namespace attn::cuda::l1

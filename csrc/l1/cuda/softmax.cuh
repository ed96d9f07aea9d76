// The softmax of the forward: what every query sees, weights with a running maximum, row sums.
#pragma once

#include "l1/cuda/stage.cuh"

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

// What is added to scores lies by queries; the pitch shifts rows by 4 banks.
template <int kKeys>
constexpr int kAddedPitch = kKeys + 4;

// Eight rows of what is added, a lane per column: all loads are under way before the first is used.
template <int kKeys>
struct AddedRows {
  static constexpr int kRows = 8;
  static constexpr int kColumns = kKeys / 32;
  float at[kRows][kColumns];  // -inf: not seen

  template <class F>
  ATTN_DEVICE void for_each(F f) {
    ATTN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      ATTN_UNROLL
      for (int c = 0; c < kColumns; ++c) f(at[i][c], i, c);
    }
  }
  template <class S>
  ATTN_DEVICE void add(const S* from, int64_t row_stride, int64_t stride) {
    for_each([&](float& x, int i, int c) {
      if (x != -INFINITY) x += to_float(from[i * row_stride + 32 * c * stride]);
    });
  }
  ATTN_DEVICE void hide(const bool* visible, int64_t row_stride, int64_t stride) {
    for_each([&](float& x, int i, int c) {
      if (x != -INFINITY && !visible[i * row_stride + 32 * c * stride]) x = -INFINITY;
    });
  }
};

// Notes what is added to the scores of this warp's queries: -inf for keys that are not seen.
template <class T, int kKeys>
ATTN_DEVICE void stage_added(const Problem& p, const BlockIndex& block, const Interval* visible,
                             int first, float* to) {
  const int b = block.b, h = block.h, lane = threadIdx.x % 32, n = first + lane;
  const int64_t *bias = p.bias.stride, *mask = p.mask.stride, *relative = p.relative_bias.stride;
#pragma unroll 1
  for (int row = 0; row < kWarpQueries; row += AddedRows<kKeys>::kRows) {
    const int m = block.first_query + threadIdx.x / 32 * kWarpQueries + row;
    AddedRows<kKeys> added;
    added.for_each([&](float& x, int i, int c) {
      const Interval keys = visible[row + i];
      x = n + 32 * c >= keys.begin && n + 32 * c < keys.end ? 0.0f : -INFINITY;
    });
    if (p.relative_bias.data) {
      const int64_t diagonal = int64_t{n} - m + p.M - 1;
      added.add(p.relative_bias.at<float>(h, diagonal), -relative[1], relative[1]);
    }
    if (p.bias.data && p.bias_is_float) added.add(p.bias.at<float>(b, h, m, n), bias[2], bias[3]);
    if (p.bias.data && !p.bias_is_float) added.add(p.bias.at<T>(b, h, m, n), bias[2], bias[3]);
    if (p.mask.data) added.hide(p.mask.at<bool>(b, h, m, n), mask[2], mask[3]);
    added.for_each(
        [&](float& x, int i, int c) { to[(row + i) * kAddedPitch<kKeys> + lane + 32 * c] = x; });
  }
}

// The four rows of a thread.
template <class T, bool kExtras>
class Softmax {
 public:
  ATTN_DEVICE Softmax(const Problem& p, const BlockIndex& block, const Interval* visible,
                      float* added, float down)
      : p_(p),
        block_(block),
        visible_(visible + threadIdx.x / 32 * kWarpQueries),
        added_(added),
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
    const float sink = p_.sink.data ? *p_.sink.at<float>(block_.h) : -INFINITY;
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

  template <int kKeys>
  ATTN_DEVICE void hide(Tile<kKeys>& tile, int first) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Interval keys = visible_[g + 8 * i];
      ATTN_UNROLL
      for (int h = 0; h < kKeys / 8; ++h) {
        ATTN_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int key = first + key_of(t, h, c);
          if (key < keys.begin || key >= keys.end) tile.at[i / 2][h][2 * (i % 2) + c] = INFINITY;
        }
      }
    }
  }

  // Scores with biases; they pass through shared memory, so that a row is read in one piece.
  template <int kKeys>
  ATTN_DEVICE void score(Tile<kKeys>& tile, int first) const {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float* added = added_ + warp * kWarpQueries * kAddedPitch<kKeys>;
    stage_added<T, kKeys>(p_, block_, visible_, first, added);
    sync_warp();
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      ATTN_UNROLL
      for (int j = 0; j < kKeys / 16; ++j) {
        const float4 four = load4(added + (g + 8 * i) * kAddedPitch<kKeys> + 16 * j + 4 * t);
        const float more[4] = {four.x, four.y, four.z, four.w};
        ATTN_UNROLL
        for (int c = 0; c < 4; ++c) {
          float& x = tile.at[i / 2][2 * j + c / 2][2 * (i % 2) + c % 2];
          x = score_of(p_, x * down_) + more[c];
        }
      }
    }
  }

  const Problem& p_;
  const BlockIndex& block_;
  const Interval* visible_;  // of this warp's queries
  float* added_;
  float down_;
  Units<kExtras> units_;
  float reference_[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  float sum_[4] = {};
};

}  // namespace attn::cuda::l1

// Gradients of queries whose last keys a block has, from registers through the norm to memory.
#pragma once

#include "cosine_sim/cuda/backward_plan.cuh"

namespace attn::cuda::cosine {

// A warpgroup has 64 whole rows.
template <class P>
struct FinishedQueries {
  using T = typename P::T;
  static_assert(P::kQueries == 128 && P::kPart == P::kWidth);
  static constexpr int kSums = P::kWidth / 2;

  const Backward& p;
  BackwardShared<P> shared;
  int warpgroup, thread, lane;

  // What this thread has added for the blocks before.
  ATTN_DEVICE void add_sums(float (&sums)[kSums], const float* from) const {
    ATTN_UNROLL
    for (int i = 0; i < P::kWidth / 8; ++i) {
      const float4 x = load4_past_l1(from + i * 512);
      sums[4 * i] += x.x, sums[4 * i + 1] += x.y, sums[4 * i + 2] += x.z, sums[4 * i + 3] += x.w;
    }
  }

  ATTN_DEVICE void store(const float (&sums)[kSums], const Cursor<P>& at, int stage) const {
    float2 along[2];
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) along[below] = lengths(sums, below, stage);
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) store_row(sums, along[below], below, at, stage);
  }

 private:
  ATTN_DEVICE int row(int below) const {
    return warpgroup * 64 + thread / 32 * 16 + lane / 4 + 8 * below;
  }
  ATTN_DEVICE float2 query(int row, int i, int stage) const {
    return unpack(piece<P::kQueries>(shared.query(stage), row, i)[lane % 4], T{});
  }

  // q . gradient and q . q.
  ATTN_DEVICE float2 lengths(const float (&sums)[kSums], int below, int stage) const {
    float2 x = make_float2(0.0f, 0.0f);
    const int at = opaque(row(below));  // to hold no addresses
    ATTN_UNROLL
    for (int i = 0; i < P::kWidth / 8; ++i) {
      const float2 q = query(at, i, stage);
      x.x += q.x * sums[4 * i + 2 * below] + q.y * sums[4 * i + 2 * below + 1];
      x.y += q.x * q.x + q.y * q.y;
    }
    return make_float2(sum_of_lanes<4>(x.x), sum_of_lanes<4>(x.y));
  }

  // (g - q (q.g) / |q|^2) scale / |query|, where q is a unit vector times a factor. Below the floor
  // of the norm the divisor is a constant: nothing to project out.
  ATTN_DEVICE void store_row(const float (&sums)[kSums], float2 along, int below,
                             const Cursor<P>& cursor, int stage) const {
    const int at = opaque(row(below)), m = cursor.tile * P::kQueries + at;
    const int64_t tile = int64_t{cursor.head} * p.query_tiles + cursor.tile;
    const float given = p.rows[(P::kRowParts * tile + 2) * P::kQueries + at];
    const float inverse = inverse_length(along.y);
    const bool is_unit = fabsf(given) < p.floor_factor && along.y > 0.0f;
    const float on_query = is_unit ? along.x * inverse * inverse : 0.0f;
    const float factor = given * static_cast<float>(1 / kBitsPerNat);
    const int first = lane % 4 * 8;  // of this lane
    T* to = static_cast<T*>(p.grad_query) + (int64_t{cursor.head} * p.M + m) * p.D + first;
    ATTN_UNROLL
    for (int i = 0; i < P::kWidth / 32; ++i) {
      uint32_t x[4];
      ATTN_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float2 q = query(at, 4 * i + j, stage);
        const float* g = sums + 16 * i + 4 * j + 2 * below;
        x[j] = pack((g[0] - q.x * on_query) * factor, (g[1] - q.y * on_query) * factor, T{});
      }
      transpose_lanes(x, lane);
      if (m < p.M && first + 32 * i < p.D) {
        store4(reinterpret_cast<uint32_t*>(to + 32 * i), make_uint4(x[0], x[1], x[2], x[3]));
      }
    }
  }
};

}  // namespace attn::cuda::cosine

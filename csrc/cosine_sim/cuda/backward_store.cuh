// Gradients of a block's keys and values, from the registers of a warpgroup to memory.
#pragma once

#include "cosine_sim/cuda/accumulators.cuh"
#include "cosine_sim/cuda/backward_plan.cuh"

namespace attn::cuda::cosine {

template <class P>
struct KeyRows {
  using T = typename P::T;
  static constexpr int kSums = P::kColumns / 2;  // of a thread: keys `row` and `row` + 8
  using Units = uint32_t[2][P::kColumns / 8];    // unit keys in the places of their gradients

  const Backward& p;
  const Block& block;
  int lane, row;

  ATTN_DEVICE void store_values(const float (&sums)[kSums]) const {
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      store_row(static_cast<T*>(p.grad_value), sums, below, opaque(row + 8 * below));
    }
  }

  ATTN_DEVICE void load(unsigned char* keys, Units& unit) const {
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      const int at = opaque(row + 8 * below);
      ATTN_UNROLL
      for (int j = 0; j < P::kColumns / 8; ++j) {
        unit[below][j] = piece<P::kKeys>(keys, at, j)[lane % 4];
      }
    }
  }
  // 1 / |k| of both rows. Of wider rows they come from memory when they are needed.
  ATTN_DEVICE void load_inverse(const float* of_block, float (&inverse)[2]) const {
    inverse[0] = of_block[opaque(row)], inverse[1] = of_block[opaque(row + 8)];
  }
  ATTN_DEVICE void store_keys(float (&sums)[kSums], const Units& unit,
                              const float (&inverse)[2]) const {
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      const int at = opaque(row + 8 * below), key = block.first_key + at;
      const int64_t index = int64_t{block.head} * p.N + key;
      float factor = inverse[below];
      if constexpr (!P::kNarrow) factor = key < block.past_key ? p.key_inverse[index] : 0.0f;
      through_norm(sums, below, factor, unit[below]);
      store_row(static_cast<T*>(p.grad_key), sums, below, at);
    }
  }

  // The place of a key in gradients.
  ATTN_DEVICE int64_t row_given(int key) const {
    const int given = key < block.past_key ? p.order.of(block.head / p.Hk, key) : 0;
    return int64_t{block.head} * p.N + given;
  }

 private:
  ATTN_DEVICE void store_row(T* to, const float (&sums)[kSums], int below, int at) const {
    constexpr int kSure = P::kHalves == 1 ? P::kWidth - 32 : 0;  // columns that all rows have
    const int key = block.first_key + at;
    const int first = block.half * P::kColumns + lane % 4 * 8;  // of this lane
    const int columns = key < block.past_key ? p.D - first : 0;
    to += row_given(key) * p.D + first;
    ATTN_UNROLL
    for (int i = 0; i < (P::kColumns + 31) / 32; ++i) {
      const bool inside = 32 * i < kSure ? key < block.past_key : 32 * i < columns;
      store_part(to + 32 * i, sums, i, below, 1.0f, lane, inside);
    }
  }

  // Gradients of keys from those of unit keys: (g - k (k.g)) / |k|. Below the floor of the norm the
  // divisor is a constant.
  ATTN_DEVICE static void through_norm(float (&sums)[kSums], int below, float inverse,
                                       const uint32_t (&unit)[P::kColumns / 8]) {
    float along = 0.0f;
    ATTN_UNROLL
    for (int j = 0; j < P::kColumns / 8; ++j) {
      const float2 k = unpack(unit[j], T{});
      along += k.x * sums[4 * j + 2 * below] + k.y * sums[4 * j + 2 * below + 1];
    }
    along += shuffle_xor(along, 1);
    along += shuffle_xor(along, 2);
    if (inverse >= 1e12f) along = 0.0f;
    inverse *= static_cast<float>(1 / kBitsPerNat);  // queries have it as a factor
    ATTN_UNROLL
    for (int j = 0; j < P::kColumns / 8; ++j) {
      const float2 k = unpack(unit[j], T{});
      float* g = sums + 4 * j + 2 * below;
      g[0] = (g[0] - k.x * along) * inverse;
      g[1] = (g[1] - k.y * along) * inverse;
    }
  }
};

}  // namespace attn::cuda::cosine

// What a thread has of its warpgroup's products: of rows g and g + 8 of a warp's 16, pairs of
// columns, eight apart. Four lanes share the two rows.
#pragma once

#include "cosine_sim/cuda/rows.cuh"

namespace attn::cuda::cosine {

// Scores as the left operand of the product with values.
template <class T, int kScores>
ATTN_DEVICE void pack_weights(uint32_t (&weight)[kScores / 8][4], const float (&score)[kScores]) {
  ATTN_UNROLL
  for (int i = 0; i < kScores / 8; ++i) {
    ATTN_UNROLL
    for (int r = 0; r < 4; ++r) {
      weight[i][r] = pack(score[8 * i + 2 * r], score[8 * i + 2 * r + 1], T{});
    }
  }
}

// Lanes that share two rows get sums over them.
ATTN_DEVICE void add_quads(float (&x)[2]) {
  ATTN_UNROLL
  for (int i = 0; i < 2; ++i) {
    x[i] += shuffle_xor(x[i], 1);
    x[i] += shuffle_xor(x[i], 2);
  }
}

// The warp is done with a buffer.
ATTN_DEVICE void release_buffer(uint64_t* barrier, int lane) {
  sync_warp();
  if (lane == 0) barrier_arrive(barrier);
}

// 32 columns of a row, times a factor, of which a thread has 8 pairs apart: four threads exchange
// them, so that each stores 8 neighbours. `part`: which 32 columns; past the end any will do.
template <class T, int kOutputs>
ATTN_DEVICE void store_part(T* to, const float (&from)[kOutputs], int part, int below, float factor,
                            int lane, bool inside) {
  uint32_t x[4];
  ATTN_UNROLL
  for (int j = 0; j < 4; ++j) {
    const float* pair = from + (16 * part + 4 * j) % kOutputs + 2 * below;
    x[j] = pack(pair[0] * factor, pair[1] * factor, T{});
  }
  transpose_lanes(x, lane);
  if (inside) store4(reinterpret_cast<uint32_t*>(to), make_uint4(x[0], x[1], x[2], x[3]));
}

}  // namespace attn::cuda::cosine

// attn::_l1_scores_fwd: tiles of distances (distance.cuh) that are written as they are.
#pragma once

#include "l1/cuda/stage.cuh"

namespace attn::cuda::l1 {

constexpr int kScoreKeys = 64;
// A block stages its queries once and walks over this many tiles of keys.
constexpr int kScoreTiles = 8;

template <class T>
ATTN_DEVICE void store_four(T* to, const float (&x)[4]) {
  if constexpr (sizeof(T) == 4) {
    store4_streaming(to, make_float4(x[0], x[1], x[2], x[3]));
  } else {
    store2(reinterpret_cast<uint32_t*>(to), pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
  }
}

template <class T>
ATTN_DEVICE void write_scores(const Problem& p, const BlockIndex& block, int first, float down,
                              const Tile<kScoreKeys>& tile) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t head = static_cast<int64_t>(block.b) * p.H + block.h;
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int m = block.first_query + warp * kWarpQueries + g + 8 * i;
    if (m >= p.M) continue;
    T* row = static_cast<T*>(p.out.data) + (head * p.M + m) * p.N;
    ATTN_UNROLL
    for (int j = 0; j < kScoreKeys / 16; ++j) {
      const int n = first + key_of(t, 2 * j, 0);
      float scores[4];
      ATTN_UNROLL
      for (int c = 0; c < 4; ++c) {
        const float distance = tile.at[i / 2][2 * j + c / 2][2 * (i % 2) + c % 2];
        scores[c] = score_of(p, distance * down);
      }
      if (p.N % 4 == 0) {
        if (n < p.N) store_four(row + n, scores);
        continue;
      }
      ATTN_UNROLL
      for (int c = 0; c < 4; ++c) {
        if (n + c < p.N) row[n + c] = from_float<T>(scores[c]);
      }
    }
  }
}

// Grid: blocks of queries x heads x batch, parts of kScoreTiles tiles of keys.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) scores_kernel(const __grid_constant__ Problem p) {
  const BlockIndex block(p, p.E);
  const Factor factor = common_factor<T>(p, block.b, block.hk);
  const int begin = blockIdx.y * kScoreTiles * kScoreKeys;
  const int end = begin + kScoreTiles * kScoreKeys < p.N ? begin + kScoreTiles * kScoreKeys : p.N;
  const Rows<T> queries = rows_of<T>(p.query, p.query_in_pairs, block.b, block.h, block.first_query,
                                     p.M, p.D, factor.up);
  Rows<T> keys = rows_of<T>(p.key, p.key_in_pairs, block.b, block.hk, begin, p.N, p.D, factor.up);
  uint32_t* query_words = shared_memory<uint32_t>();
  uint32_t* key_words = query_words + keys.words * kQueryPitch;
  KeyStage<T, kScoreKeys> stage;
  stage_queries(queries, query_words);
  stage.fetch(keys, key_words);
  stage.commit(keys, key_words);
  __syncthreads();
  const bool sliced = padded_words<T>(p.D) > kSliceWords;
#pragma unroll 1
  for (int first = begin; first < end; first += kScoreKeys) {
    Tile<kScoreKeys> tile = {};
    add_all_distances(queries, keys, query_words, key_words, /*seen=*/true, tile);
    __syncthreads();
    keys.first_row = first + kScoreKeys;
    if (sliced) stage_queries(queries, query_words);
    stage.fetch(keys, key_words);
    write_scores<T>(p, block, first, factor.down, tile);
    stage.commit(keys, key_words);
    __syncthreads();
  }
}

}  // namespace attn::cuda::l1

// A warpgroup that multiplies: 64 queries against all keys that they see.
//
// |q^.k^| <= 1 bounds the exponents, so there is no running maximum: weights are exp2(scale *
// log2(e) * q^.k^), in [2^-14, 2^14] for halves and [2^-60, 2^60] for bfloats, whose exponents hold
// them. relative_bias is not bounded, but the greatest that a query's keys have is subtracted from
// it. What could overflow are values beyond 3e38 / (2^60 N), and keys longer than 3e36 where 1 /
// |k| multiplies scores. Products of the next keys are under way while weights are computed, and
// while the values of the last keys are multiplied.
#pragma once

#include "cosine_sim/cuda/accumulators.cuh"
#include "cosine_sim/cuda/forward_fetch.cuh"

namespace attn::cuda::cosine {

template <class P>
struct Multiply {
  using T = typename P::T;
  static constexpr int kScores = P::kKeys / 2;  // of a thread: rows g and g + 8
  static constexpr int kOutputs = P::kWidth / 2;

  const Forward& p;
  Shared<P> shared;
  int warpgroup;  // of those that multiply
  int lane, row;  // `row` of the tile, and row + 8

  Ring<P::kStages> keys, values;
  Ring<P::kQueryStages> queries;
  Ring<P::kSlots> slots;
  Ring<P::kBiasSlots> biases;

  float out[kOutputs];
  float score[kScores];
  uint32_t weight[P::kKeys / 16][4];
  uint32_t query[P::kWidth / 16][4];
  float sum[2];  // of the weights of both rows
  float shift[2];

  ATTN_DEVICE Multiply(const Forward& problem, Shared<P> memory, int thread)
      : p(problem), shared(memory) {
    warpgroup = shuffle(thread / 128, 0);  // the same register for all lanes
    lane = thread % 32;
    row = warpgroup * 64 + thread % 128 / 32 * 16 + lane / 4;
  }

  ATTN_DEVICE void run() {
    if (P::kTurns && warpgroup == P::kWarpgroups - 1) named_arrive(1, 256);  // the first one's turn
    Tile tile;
    for (Tiles<P> tiles{p}; tiles.next(tile);) {
      attend(tile);
      store(tile);
    }
  }

 private:
  ATTN_DEVICE void attend(const Tile& tile) {
    ATTN_UNROLL
    for (int i = 0; i < 2; ++i) sum[i] = 0.0f;
    barrier_wait(P::kHeld ? shared.query_arrived(queries.index) : shared.query_ready(queries.index),
                 queries.parity);
    if constexpr (P::kBias) {
      barrier_wait(shared.query_arrived(queries.index), queries.parity);
      for (int i = 0; i < 2; ++i) shift[i] = shared.shifts(queries.index)[row + 8 * i];
    }
    if constexpr (P::kHeld) hold_query();
    if constexpr (P::kBias) begin_scores(tile);
    barrier_wait(shared.key_arrived(keys.index), keys.parity);
    products_fence();
    start_scores();
    products_wait<0>();
    keep_here(score);
    release(shared.key_free(keys.index));
    int i = tile.keys.end - 1;
    if (!P::kHeld && i == 0) release(shared.query_free(queries.index));
    uint32_t seen[2];
    if (tile.keys.is_full(i)) {
      find_weights<false>(seen);
    } else {
      find_seen(seen, tile, i);
      find_weights<true>(seen);
    }
    keys.advance();
    slots.advance();
    pack_weights<T>(weight, score);
    barrier_wait(shared.value_arrived(values.index), values.parity);
    int accumulate = 0;
    for (--i; i >= tile.keys.full_end; --i) {
      step<true>(tile, i, accumulate);
      accumulate = 1;
    }
    for (; i >= tile.keys.full_begin; --i) {
      step<false>(tile, i, accumulate);
      accumulate = 1;
    }
    for (; i >= 0; --i) {
      step<true>(tile, i, accumulate);
      accumulate = 1;
    }
    queries.advance();

    keep_weights();
    products_fence();
    start_outputs(accumulate);
    add_quads(sum);
    products_wait<0>();
    keep_here(out);
    release(shared.value_free(values.index));
    values.advance();
  }

  // The scores of the next keys and the outputs of the last, then the weights of the next.
  template <bool kMasked>
  ATTN_DEVICE void step(const Tile& tile, int i, int accumulate) {
    if constexpr (P::kBias) begin_scores(tile);
    barrier_wait(shared.key_arrived(keys.index), keys.parity);
    if constexpr (P::kTurns) named_sync(1 + warpgroup, 256);
    keep_weights();
    products_fence();
    start_scores();
    start_outputs(accumulate);
    if constexpr (P::kTurns) {
      named_arrive(1 + (warpgroup + 1 == P::kWarpgroups ? 0 : warpgroup + 1), 256);
    }
    uint32_t seen[2];
    if constexpr (kMasked) find_seen(seen, tile, i);
    products_wait<1>();
    keep_here(score);
    release(shared.key_free(keys.index));
    if (!P::kHeld && i == 0) release(shared.query_free(queries.index));
    find_weights<kMasked>(seen);
    keys.advance();
    slots.advance();
    const int done = values.index;
    values.advance();
    // The compiler moves no exponential across this loop, so that none waits for the products.
    barrier_wait(shared.value_arrived(values.index), values.parity);
    products_wait<0>();
    keep_here(out);
    release(shared.value_free(done));
    pack_weights<T>(weight, score);
  }

  // The left operands of all scores of the tile: rows of queries times factor / |row|.
  ATTN_DEVICE void hold_query() {
    unsigned char* tile = shared.query(queries.index);
    const int at = row - lane / 4 + lane % 16;  // 16 rows, then the same at the next 8 columns
    ATTN_UNROLL
    for (int i = 0; i < P::kWidth / 16; ++i) {
      load_matrices(query[i], piece<P::kQueries>(tile, at, 2 * i + lane / 16));
      keep_here(query[i]);
    }
    release(shared.query_free(queries.index));
    float squared[2] = {0.0f, 0.0f};
    ATTN_UNROLL
    for (int i = 0; i < P::kWidth / 16; ++i) {
      ATTN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float2 x = unpack(query[i][r], T{});
        squared[r % 2] += x.x * x.x + x.y * x.y;
      }
    }
    add_quads(squared);
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) squared[r] = inverse_length(squared[r]) * p.factor;
    ATTN_UNROLL
    for (int i = 0; i < P::kWidth / 16; ++i) {
      ATTN_UNROLL
      for (int r = 0; r < 4; ++r) query[i][r] = scaled<T>(query[i][r], squared[r % 2]);
      keep_here(query[i]);
    }
  }

  // What products are added to. Rows r and r + 8 have the same entries, eight columns apart.
  ATTN_DEVICE void begin_scores(const Tile& tile) {
    barrier_wait(shared.bias_arrived(biases.index), biases.parity);
    const float* from =
        shared.bias(biases.index) + (tile.first_key & 3) + (P::kQueries - 1 - row) + lane % 4 * 2;
    float2 below = make_float2(from[-8], from[-7]);
    ATTN_UNROLL
    for (int j = 0; j < P::kKeys / 8; ++j) {
      const float2 above = make_float2(from[8 * j], from[8 * j + 1]);
      score[4 * j] = above.x - shift[0], score[4 * j + 1] = above.y - shift[0];
      score[4 * j + 2] = below.x - shift[1], score[4 * j + 3] = below.y - shift[1];
      below = above;
    }
    keep_here(score);
    release(shared.bias_free(biases.index));
    biases.advance();
  }

  ATTN_DEVICE void start_scores() {
    if constexpr (P::kHeld) {
      const uint64_t b = matrix(shared.key(keys.index), 0);
      ATTN_UNROLL
      for (int i = 0; i < P::kWidth / 16; ++i) {
        multiply_held<T, P::kKeys>(
            score, query[i], b + ((i / 4 * P::kKeys * 128 + i % 4 * 32) >> 4), P::kBias || i > 0);
      }
      products_commit();
      return;
    }
    const uint64_t a = matrix(shared.query(queries.index) + warpgroup * 64 * 128, 0);
    const uint64_t b = matrix(shared.key(keys.index), 0);
    ATTN_UNROLL
    for (int i = 0; i < P::kWidth / 16; ++i) {
      // 16 columns are 32 bytes of a row, or the next panel.
      const int panel = i / 4, bytes = i % 4 * 32;
      multiply_shared<T, P::kKeys>(score, a + ((panel * P::kQueries * 128 + bytes) >> 4),
                                   b + ((panel * P::kKeys * 128 + bytes) >> 4), P::kBias || i > 0);
    }
    products_commit();
  }

  ATTN_DEVICE void start_outputs(int accumulate) {
    const uint64_t b = matrix(shared.value(values.index), P::kKeys * 128);
    ATTN_UNROLL
    for (int i = 0; i < P::kKeys / 16; ++i) {
      multiply_registers<T, P::kWidth>(out, weight[i], b + ((i * 16 * 128) >> 4),
                                       i > 0 ? 1 : accumulate);
    }
    products_commit();
  }

  // Which of its keys of tile i a thread's queries see.
  ATTN_DEVICE void find_seen(uint32_t (&seen)[2], const Tile& tile, int i) const {
    const int column = tile.first_key + i * P::kKeys + lane % 4 * 2;
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      const int query = tile.first_query + row + 8 * below;
      seen[below] = bits_seen(p.band, p.band.of(tile.head, query), column);
    }
  }

  template <bool kMasked>
  ATTN_DEVICE void find_weights(const uint32_t (&seen)[2]) {
    if constexpr (!P::kUnitKeys) {
      barrier_wait(shared.factors_ready(slots.index), slots.parity);
    }
    const int column = lane % 4 * 2;
    const float* factors = shared.factors(slots.index) + column;
    ATTN_UNROLL
    for (int j = 0; j < P::kKeys / 8; ++j) {
      float2 factor = make_float2(1.0f, 1.0f);
      if constexpr (!P::kUnitKeys) factor = load2(factors + 8 * j);
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        float x = score[4 * j + e];
        if constexpr (!P::kUnitKeys) x *= e % 2 ? factor.y : factor.x;
        if constexpr (kMasked) x = seen[e / 2] >> (2 * j + e % 2) & 1 ? x : -INFINITY;
        x = fast_exp2(x);
        sum[e / 2] += x;
        score[4 * j + e] = x;
      }
    }
  }

  // Weights are in their registers before products that read them start.
  ATTN_DEVICE void keep_weights() {
    ATTN_UNROLL
    for (int i = 0; i < P::kKeys / 16; ++i) keep_here(weight[i]);
  }

  ATTN_DEVICE void release(uint64_t* barrier) const { release_buffer(barrier, lane); }

  ATTN_DEVICE void store(const Tile& tile) {
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      const int query = tile.first_query + row + 8 * below;
      const float total = sum[below];
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
      const int64_t index = int64_t{tile.head} * p.M + query;
      T* to = static_cast<T*>(p.out) + index * p.D + lane % 4 * 8;
      const int columns =
          query < tile.past_query ? p.D - lane % 4 * 8 : 0;  // from this lane's first on
      ATTN_UNROLL
      for (int i = 0; i < (P::kWidth + 31) / 32; ++i) {
        store_part(to + 32 * i, out, i, below, inverse, lane, 32 * i < columns);
      }
      if (lane % 4 == 0 && query < tile.past_query) {
        float lse = total > 0.0f ? logf(total) : -INFINITY;
        if constexpr (P::kBias) {
          lse += p.bias.greatest[int64_t{tile.head % p.H} * p.bias.padded + query];
        }
        p.lse[index] = lse;
      }
    }
  }
};

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    forward_kernel(const __grid_constant__ Forward p) {
#ifdef ATTN_HOPPER
  const Shared<P> shared{aligned_shared_memory()};
  if (threadIdx.x == 0) {
    prefetch_map(&p.query);
    prefetch_map(&p.key);
    prefetch_map(&p.value);
    shared.init_barriers();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    fewer_registers<P::kFetchRegisters>();
    const Fetch<P> fetch{p, shared};
    const int warp = shuffle(static_cast<int>(threadIdx.x / 32), 0);
    if (warp == 0) {
      fetch.load();
    } else {
      fetch.prepare(warp - 1, threadIdx.x % 32);
    }
  } else {
    more_registers<P::kMultiplyRegisters>();
    Multiply<P> multiply(p, shared, threadIdx.x - 128);
    multiply.run();
  }
#endif
}

}  // namespace attn::cuda::cosine

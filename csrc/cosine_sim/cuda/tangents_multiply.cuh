// A warpgroup that multiplies, for results and their tangents at once: 64 queries against all keys
// that they see.
//
// With S = scale q^.k^, S' its tangent and P = exp(S): l = sum P, l' = sum P S', and
// out = sum P value / l, tangent_out = (sum P value' + (P S') value - l' out) / l. Exponents are
// bounded as in forward_multiply.cuh. Six products for one exponential: weights are computed while
// products make S', and P S' while products make both sums of P, so that a warpgroup waits for
// nothing but the first scores of a tile, when the others keep the matrix units busy. Turns, which
// keep warpgroups apart, cost an eighth (LOG.md).
#pragma once

#include "cosine_sim/cuda/accumulators.cuh"
#include "cosine_sim/cuda/tangents_plan.cuh"
#include "cosine_sim/cuda/unit_rows.cuh"

namespace attn::cuda::cosine {

template <class P>
struct TangentMultiply {
  using T = typename P::T;
  static constexpr int kScores = P::kKeys / 2;  // of a thread: rows g and g + 8
  static constexpr int kOutputs = P::kWidth / 2;
  static constexpr int kSteps = P::kWidth / 16;  // of a product over columns
  static constexpr int kKeySteps = P::kKeys / 16;

  const Tangents& p;
  TangentShared<P> shared;
  int warpgroup;  // of those that multiply
  int lane, row;  // `row` of the tile, and row + 8

  Ring<P::kStages> ring;  // of keys and of values
  Ring<1> queries;

  float out[kOutputs], tangent_out[kOutputs];
  float score[kScores], tangent[kScores];
  uint32_t weight[kKeySteps][4], moved[kKeySteps][4];  // P and P S'
  float sum[2], weight_sum[2], moved_sum[2];  // of both rows: of P, and of what is multiplied

  ATTN_DEVICE TangentMultiply(const Tangents& problem, TangentShared<P> memory, int thread)
      : p(problem), shared(memory) {
    warpgroup = shuffle(thread / 128, 0);  // the same register for all lanes
    lane = thread % 32;
    row = warpgroup * 64 + thread % 128 / 32 * 16 + lane / 4;
  }

  ATTN_DEVICE void run() {
    Tile tile;
    for (Tiles<P> tiles{p}; tiles.next(tile);) {
      attend(tile);
      store(tile);
    }
  }

 private:
  ATTN_DEVICE void attend(const Tile& tile) {
    ATTN_UNROLL
    for (int i = 0; i < 2; ++i) sum[i] = weight_sum[i] = moved_sum[i] = 0.0f;
    barrier_wait(shared.query_arrived(warpgroup), queries.parity);
    queries.advance();
    normalise();
    for (int i = tile.keys.end - 1; i >= 0; --i) step(tile, i, i + 1 < tile.keys.end);
    add_quads(sum);
    add_quads(weight_sum);
    add_quads(moved_sum);
  }

  ATTN_DEVICE void step(const Tile& tile, int i, int accumulate) {
    const int stage = ring.index;
    const uint32_t parity = ring.parity;
    ring.advance();
    barrier_wait(shared.key_arrived(stage), parity);
    products_fence();
    start_scores(stage);
    start_tangents(stage);
    products_wait<1>();
    keep_here(score);
    if (!tile.keys.is_full(i)) hide_unseen(tile, i);
    ATTN_UNROLL
    for (int j = 0; j < kScores; ++j) {
      score[j] = fast_exp2(score[j]);
      sum[j / 2 % 2] += score[j];
    }
    pack_weights<T>(weight, score);
    ATTN_UNROLL
    for (int k = 0; k < kKeySteps; ++k) keep_here(weight[k]);
    barrier_wait(shared.value_arrived(stage), parity);
    products_fence();
    start_outputs(stage, accumulate);
    products_wait<1>();
    keep_here(tangent);
    release(shared.key_free(stage));
    if (i == 0) release(shared.query_free(warpgroup));
    move_weights();
    products_fence();
    start_moved(stage);
    products_wait<0>();
    keep_here(out);
    keep_here(tangent_out);
    release(shared.value_free(stage));
  }

  // Both sums are of what is multiplied, rounded to 16 bits: of a row whose weight is that of one
  // key, what values lose by rounding is lost in the sums too.
  ATTN_DEVICE void move_weights() {
    ATTN_UNROLL
    for (int i = 0; i < kKeySteps; ++i) {
      ATTN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float2 w = unpack(weight[i][r], T{});
        const int j = 8 * i + 2 * r;
        moved[i][r] = pack(w.x * tangent[j], w.y * tangent[j + 1], T{});
        const float2 m = unpack(moved[i][r], T{});
        weight_sum[r % 2] += w.x + w.y;
        moved_sum[r % 2] += m.x + m.y;
      }
      keep_here(moved[i]);
    }
  }

  ATTN_DEVICE void hide_unseen(const Tile& tile, int i) {
    const int column = tile.first_key + i * P::kKeys + lane % 4 * 2;
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      const int query = tile.first_query + row + 8 * below;
      const uint32_t seen = bits_seen(p.band, p.band.of(tile.head, query), column);
      ATTN_UNROLL
      for (int j = 0; j < P::kKeys / 4; ++j) {
        float& x = score[4 * (j / 2) + 2 * below + j % 2];
        x = seen >> j & 1 ? x : -INFINITY;
      }
    }
  }

  // --- products; each starts where the ones before it end

  // Rows of queries become unit vectors where they lie.
  ATTN_DEVICE void normalise() const {
    constexpr int kLanes = P::kWidth / 8;
    unsigned char* tile = shared.query(warpgroup);
    const int first = row - lane / 4 - warpgroup * 64 + lane / kLanes;
#pragma unroll 4
    for (int i = 0; i < 16; i += 32 / kLanes) {
      uint32_t* at = piece<64>(tile, first + i, lane % kLanes);
      uint32_t* tangent_at = piece<64>(tile + P::kQueryBytes, first + i, lane % kLanes);
      uint4 x = load4(at), its_tangent = load4(tangent_at);
      make_unit<T, kLanes>(x, its_tangent, p.factor, p.scale);
      store4(at, x);
      store4(tangent_at, its_tangent);
    }
    fence_async();
    named_sync(1 + warpgroup, 128);
  }

  // d (+)= queries keys^T, of which `ahead` and `behind` are tiles.
  ATTN_DEVICE void add_product(float (&d)[kScores], unsigned char* ahead, unsigned char* behind,
                               int accumulate) const {
    const uint64_t a = matrix(ahead, 0), b = matrix(behind, 0);
    ATTN_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      // 16 columns are 32 bytes of a row, or the next panel.
      const int panel = i / 4, bytes = i % 4 * 32;
      const uint64_t at = b + ((panel * P::kKeys * 128 + bytes) >> 4);
      multiply_shared<T, P::kKeys>(d, a + ((panel * 64 * 128 + bytes) >> 4), at,
                                   i > 0 ? 1 : accumulate);
    }
  }

  ATTN_DEVICE void start_scores(int stage) {
    add_product(score, shared.query(warpgroup), shared.key(stage), 0);
    products_commit();
  }

  ATTN_DEVICE void start_tangents(int stage) {
    unsigned char* key = shared.key(stage);
    unsigned char* ahead = shared.query(warpgroup);
    add_product(tangent, ahead + P::kQueryBytes, key, 0);
    add_product(tangent, ahead, key + P::kKeyBytes, 1);
    products_commit();
  }

  // d (+)= weights values.
  ATTN_DEVICE void add_values(float (&d)[kOutputs], const uint32_t (&weights)[kKeySteps][4],
                              unsigned char* value, int accumulate) const {
    const uint64_t b = matrix(value, P::kKeys * 128);
    ATTN_UNROLL
    for (int i = 0; i < kKeySteps; ++i) {
      multiply_registers<T, P::kWidth>(d, weights[i], b + ((i * 16 * 128) >> 4),
                                       i > 0 ? 1 : accumulate);
    }
  }

  ATTN_DEVICE void start_outputs(int stage, int accumulate) {
    unsigned char* value = shared.value(stage);
    add_values(out, weight, value, accumulate);
    add_values(tangent_out, weight, value + P::kKeyBytes, accumulate);
    products_commit();
  }

  ATTN_DEVICE void start_moved(int stage) {
    add_values(tangent_out, moved, shared.value(stage), 1);
    products_commit();
  }

  ATTN_DEVICE void release(uint64_t* barrier) const { release_buffer(barrier, lane); }

  // --- results

  ATTN_DEVICE void store(const Tile& tile) {
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      const int query = tile.first_query + row + 8 * below;
      const float total = weight_sum[below];
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
      const float slope = moved_sum[below] * inverse;  // the tangent of lse
      const bool inside = query < tile.past_query;
      const int64_t index = int64_t{tile.head} * p.M + query;
      const int64_t place = index * p.D + lane % 4 * 8;
      ATTN_UNROLL
      for (int i = 0; i < P::kWidth / 32; ++i) {
        ATTN_UNROLL
        for (int j = 0; j < 8; ++j) {
          float& o = out[16 * i + 4 * (j / 2) + 2 * below + j % 2];
          float& t = tangent_out[16 * i + 4 * (j / 2) + 2 * below + j % 2];
          o *= inverse;
          t = t * inverse - slope * o;
        }
        store_part(static_cast<T*>(p.out) + place + 32 * i, out, i, below, 1.0f, lane, inside);
        store_part(static_cast<T*>(p.tangent_out) + place + 32 * i, tangent_out, i, below, 1.0f,
                   lane, inside);
      }
      if (lane % 4 == 0 && inside) {
        p.lse[index] = total > 0.0f ? logf(sum[below]) : -INFINITY;
        p.tangent_lse[index] = slope;
      }
    }
  }
};

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    tangents_kernel(const __grid_constant__ Tangents p) {
#ifdef ATTN_HOPPER
  const TangentShared<P> shared{aligned_shared_memory()};
  if (threadIdx.x == 0) {
    for (const TensorMap* map :
         {&p.query, &p.key, &p.value, &p.tangent_query, &p.tangent_key, &p.tangent_value}) {
      prefetch_map(map);
    }
    shared.init_barriers();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    fewer_registers<P::kFetchRegisters>();
    const TangentFetch<P> fetch{p, shared};
    const int warp = shuffle(static_cast<int>(threadIdx.x / 32), 0);
    if (warp == 0) {
      fetch.load_keys();
    } else if (warp <= P::kWarpgroups) {
      fetch.load_queries(warp - 1);
    }
  } else {
    more_registers<P::kMultiplyRegisters>();
    TangentMultiply<P> multiply(p, shared, threadIdx.x - 128);
    multiply.run();
  }
#endif
}

}  // namespace attn::cuda::cosine

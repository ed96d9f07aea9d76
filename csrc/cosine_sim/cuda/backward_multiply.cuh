// A warpgroup of the backward: 64 keys against all queries that see them.
//
// Scores are computed transposed, keys x queries, so that weights and their gradients are left
// operands from registers:
//   S^T = K Q^T, P^T = 2^(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta),
//   dV += P^T dO, dK += dS^T Q, and of both warpgroups together dQ += dS K.
// Queries and keys are unit vectors, queries times scale * log2(e). Products are waited for in the
// order in which they start: dV, dQ and dK of these queries, then S and dP of the next.
#pragma once

#include "cosine_sim/cuda/backward_fetch.cuh"

namespace attn::cuda::cosine {

template <class P>
struct MultiplyBackward {
  using T = typename P::T;
  static constexpr int kScores = P::kQueries / 2;  // of a thread: keys `row` and `row` + 8
  static constexpr int kSteps = P::kQueries / 16;
  static constexpr int kColumns = P::kWidth / 2;

  const Backward& p;
  BackwardShared<P> shared;
  int warpgroup;
  int thread, lane, row;  // `row` of the block, and row + 8

  Ring<P::kStages> queries, grads;
  uint32_t keys_parity = 0;
  int buffer = 0;  // of dS

  float grad_key[kColumns], grad_value[kColumns];
  float score[kScores], change[kScores];         // S, then P; dP
  float part[32];                                // of dQ
  uint32_t weight[kSteps][4], slope[kSteps][4];  // P and dS as operands

  ATTN_DEVICE MultiplyBackward(const Backward& problem, BackwardShared<P> memory, int index)
      : p(problem), shared(memory) {
    warpgroup = shuffle(index / 128, 0);  // the same register for all lanes
    thread = index % 128;
    lane = index % 32;
    row = warpgroup * 64 + thread / 32 * 16 + lane / 4;
  }

  ATTN_DEVICE void run() {
    Block block;
    for (Blocks<P> blocks{p}; blocks.next(block);) {
      attend(block);
      store_keys(block);
    }
  }

 private:
  ATTN_DEVICE void attend(const Block& block) {
    Cursor at(p, block);
    barrier_wait(shared.keys_arrived(), keys_parity);
    barrier_wait(shared.query_arrived(queries.index), queries.parity);
    products_fence();
    start_scores();
    barrier_wait(shared.values_arrived(), keys_parity);
    keys_parity ^= 1;
    barrier_wait(shared.grad_arrived(grads.index), grads.parity);
    start_change();
    products_wait<1>();
    keep_here(score);
    find_all_weights(block, at);
    pack_all(weight, score);
    products_wait<0>();
    keep_here(change);
    find_slopes();
    int accumulate = 0;
    for (int i = 1; i < block.tiles; ++i) {
      step(block, at, accumulate);
      accumulate = 1;
    }
    release(shared.values_free());
    start_sums(accumulate);
    start_grad_key(queries.index, accumulate);
    products_wait<2>();
    keep_here(grad_value);
    release(shared.grad_free(grads.index));
    grads.advance();
    store_values(block);
    products_wait<1>();
    keep_here(part);
    add_grad_query(at);
    products_wait<0>();
    keep_here(grad_key);
    release(shared.query_free(queries.index));
    queries.advance();
    buffer ^= 1;
  }

  // The sums of these queries, and the weights and slopes of the next.
  ATTN_DEVICE void step(const Block& block, Cursor& at, int accumulate) {
    start_sums(accumulate);
    const int stage = queries.index;
    start_grad_key(stage, accumulate);
    products_wait<2>();
    keep_here(grad_value);
    release(shared.grad_free(grads.index));
    grads.advance();
    queries.advance();
    products_wait<1>();
    keep_here(part);
    add_grad_query(at);
    at.advance(block);
    barrier_wait(shared.query_arrived(queries.index), queries.parity);
    products_fence();
    start_scores();
    barrier_wait(shared.grad_arrived(grads.index), grads.parity);
    if constexpr (P::kLate) {
      products_wait<1>();
      keep_here(grad_key);
      release(shared.query_free(stage));
      products_fence();
      start_change();
    } else {
      start_change();
      products_wait<2>();
      keep_here(grad_key);
      release(shared.query_free(stage));
    }
    products_wait<1>();
    keep_here(score);
    find_all_weights(block, at);
    pack_all(weight, score);
    products_wait<0>();
    keep_here(change);
    buffer ^= 1;
    find_slopes();
  }

  // dV and dQ, once the slopes of both warpgroups are in shared memory.
  ATTN_DEVICE void start_sums(int accumulate) {
    keep_all(weight);
    keep_all(slope);
    products_fence();
    start_grad_value(accumulate);
    named_sync(1, 256);
    start_grad_query();
  }

  ATTN_DEVICE void find_all_weights(const Block& block, const Cursor& at) {
    uint32_t seen[2];
    if (block.queries.is_full(at.tile)) {
      find_weights<false>(seen);
    } else {
      const int column = at.tile * P::kQueries + lane % 4 * 2;
      ATTN_UNROLL
      for (int below = 0; below < 2; ++below) {
        const int key = block.first_key + row + 8 * below;
        seen[below] = bits_seen(p.band, p.band.of(block.head, key), column);
        if (key >= block.past_key) seen[below] = 0;
      }
      find_weights<true>(seen);
    }
  }

  // 64 keys x queries, from rows of keys or values and rows of queries or grad_out.
  ATTN_DEVICE void start_transposed(float (&to)[kScores], unsigned char* keys,
                                    unsigned char* rows) {
    const uint64_t a = matrix(keys + warpgroup * 64 * 128, 0), b = matrix(rows, 0);
    ATTN_UNROLL
    for (int i = 0; i < P::kWidth / 16; ++i) {
      const int panel = i / 4, bytes = i % 4 * 32;
      multiply_shared<T, P::kQueries>(to, a + ((panel * P::kKeys * 128 + bytes) >> 4),
                                      b + ((panel * P::kQueries * 128 + bytes) >> 4), i > 0);
    }
    products_commit();
  }
  ATTN_DEVICE void start_scores() {
    start_transposed(score, shared.key(), shared.query(queries.index));
  }
  ATTN_DEVICE void start_change() {
    start_transposed(change, shared.value(), shared.grad_out(grads.index));
  }

  // Weights or slopes, keys x queries, times rows of queries or grad_out.
  ATTN_DEVICE void start_sum(float (&to)[kColumns], const uint32_t (&a)[kSteps][4],
                             unsigned char* rows, int accumulate) {
    const uint64_t b = matrix(rows, P::kQueries * 128);
    ATTN_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      multiply_registers<T, P::kWidth>(to, a[i], b + ((i * 16 * 128) >> 4), i > 0 ? 1 : accumulate);
    }
    products_commit();
  }
  ATTN_DEVICE void start_grad_value(int accumulate) {
    start_sum(grad_value, weight, shared.grad_out(grads.index), accumulate);
  }
  ATTN_DEVICE void start_grad_key(int stage, int accumulate) {
    start_sum(grad_key, slope, shared.query(stage), accumulate);
  }

  // This warpgroup's 64 queries or 64 columns of dS K.
  ATTN_DEVICE void start_grad_query() {
    const int rows = P::kQueries == 64 ? 0 : warpgroup, columns = P::kQueries == 64 ? warpgroup : 0;
    const uint64_t a = matrix(shared.score(buffer) + rows * P::kKeys * 128, P::kKeys * 128);
    const uint64_t b = matrix(shared.key() + columns * P::kKeys * 128, P::kKeys * 128);
    ATTN_UNROLL
    for (int i = 0; i < P::kKeys / 16; ++i) {
      multiply_transposed<T, 64>(part, a + ((i * 16 * 128) >> 4), b + ((i * 16 * 128) >> 4), i > 0);
    }
    products_commit();
  }

  template <bool kMasked>
  ATTN_DEVICE void find_weights(const uint32_t (&seen)[2]) {
    const int column = lane % 4 * 2;
    const float* lse = shared.rows(queries.index) + column;
    ATTN_UNROLL
    for (int j = 0; j < P::kQueries / 8; ++j) {
      const float2 bits = load2(lse + 8 * j);
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        float x = score[4 * j + e] - (e % 2 ? bits.y : bits.x);
        if constexpr (kMasked) x = seen[e / 2] >> (2 * j + e % 2) & 1 ? x : -INFINITY;
        score[4 * j + e] = fast_exp2(x);
      }
    }
  }

  ATTN_DEVICE void find_slopes() {
    const float* delta = shared.rows(queries.index) + P::kQueries + lane % 4 * 2;
    ATTN_UNROLL
    for (int j = 0; j < P::kQueries / 8; ++j) {
      const float2 d = load2(delta + 8 * j);
      ATTN_UNROLL
      for (int e = 0; e < 4; e += 2) {
        float2 w = make_float2(score[4 * j + e], score[4 * j + e + 1]);
        // Where registers are few, from the operand of dV.
        if constexpr (P::kQueries == 128) w = unpack(weight[j / 2][j % 2 * 2 + e / 2], T{});
        change[4 * j + e] = w.x * (change[4 * j + e] - d.x);
        change[4 * j + e + 1] = w.y * (change[4 * j + e + 1] - d.y);
      }
    }
    pack_all(slope, change);
    store_slopes();
  }

  ATTN_DEVICE static void pack_all(uint32_t (&to)[kSteps][4], const float (&from)[kScores]) {
    ATTN_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      ATTN_UNROLL
      for (int r = 0; r < 4; ++r) {
        to[i][r] = pack(from[8 * i + 2 * r], from[8 * i + 2 * r + 1], T{});
      }
    }
  }
  // They are in their registers before products that read them start.
  ATTN_DEVICE static void keep_all(uint32_t (&x)[kSteps][4]) {
    ATTN_UNROLL
    for (int i = 0; i < kSteps; ++i) keep_here(x[i]);
  }

  // dS to shared memory: rows of keys, 64 queries each.
  ATTN_DEVICE void store_slopes() {
    unsigned char* to = shared.score(buffer);
    // 16 keys, then the same 8 queries on. Addresses are found anew each time, to hold no
    // registers.
    const int at = opaque(row - lane / 4 + lane % 16);
    ATTN_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      store_matrices(piece<P::kKeys>(to, at, 2 * i + lane / 16), slope[i]);
    }
    fence_async();
  }

  ATTN_DEVICE void release(uint64_t* barrier) const {
    sync_warp();
    if (lane == 0) barrier_arrive(barrier);
  }

  // In the order in which threads hold them: 16 bytes of a thread are rows g and g + 8, two
  // columns.
  ATTN_DEVICE void add_grad_query(const Cursor& at) const {
    const int64_t tile = int64_t{at.head} * p.query_tiles + at.tile;
    float* to = p.grad_query + (tile * 2 + warpgroup) * (64 * 64) + thread * 4;
    ATTN_UNROLL
    for (int i = 0; i < 8; ++i) {
      atomic_add4(to + i * 512,
                  make_float4(part[4 * i], part[4 * i + 1], part[4 * i + 2], part[4 * i + 3]));
    }
  }

  // While the last products of queries and keys run.
  ATTN_DEVICE void store_values(const Block& block) {
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      store_row(static_cast<T*>(p.grad_value), grad_value + 2 * below, block,
                opaque(row + 8 * below));
    }
  }

  ATTN_DEVICE void store_keys(const Block& block) {
    uint32_t unit[2][P::kWidth / 8];
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      const int at = opaque(row + 8 * below);
      ATTN_UNROLL
      for (int j = 0; j < P::kWidth / 8; ++j) {
        unit[below][j] = piece<P::kKeys>(shared.key(), at, j)[lane % 4];
      }
    }
    release(shared.keys_free());
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      const int at = opaque(row + 8 * below), key = block.first_key + at;
      const int64_t index = int64_t{block.head} * p.N + key;
      through_norm(below, key < block.past_key ? p.key_inverse[index] : 0.0f, unit[below]);
      store_row(static_cast<T*>(p.grad_key), grad_key + 2 * below, block, at);
    }
  }

  ATTN_DEVICE void store_row(T* to, const float* pairs, const Block& block, int at) const {
    const int key = block.first_key + at;
    const bool inside = key < block.past_key;
    const int given = inside ? p.order.of(block.head / p.Hk, key) : 0;
    to += (int64_t{block.head} * p.N + given) * P::kWidth;
    ATTN_UNROLL
    for (int i = 0; i < P::kWidth / 32; ++i) store_part(to + 32 * i, pairs + 16 * i, inside);
  }

  // grad_key from that of unit keys: (g - k (k.g)) / |k|. Below the floor of the norm the divisor
  // is a constant.
  ATTN_DEVICE void through_norm(int below, float inverse, const uint32_t (&unit)[P::kWidth / 8]) {
    float along = 0.0f;
    ATTN_UNROLL
    for (int j = 0; j < P::kWidth / 8; ++j) {
      const float2 k = unpack(unit[j], T{});
      along += k.x * grad_key[4 * j + 2 * below] + k.y * grad_key[4 * j + 2 * below + 1];
    }
    along += shuffle_xor(along, 1);
    along += shuffle_xor(along, 2);
    if (inverse >= 1e12f) along = 0.0f;
    inverse *= static_cast<float>(1 / kBitsPerNat);  // queries have it as a factor
    ATTN_UNROLL
    for (int j = 0; j < P::kWidth / 8; ++j) {
      const float2 k = unpack(unit[j], T{});
      float* g = grad_key + 4 * j + 2 * below;
      g[0] = (g[0] - k.x * along) * inverse;
      g[1] = (g[1] - k.y * along) * inverse;
    }
  }

  // 32 columns of a row, of which a thread has 8 pairs apart: four threads exchange them, so that
  // each stores 8 neighbours.
  ATTN_DEVICE void store_part(T* to, const float* pairs, bool inside) const {
    uint32_t x[4];
    ATTN_UNROLL
    for (int j = 0; j < 4; ++j) x[j] = pack(pairs[4 * j], pairs[4 * j + 1], T{});
    transpose_lanes(x, lane);
    if (inside) {
      store4(reinterpret_cast<uint32_t*>(to + lane % 4 * 8), make_uint4(x[0], x[1], x[2], x[3]));
    }
  }
};

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    backward_kernel(const __grid_constant__ Backward p) {
#ifdef ATTN_HOPPER
  const BackwardShared<P> shared{aligned_shared_memory()};
  if (threadIdx.x == 0) {
    prefetch_map(&p.query);
    prefetch_map(&p.key);
    prefetch_map(&p.value);
    prefetch_map(&p.grad_out);
    shared.init_barriers();
  }
  __syncthreads();
  let_next_kernel_start();
  if (threadIdx.x < 128) {
    fewer_registers<P::kFetchRegisters>();
    if (shuffle(static_cast<int>(threadIdx.x / 32), 0) == 0) fetch_backward<P>(p, shared);
  } else {
    more_registers<P::kMultiplyRegisters>();
    MultiplyBackward<P> multiply(p, shared, threadIdx.x - 128);
    multiply.run();
  }
#endif
}

}  // namespace attn::cuda::cosine

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
#include "cosine_sim/cuda/backward_finish.cuh"
#include "cosine_sim/cuda/backward_store.cuh"

namespace attn::cuda::cosine {

template <class P>
struct MultiplyBackward {
  using T = typename P::T;
  static constexpr int kScores = P::kQueries / 2;  // of a thread: keys `row` and `row` + 8
  static constexpr int kSteps = P::kQueries / 16;
  static constexpr int kSums = P::kColumns / 2;

  const Backward& p;
  BackwardShared<P> shared;
  int warpgroup;
  int thread, lane, row;  // `row` of the block, and row + 8

  Ring<P::kQueryStages> queries;
  Ring<P::kGradStages> grads;
  Ring<P::kKeyStages> keys;
  uint32_t others_parity = 0;
  int buffer = 0;  // of dS

  float grad_key[kSums], grad_value[kSums];
  float score[kScores], change[kScores];         // S, then P; dP
  float part[P::kPart / 2];                      // of dQ
  uint32_t weight[kSteps][4], slope[kSteps][4];  // P and dS as operands

  ATTN_DEVICE MultiplyBackward(const Backward& problem, BackwardShared<P> memory, int index)
      : p(problem), shared(memory) {
    warpgroup = shuffle(index / 128, 0);  // the same register for all lanes
    thread = index & 127;
    lane = index & 31;
    row = warpgroup * 64 + thread / 32 * 16 + lane / 4;
  }

  ATTN_DEVICE void run() {
    if constexpr (P::kScoreBuffers == 1) named_arrive(3 - warpgroup, 256);
    Block block;
    for (Blocks<P> blocks{p}; blocks.next(block);) {
      attend(block);
      store_keys(block);
    }
  }

 private:
  ATTN_DEVICE void attend(const Block& block) {
    Cursor<P> at(p, block);
    barrier_wait(shared.keys_ready(keys.index), keys.parity);
    wait_for_queries();
    products_fence();
    start_scores();
    // Its parity turns with every block, as the one of two buffers of keys does.
    barrier_wait(shared.values_arrived(), P::kNarrow ? keys.index : keys.parity);
    if constexpr (!P::kNarrow) keys.advance();
    wait_for_grads();
    start_change();
    find_weights_and_slopes(block, at);
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
    KeyRows<P>{p, block, lane, row}.store_values(grad_value);  // while products run
    products_wait<1>();
    keep_here(part);
    add_grad_query(block, at, queries.index);
    products_wait<0>();
    keep_here(grad_key);
    release(shared.query_free(queries.index));
    queries.advance();
  }

  // The sums of these queries, and the weights and slopes of the next.
  ATTN_DEVICE void step(const Block& block, Cursor<P>& at, int accumulate) {
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
    add_grad_query(block, at, stage);
    at.advance(block);
    wait_for_queries();
    products_fence();
    start_scores();
    wait_for_grads();
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
    find_weights_and_slopes(block, at);
  }

  // Of S and dP, which are under way.
  ATTN_DEVICE void find_weights_and_slopes(const Block& block, const Cursor<P>& at) {
    products_wait<1>();
    keep_here(score);
    if constexpr (P::kHalves == 2) release(shared.other_query_free());
    find_all_weights(block, at);
    pack_all(weight, score);
    products_wait<0>();
    keep_here(change);
    if constexpr (P::kHalves == 2) release(shared.other_grad_free());
    others_parity ^= 1;
    if constexpr (P::kScoreBuffers == 2) buffer ^= 1;
    find_slopes();
  }

  ATTN_DEVICE void wait_for_queries() const {
    barrier_wait(shared.query_arrived(queries.index), queries.parity);
    if constexpr (P::kHalves == 2) barrier_wait(shared.other_query_arrived(), others_parity);
  }
  ATTN_DEVICE void wait_for_grads() const {
    if constexpr (P::kHalves == 2) barrier_wait(shared.other_grad_arrived(), others_parity);
    barrier_wait(shared.grad_arrived(grads.index), grads.parity);
  }

  // dV and dQ, once the slopes of both warpgroups are in shared memory.
  ATTN_DEVICE void start_sums(int accumulate) {
    keep_all(weight);
    keep_all(slope);
    products_fence();
    start_grad_value(accumulate);
    named_sync(1, 256 + 32 * P::kSumWarps);
    start_grad_query();
  }

  ATTN_DEVICE void find_all_weights(const Block& block, const Cursor<P>& at) {
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

  // Found anew each time, to hold no registers.
  ATTN_DEVICE unsigned char* keys_here() const {
    return shared.key(P::kKeyStages > 1 ? opaque(keys.index) : 0);
  }

  // 64 keys x queries, from rows of keys or values and rows of queries or grad_out.
  ATTN_DEVICE void start_transposed(float (&to)[kScores], unsigned char* keys, unsigned char* rows,
                                    unsigned char* other_rows) {
    ATTN_UNROLL
    for (int half = 0; half < P::kHalves; ++half) {
      const int place =
          P::kHalves == 2 || P::kNarrow ? opaque(warpgroup) : warpgroup;  // to hold no addresses
      const uint64_t a = matrix(keys + half * P::kKeyBytes + place * 64 * 128, 0);
      const uint64_t b = matrix(half ? other_rows : rows, 0);
      ATTN_UNROLL
      for (int i = 0; i < P::kColumns / 16; ++i) {
        const int panel = i / 4, bytes = i % 4 * 32;
        multiply_shared<T, P::kQueries>(to, a + ((panel * P::kKeys * 128 + bytes) >> 4),
                                        b + ((panel * P::kQueries * 128 + bytes) >> 4),
                                        half + i > 0);
      }
    }
    products_commit();
  }
  ATTN_DEVICE void start_scores() {
    start_transposed(score, keys_here(), shared.query(queries.index), shared.other_query());
  }
  ATTN_DEVICE void start_change() {
    start_transposed(change, shared.value(), shared.grad_out(grads.index), shared.other_grad_out());
  }

  // Weights or slopes, keys x queries, times rows of queries or grad_out.
  ATTN_DEVICE void start_sum(float (&to)[kSums], const uint32_t (&a)[kSteps][4],
                             unsigned char* rows, int accumulate) {
    const uint64_t b = matrix(rows, P::kQueries * 128);
    ATTN_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      multiply_registers<T, P::kColumns>(to, a[i], b + ((i * 16 * 128) >> 4),
                                         i > 0 ? 1 : accumulate);
    }
    products_commit();
  }
  ATTN_DEVICE void start_grad_value(int accumulate) {
    start_sum(grad_value, weight, shared.grad_out(grads.index), accumulate);
  }
  ATTN_DEVICE void start_grad_key(int stage, int accumulate) {
    start_sum(grad_key, slope, shared.query(stage), accumulate);
  }

  // This warpgroup's 64 queries or panel of columns of dS K.
  ATTN_DEVICE void start_grad_query() {
    const int rows = P::kQueries == 64 ? 0 : warpgroup, columns = P::kQueries == 64 ? warpgroup : 0;
    const uint64_t a =
        matrix(shared.score(buffer) + rows * P::kScoreRows * 128, P::kScoreRows * 128);
    const uint64_t b = matrix(keys_here() + columns * P::kKeys * 128, P::kKeys * 128);
    ATTN_UNROLL
    for (int i = 0; i < P::kKeys / 16; ++i) {
      multiply_transposed<T, P::kPart>(part, a + ((i * 16 * 128) >> 4), b + ((i * 16 * 128) >> 4),
                                       i > 0);
    }
    products_commit();
  }

  template <bool kMasked>
  ATTN_DEVICE void find_weights(const uint32_t (&seen)[2]) {
    const int column = lane % 4 * 2;
    const float* lse = shared.rows(queries.index) + column;
    // Keys k and k + 8 have the same relative biases, eight queries apart.
    const float* bias = shared.bias(queries.index) + (P::kQueries - 1 + row) - column;
    float2 below = make_float2(0.0f, 0.0f), above = below;
    if constexpr (P::kBias) below = make_float2(bias[8], bias[7]);
    ATTN_UNROLL
    for (int j = 0; j < P::kQueries / 8; ++j) {
      const float2 bits = load2(lse + 8 * j);
      if constexpr (P::kBias) above = make_float2(bias[-8 * j], bias[-8 * j - 1]);
      const float terms[4] = {above.x - bits.x, above.y - bits.y, below.x - bits.x,
                              below.y - bits.y};
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        float x = score[4 * j + e] + terms[e];
        if constexpr (kMasked) x = seen[e / 2] >> (2 * j + e % 2) & 1 ? x : -INFINITY;
        score[4 * j + e] = fast_exp2(x);
      }
      below = above;
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
    if constexpr (P::kScoreBuffers == 1) named_sync(2 + warpgroup, 256);
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
      store_matrices(piece<P::kScoreRows>(to, at, 2 * i + lane / 16), slope[i]);
    }
    fence_async();
  }

  ATTN_DEVICE void release(uint64_t* barrier) const { release_buffer(barrier, lane); }

  // In the order in which threads hold them, [128 / kQueries][kWidth / 8][128][4]: 16 bytes of a
  // thread are rows g and g + 8, two columns.
  ATTN_DEVICE void add_grad_query(const Block& block, const Cursor<P>& at, int stage) {
    // The other warpgroup may write slopes where these were read.
    if constexpr (P::kScoreBuffers == 1) named_arrive(3 - warpgroup, 256);
    constexpr int kSecond = P::kQueries == 64 ? P::kColumns - 64 : P::kPart;  // columns
    const int64_t tile =
        int64_t{at.head + (P::kNarrow ? block.sums_head : 0)} * p.query_tiles + at.tile;
    float* to = p.query_sums + tile * (P::kQueries * P::kWidth) + block.half * (P::kColumns * 64) +
                warpgroup * (64 * P::kPart) + thread * 4;
    const bool is_new = P::kNarrow && at.tile >= block.new_from;
    if constexpr (P::kNarrow) {
      if (at.tile < block.done_before) {
        const FinishedQueries<P> rows{p, shared, warpgroup, thread, lane};
        if (!is_new) rows.add_sums(part, to);
        return rows.store(part, at, stage);
      }
    }
    ATTN_UNROLL
    for (int i = 0; i < P::kPart / 8; ++i) {
      if (i >= kSecond / 8 && warpgroup == 1) continue;  // columns past the end
      const float4 x = make_float4(part[4 * i], part[4 * i + 1], part[4 * i + 2], part[4 * i + 3]);
      is_new ? store4(to + i * 512, x) : atomic_add4(to + i * 512, x);
    }
  }

  ATTN_DEVICE void store_keys(const Block& block) {
    if constexpr (P::kHalves == 2) {
      release(shared.keys_free(keys.index));
      store_key_sums(block);
    } else {
      const KeyRows<P> rows{p, block, lane, row};
      typename KeyRows<P>::Units unit;
      rows.load(shared.key(keys.index), unit);
      float inverse[2];
      if constexpr (P::kNarrow) rows.load_inverse(shared.key_inverse(keys.index), inverse);
      release(shared.keys_free(keys.index));
      rows.store_keys(grad_key, unit, inverse);
    }
    if constexpr (P::kNarrow) keys.advance();
  }

  // The way through the norm needs whole rows: that of a kernel of its own, as for queries.
  ATTN_DEVICE void store_key_sums(const Block& block) const {
    ATTN_UNROLL
    for (int below = 0; below < 2; ++below) {
      const int key = block.first_key + opaque(row + 8 * below);
      const int first = block.half * P::kColumns;
      const int columns = key < block.past_key ? p.D - first : 0;
      const int64_t given = KeyRows<P>{p, block, lane, row}.row_given(key);
      float* to = p.key_sums + given * p.D + first + lane % 4 * 2;
      ATTN_UNROLL
      for (int j = 0; j < P::kColumns / 8; ++j) {
        const float* pair = grad_key + 4 * j + 2 * below;
        if (8 * j < columns) store2(to + 8 * j, make_float2(pair[0], pair[1]));
      }
    }
  }
};

}  // namespace attn::cuda::cosine

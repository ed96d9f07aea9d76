// The warpgroup that fetches: one warp keeps the copy engine busy, three find the lengths of keys
// in tiles that have arrived, and turn queries that no warpgroup holds into unit vectors.
#pragma once

#include "cosine_sim/cuda/forward_plan.cuh"

namespace attn::cuda::cosine {

template <class P>
struct Fetch {
  using T = typename P::T;
  const Forward& p;
  Shared<P> shared;

  // One warp: keys and values in the order in which they are multiplied, so that values of a
  // tile come after the keys of the next, also from one tile of queries to the next.
  ATTN_DEVICE void load() const {
    Ring<P::kStages> keys, values;
    Ring<P::kQueryStages> queries;
    Ring<P::kBiasSlots> biases;
    Tile tile;
    int row = 0, head = -1, batch = 0;  // of the values that are due
    for (Tiles<P> tiles{p}; tiles.next(tile);) {
      const int query_head = tile.head % p.H, tile_batch = tile.head / p.H;
      const int key_head = query_head / (p.H / p.Hk);
      barrier_wait(shared.query_free(queries.index), queries.parity ^ 1);
      uint64_t* arrived = shared.query_arrived(queries.index);
      if (one_lane()) {
        barrier_arrive_expect(arrived, P::kQueryBytes + P::kShiftBytes);
        load_tile<P::kPanels, P::kQueries>(shared.query(queries.index), &p.query, arrived,
                                           tile.first_query, query_head, tile_batch);
        if constexpr (P::kBias) {
          const int64_t at = int64_t{query_head} * p.bias.padded + tile.first_query;
          load_bytes(shared.shifts(queries.index), p.bias.shift + at, P::kShiftBytes, arrived);
        }
      }
      queries.advance();
      for (int i = tile.keys.end - 1; i >= 0; --i) {
        const int first = tile.first_key + i * P::kKeys;
        load_keys(keys, first, key_head, tile_batch);
        if constexpr (P::kBias) load_bias(biases, first, query_head, tile);
        if (head >= 0) load_values(values, row, head, batch);
        row = first, head = key_head, batch = tile_batch;
      }
    }
    if (head >= 0) load_values(values, row, head, batch);
  }

  // Three warps, as many rows as lanes hold at a time, in turns. A slot of factors is written again
  // kStages + 1 tiles of keys later, when every warp that read it has given back a later tile's
  // keys.
  ATTN_DEVICE void prepare(int warp, int lane) const {
    Ring<P::kStages> keys;
    Ring<P::kQueryStages> queries;
    Ring<P::kSlots> slots;
    Tile tile;
    int turn = warp;  // mine when it is 0
    for (Tiles<P> tiles{p}; tiles.next(tile);) {
      if constexpr (!P::kHeld) {
        barrier_wait(shared.query_arrived(queries.index), queries.parity);
#pragma unroll 1
        for (int group = 0; group < P::kQueryGroups; ++group) {
          if (is_mine(turn)) {
            normalise(shared.query(queries.index), group, lane);
            fence_async();
            sync_warp();
            if (lane == 0) barrier_arrive(shared.query_ready(queries.index));
          }
        }
        queries.advance();
      }
      if constexpr (!P::kUnitKeys) {
        for (int i = tile.keys.end - 1; i >= 0; --i) {
          barrier_wait(shared.key_arrived(keys.index), keys.parity);
#pragma unroll 1
          for (int group = 0; group < P::kKeyGroups; ++group) {
            if (is_mine(turn)) find_factors(keys.index, slots.index, group, lane);
          }
          keys.advance();
          slots.advance();
        }
      }
    }
  }

 private:
  ATTN_DEVICE static bool is_mine(int& turn) {
    const bool mine = turn == 0;
    turn = mine ? 2 : turn - 1;
    return mine;
  }

  ATTN_DEVICE void load_keys(Ring<P::kStages>& keys, int row, int head, int batch) const {
    barrier_wait(shared.key_free(keys.index), keys.parity ^ 1);
    uint64_t* arrived = shared.key_arrived(keys.index);
    if (one_lane()) {
      barrier_arrive_expect(arrived, P::kKeyBytes);
      load_tile<P::kPanels, P::kKeys>(shared.key(keys.index), &p.key, arrived, row, head, batch);
    }
    keys.advance();
  }

  // From the diagonal of the first key and the tile's last query on, or a little before.
  ATTN_DEVICE void load_bias(Ring<P::kBiasSlots>& biases, int row, int head,
                             const Tile& tile) const {
    barrier_wait(shared.bias_free(biases.index), biases.parity ^ 1);
    uint64_t* arrived = shared.bias_arrived(biases.index);
    if (one_lane()) {
      const int diagonal = (row & ~3) - tile.first_query - (P::kQueries - 1);
      barrier_arrive_expect(arrived, P::kBiasBytes);
      load_bytes(shared.bias(biases.index), p.bias.from(head, diagonal), P::kBiasBytes, arrived);
    }
    biases.advance();
  }

  ATTN_DEVICE void load_values(Ring<P::kStages>& values, int row, int head, int batch) const {
    barrier_wait(shared.value_free(values.index), values.parity ^ 1);
    uint64_t* arrived = shared.value_arrived(values.index);
    if (one_lane()) {
      barrier_arrive_expect(arrived, P::kKeyBytes);
      load_tile<P::kPanels, P::kKeys>(shared.value(values.index), &p.value, arrived, row, head,
                                      batch);
    }
    values.advance();
  }

  // Rows of queries times factor / |row|, where they lie.
  ATTN_DEVICE void normalise(unsigned char* tile, int group, int lane) const {
    constexpr int kPieces = P::kWidth / 8;
    const int row = group * 32 + lane;
    float squared = 0.0f;
#pragma unroll P::kUnroll
    for (int i = 0; i < kPieces; ++i) {
      squared = squares<T>(load4(piece<P::kQueries>(tile, row, i)), squared);
    }
    const float factor = inverse_length(squared) * p.factor;
#pragma unroll P::kUnroll
    for (int i = 0; i < kPieces; ++i) {
      uint32_t* at = piece<P::kQueries>(tile, row, i);
      const uint4 x = load4(at);
      store4(at, make_uint4(scaled<T>(x.x, factor), scaled<T>(x.y, factor), scaled<T>(x.z, factor),
                            scaled<T>(x.w, factor)));
    }
  }

  ATTN_DEVICE void find_factors(int stage, int slot, int group, int lane) const {
    const int row = group * 32 + lane;
    float first = 0.0f, second = 0.0f;
#pragma unroll P::kUnroll
    for (int i = 0; i < P::kWidth / 8; i += 2) {
      first = squares<T>(load4(piece<P::kKeys>(shared.key(stage), row, i)), first);
      second = squares<T>(load4(piece<P::kKeys>(shared.key(stage), row, i + 1)), second);
    }
    shared.factors(slot)[row] = inverse_length(first + second);
    sync_warp();
    if (lane == 0) {
      barrier_arrive(shared.factors_ready(slot));
      barrier_arrive(shared.key_free(stage));
    }
  }
};

}  // namespace attn::cuda::cosine

// What a launch for results and their tangents is made of: sizes, shared memory, who fetches.
//
// Letters as in forward_plan.cuh.
#pragma once

#include "cosine_sim/cuda/forward_plan.cuh"

namespace attn::cuda::cosine {

// Queries and keys are unit vectors, made so that their products are powers of 2 and tangents of
// scores nats: see find_unit_rows.
struct Tangents : Forward {
  TensorMap tangent_query, tangent_key, tangent_value;
  void* tangent_out;   // [B, H, M, D], contiguous
  float* tangent_lse;  // [B, H, M]
};

template <class T_, int kWidth_, int kKeys_, int kWarpgroups_, bool kHeld_, bool kTurns_>
struct TangentPlan {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kWarpgroups = kWarpgroups_;    // that multiply, 64 queries each
  static constexpr int kQueries = 64 * kWarpgroups_;  // of a tile
  static constexpr int kStages = 2;                   // tiles of keys and of values under way
  static constexpr bool kHeld = kHeld_;               // queries and their tangents in registers
  static constexpr bool kTurns = kTurns_;  // warpgroups take turns at the matrix units
  static constexpr int kThreads = 128 * (kWarpgroups_ + 1);
  static constexpr int kFetchRegisters = kWarpgroups_ == 3 ? 32 : 24;
  static constexpr int kMultiplyRegisters = kWarpgroups_ == 3 ? 160 : 240;

  static constexpr int kPanels = kWidth / 64;  // of 64 columns: rows of 128 bytes
  static constexpr int kQueryBytes = kQueries * kPanels * 128;
  static constexpr int kKeyBytes = kKeys * kPanels * 128;
  // Each with its tangent behind it.
  static constexpr int kKeyOffset = 2 * kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + kStages * 2 * kKeyBytes;
  static constexpr int kBarrierOffset = kValueOffset + kStages * 2 * kKeyBytes;
  static constexpr int kSharedBytes = kBarrierOffset + (2 + 4 * kStages) * 8;

  static_assert(kWidth % 64 == 0);
  static_assert(kSharedBytes <= 227 * 1024);
};

// Shared memory under names.
template <class P>
struct TangentShared {
  unsigned char* base;

  ATTN_DEVICE unsigned char* query() const { return base; }
  ATTN_DEVICE unsigned char* key(int stage) const {
    return base + P::kKeyOffset + stage * 2 * P::kKeyBytes;
  }
  ATTN_DEVICE unsigned char* value(int stage) const {
    return base + P::kValueOffset + stage * 2 * P::kKeyBytes;
  }
  // Barriers: arrived and free, of queries, of keys and of values.
  ATTN_DEVICE uint64_t* barrier(int i) const {
    return reinterpret_cast<uint64_t*>(base + P::kBarrierOffset) + i;
  }
  ATTN_DEVICE uint64_t* query_arrived() const { return barrier(0); }
  ATTN_DEVICE uint64_t* query_free() const { return barrier(1); }
  ATTN_DEVICE uint64_t* key_arrived(int stage) const { return barrier(2 + stage); }
  ATTN_DEVICE uint64_t* key_free(int stage) const { return barrier(2 + P::kStages + stage); }
  ATTN_DEVICE uint64_t* value_arrived(int stage) const {
    return barrier(2 + 2 * P::kStages + stage);
  }
  ATTN_DEVICE uint64_t* value_free(int stage) const { return barrier(2 + 3 * P::kStages + stage); }

  ATTN_DEVICE void init_barriers() const {
    constexpr int kWarps = 4 * P::kWarpgroups;
    barrier_init(query_arrived(), 1);
    barrier_init(query_free(), kWarps);
    for (int i = 0; i < P::kStages; ++i) {
      barrier_init(key_arrived(i), 1);
      barrier_init(key_free(i), kWarps);
      barrier_init(value_arrived(i), 1);
      barrier_init(value_free(i), kWarps);
    }
    barrier_init_fence();
  }
};

// One warp keeps the copy engine busy.
template <class P>
struct TangentFetch {
  const Tangents& p;
  TangentShared<P> shared;

  ATTN_DEVICE void load() const {
    Ring<P::kStages> keys, values;
    Ring<1> queries;
    Tile tile;
    for (Tiles<P> tiles{p}; tiles.next(tile);) {
      const int query_head = tile.head % p.H, batch = tile.head / p.H;
      const int head = query_head / (p.H / p.Hk);
      barrier_wait(shared.query_free(), queries.parity ^ 1);
      load_both<P::kQueries>(shared.query(), &p.query, &p.tangent_query, shared.query_arrived(),
                             tile.first_query, query_head, batch);
      queries.advance();
      for (int i = tile.keys.end - 1; i >= 0; --i) {
        const int row = tile.first_key + i * P::kKeys;
        barrier_wait(shared.key_free(keys.index), keys.parity ^ 1);
        load_both<P::kKeys>(shared.key(keys.index), &p.key, &p.tangent_key,
                            shared.key_arrived(keys.index), row, head, batch);
        keys.advance();
        barrier_wait(shared.value_free(values.index), values.parity ^ 1);
        load_both<P::kKeys>(shared.value(values.index), &p.value, &p.tangent_value,
                            shared.value_arrived(values.index), row, head, batch);
        values.advance();
      }
    }
  }

 private:
  template <int kRows>
  ATTN_DEVICE static void load_both(unsigned char* to, const TensorMap* x, const TensorMap* tangent,
                                    uint64_t* arrived, int row, int head, int batch) {
    constexpr int kBytes = kRows * P::kPanels * 128;
    if (!one_lane()) return;
    barrier_arrive_expect(arrived, 2 * kBytes);
    load_tile<P::kPanels, kRows>(to, x, arrived, row, head, batch);
    load_tile<P::kPanels, kRows>(to + kBytes, tangent, arrived, row, head, batch);
  }
};

}  // namespace attn::cuda::cosine

// What a launch for results and their tangents is made of: sizes, shared memory, who fetches.
//
// Letters as in forward_plan.cuh.
#pragma once

#include "cosine_sim/cuda/forward_plan.cuh"

namespace attn::cuda::cosine {

// Unit queries are times scale * log2(e), so that scores are in bits; tangents of queries are times
// scale and those of keys times 1 / log2(e), so that tangents of scores are in nats.
struct Tangents : Forward {
  TensorMap tangent_query, tangent_key, tangent_value;
  float scale;
  void* tangent_out;   // [B, H, M, D], contiguous
  float* tangent_lse;  // [B, H, M]
};

template <class T_, int kWidth_, int kWarpgroups_, int kStages_>
struct TangentPlan {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kKeys = 64;                    // of a tile
  static constexpr int kWarpgroups = kWarpgroups_;    // that multiply, 64 queries each
  static constexpr int kQueries = 64 * kWarpgroups_;  // of a tile
  static constexpr int kStages = kStages_;            // tiles of keys and of values under way
  static constexpr int kThreads = 128 * (kWarpgroups_ + 1);
  static constexpr int kFetchRegisters = kWarpgroups_ == 3 ? 32 : 24;
  static constexpr int kMultiplyRegisters = kWarpgroups_ == 3 ? 160 : 240;

  static constexpr int kPanels = kWidth / 64;             // of 64 columns: rows of 128 bytes
  static constexpr int kQueryBytes = 64 * kPanels * 128;  // of a warpgroup
  static constexpr int kKeyBytes = kKeys * kPanels * 128;
  // Each with its tangent behind it.
  static constexpr int kKeyOffset = kWarpgroups * 2 * kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + kStages * 2 * kKeyBytes;
  static constexpr int kBarrierOffset = kValueOffset + kStages * 2 * kKeyBytes;
  static constexpr int kSharedBytes = kBarrierOffset + (2 * kWarpgroups + 4 * kStages) * 8;

  static_assert(kWidth % 64 == 0);
  static_assert(kSharedBytes <= 227 * 1024);
};

// Shared memory under names.
template <class P>
struct TangentShared {
  unsigned char* base;

  ATTN_DEVICE unsigned char* query(int warpgroup) const {
    return base + warpgroup * 2 * P::kQueryBytes;
  }
  ATTN_DEVICE unsigned char* key(int stage) const {
    return base + P::kKeyOffset + stage * 2 * P::kKeyBytes;
  }
  ATTN_DEVICE unsigned char* value(int stage) const {
    return base + P::kValueOffset + stage * 2 * P::kKeyBytes;
  }
  // Barriers: arrived and free, of each warpgroup's queries, of keys and of values.
  ATTN_DEVICE uint64_t* barrier(int i) const {
    return reinterpret_cast<uint64_t*>(base + P::kBarrierOffset) + i;
  }
  ATTN_DEVICE uint64_t* query_arrived(int warpgroup) const { return barrier(2 * warpgroup); }
  ATTN_DEVICE uint64_t* query_free(int warpgroup) const { return barrier(2 * warpgroup + 1); }
  ATTN_DEVICE uint64_t* key_arrived(int stage) const { return barrier(kFirst + 4 * stage); }
  ATTN_DEVICE uint64_t* key_free(int stage) const { return barrier(kFirst + 4 * stage + 1); }
  ATTN_DEVICE uint64_t* value_arrived(int stage) const { return barrier(kFirst + 4 * stage + 2); }
  ATTN_DEVICE uint64_t* value_free(int stage) const { return barrier(kFirst + 4 * stage + 3); }

  ATTN_DEVICE void init_barriers() const {
    for (int i = 0; i < P::kWarpgroups; ++i) {
      barrier_init(query_arrived(i), 1);
      barrier_init(query_free(i), 4);
    }
    constexpr int kWarps = 4 * P::kWarpgroups;
    for (int i = 0; i < P::kStages; ++i) {
      barrier_init(key_arrived(i), 1);
      barrier_init(key_free(i), kWarps);
      barrier_init(value_arrived(i), 1);
      barrier_init(value_free(i), kWarps);
    }
    barrier_init_fence();
  }

 private:
  static constexpr int kFirst = 2 * P::kWarpgroups;
};

// What keeps the copy engine busy: a warp for keys and values, and one for each warpgroup's
// queries, so that a warpgroup goes on where it is done, whatever the others do.
template <class P>
struct TangentFetch {
  const Tangents& p;
  TangentShared<P> shared;

  ATTN_DEVICE void load_queries(int warpgroup) const {
    Ring<1> queries;
    Tile tile;
    for (Tiles<P> tiles{p}; tiles.next(tile);) {
      barrier_wait(shared.query_free(warpgroup), queries.parity ^ 1);
      load_both<64>(shared.query(warpgroup), &p.query, &p.tangent_query,
                    shared.query_arrived(warpgroup), tile.first_query + 64 * warpgroup,
                    tile.head % p.H, tile.head / p.H);
      queries.advance();
    }
  }

  ATTN_DEVICE void load_keys() const {
    Ring<P::kStages> ring;
    Tile tile;
    for (Tiles<P> tiles{p}; tiles.next(tile);) {
      const int head = tile.head % p.H / (p.H / p.Hk), batch = tile.head / p.H;
      for (int i = tile.keys.end - 1; i >= 0; --i) {
        const int row = tile.first_key + i * P::kKeys, stage = ring.index;
        barrier_wait(shared.key_free(stage), ring.parity ^ 1);
        load_both<P::kKeys>(shared.key(stage), &p.key, &p.tangent_key, shared.key_arrived(stage),
                            row, head, batch);
        barrier_wait(shared.value_free(stage), ring.parity ^ 1);
        load_both<P::kKeys>(shared.value(stage), &p.value, &p.tangent_value,
                            shared.value_arrived(stage), row, head, batch);
        ring.advance();
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

// What a forward launch is made of: sizes, shared memory, and the order of tiles.
//
// Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D width of all rows,
// which lie in tiles of kWidth columns.
#pragma once

#include "cosine_sim/cuda/band.cuh"
#include "cosine_sim/cuda/relative_bias.cuh"
#include "cosine_sim/cuda/rows.cuh"

namespace attn::cuda::cosine {

struct Forward {
  TensorMap query, key, value;
  void* out;   // [B, H, M, D], contiguous
  float* lse;  // [B, H, M]
  int B, H, Hk, M, D;
  Band band;           // which keys a query sees
  float factor;        // scale * log2(e): a unit query times it, times a unit key, is a power of 2
  int query_tiles;     // of a head
  int pairs;           // the order of tiles, see Tiles: a long and a short row one after the other
  int heads_together;  // else: how many heads are walked through together, 1 or all
  int places;  // pairs or tiles, and how many of them are of the heads walked through together
  int places_in_part;
  RelativeBias bias;
};

// As many as registers and shared memory hold; measured.
constexpr int keys_of_tile(int width) {
  return width == 256 ? 80 : width == 192 ? 96 : width == 80 || width == 96 ? 112 : 128;
}

template <class T_, int kWidth_, int kWarpgroups_, int kQueryStages_, bool kUnitKeys_, bool kTurns_,
          bool kHeld_, bool kBias_ = false>
struct Plan {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kWarpgroups = kWarpgroups_;    // that multiply, 64 queries each
  static constexpr int kQueries = 64 * kWarpgroups_;  // of a tile
  static constexpr int kKeys = keys_of_tile(kWidth_);
  // Tiles of keys and of values under way.
  static constexpr int kStages = kWidth_ > 128 ? 2 : kWidth_ == 64 && kHeld_ ? 5 : 3;
  static constexpr int kQueryStages = kQueryStages_;
  // Keys are unit vectors already; else warps that only fetch find 1 / |k| in shared memory.
  static constexpr bool kUnitKeys = kUnitKeys_;
  static constexpr bool kTurns = kTurns_;  // warpgroups take turns at the matrix units
  // Queries in registers: less of shared memory's bandwidth, and the warpgroups that multiply make
  // them unit vectors there. Else warps that only fetch do in shared memory.
  static constexpr bool kHeld = kHeld_;
  static constexpr bool kBias =
      kBias_;  // scores begin as relative_bias; then keys are unit vectors
  static constexpr int kThreads = 128 * (kWarpgroups_ + 1);
  // Together all registers of a multiprocessor: 504 or 512 for a thread of each warpgroup.
  static constexpr int kFetchRegisters = kWarpgroups_ == 3 ? 32 : kHeld_ ? 56 : 40;
  static constexpr int kMultiplyRegisters = kWarpgroups_ == 3 ? 160 : kHeld_ ? 224 : 232;
  static constexpr int kUnroll = (kFetchRegisters - 24) / 4;  // pieces of a row under way

  static constexpr int kQueryGroups = kQueries / 32;
  static constexpr int kKeyGroups = kKeys / 32;
  static constexpr int kSlots = kStages + 1;  // of key factors: see Fetch::prepare

  static constexpr int kPanels = (kWidth + 63) / 64;  // of 64 columns: rows of 128 bytes
  static constexpr int kQueryBytes = kQueries * kPanels * 128;
  static constexpr int kKeyBytes = kKeys * kPanels * 128;
  static constexpr int kKeyOffset = kQueryStages * kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + kStages * kKeyBytes;
  static constexpr int kFactorOffset = kValueOffset + kStages * kKeyBytes;
  static constexpr int kBiasOffset = kFactorOffset + (kUnitKeys ? 0 : kSlots * kKeys * 4);
  // Diagonals of a tile, from a multiple of 16 bytes on; shifts of its queries.
  static constexpr int kBiasSlots = kBias ? 2 : 0;
  static constexpr int kBiasBytes = (kQueries + kKeys + 4) * 4;
  static constexpr int kShiftBytes = kBias ? kQueries * 4 : 0;
  static constexpr int kShiftOffset = kBiasOffset + kBiasSlots * kBiasBytes;
  static constexpr int kBarrierOffset = kShiftOffset + kQueryStages * kShiftBytes;
  static constexpr int kBarriers = 3 * kQueryStages + 4 * kStages + kSlots + 2 * kBiasSlots;
  static constexpr int kSharedBytes = kBarrierOffset + kBarriers * 8;

  static_assert(kWidth % 16 == 0);
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert(kUnitKeys || !kBias);
};

// Shared memory under names.
template <class P>
struct Shared {
  unsigned char* base;

  ATTN_DEVICE unsigned char* query(int stage) const { return base + stage * P::kQueryBytes; }
  ATTN_DEVICE unsigned char* key(int stage) const {
    return base + P::kKeyOffset + stage * P::kKeyBytes;
  }
  ATTN_DEVICE unsigned char* value(int stage) const {
    return base + P::kValueOffset + stage * P::kKeyBytes;
  }
  ATTN_DEVICE float* factors(int slot) const {
    return reinterpret_cast<float*>(base + P::kFactorOffset) + slot * P::kKeys;
  }
  ATTN_DEVICE float* bias(int slot) const {
    return reinterpret_cast<float*>(base + P::kBiasOffset + slot * P::kBiasBytes);
  }
  ATTN_DEVICE float* shifts(int stage) const {
    return reinterpret_cast<float*>(base + P::kShiftOffset + stage * P::kShiftBytes);
  }
  // Barriers: arrived, normalised and free of queries; arrived and free of keys; of values;
  // factors; arrived and free of relative_bias.
  ATTN_DEVICE uint64_t* barrier(int i) const {
    return reinterpret_cast<uint64_t*>(base + P::kBarrierOffset) + i;
  }
  ATTN_DEVICE uint64_t* query_arrived(int stage) const { return barrier(stage); }
  ATTN_DEVICE uint64_t* query_ready(int stage) const { return barrier(P::kQueryStages + stage); }
  ATTN_DEVICE uint64_t* query_free(int stage) const { return barrier(2 * P::kQueryStages + stage); }
  ATTN_DEVICE uint64_t* key_arrived(int stage) const { return barrier(kFirst + stage); }
  ATTN_DEVICE uint64_t* key_free(int stage) const { return barrier(kFirst + P::kStages + stage); }
  ATTN_DEVICE uint64_t* value_arrived(int stage) const {
    return barrier(kFirst + 2 * P::kStages + stage);
  }
  ATTN_DEVICE uint64_t* value_free(int stage) const {
    return barrier(kFirst + 3 * P::kStages + stage);
  }
  ATTN_DEVICE uint64_t* factors_ready(int slot) const {
    return barrier(kFirst + 4 * P::kStages + slot);
  }
  ATTN_DEVICE uint64_t* bias_arrived(int slot) const {
    return barrier(kFirst + 4 * P::kStages + P::kSlots + slot);
  }
  ATTN_DEVICE uint64_t* bias_free(int slot) const { return bias_arrived(P::kBiasSlots + slot); }

  ATTN_DEVICE void init_barriers() const {
    constexpr int kWarps = 4 * P::kWarpgroups;
    for (int i = 0; i < P::kQueryStages; ++i) {
      barrier_init(query_arrived(i), 1);
      barrier_init(query_ready(i), P::kQueryGroups);
      barrier_init(query_free(i), kWarps);
    }
    for (int i = 0; i < P::kStages; ++i) {
      barrier_init(key_arrived(i), 1);
      barrier_init(key_free(i), kWarps + (P::kUnitKeys ? 0 : P::kKeyGroups));
      barrier_init(value_arrived(i), 1);
      barrier_init(value_free(i), kWarps);
    }
    for (int i = 0; i < P::kSlots; ++i) barrier_init(factors_ready(i), P::kKeyGroups);
    for (int i = 0; i < P::kBiasSlots; ++i) {
      barrier_init(bias_arrived(i), 1);
      barrier_init(bias_free(i), kWarps);
    }
    barrier_init_fence();
  }

 private:
  static constexpr int kFirst = 3 * P::kQueryStages;
};

// Queries of one head, and the tiles of keys that they see, counted from a first key.
struct Tile {
  int head;  // of B * H
  int first_query, past_query;
  int first_key;
  Range keys;  // from 0
};

// The block's tiles. Where the last rows of tiles are the longest and there are many, pairs of a
// long and a short row of one head, whose keys and values stay in the L2 cache; where there are
// few, all heads together with the longest rows first. Else heads in order. Every other round runs
// backwards, which evens out the rest.
template <class P>
struct Tiles {
  const Forward& p;
  int round = 0;

  // Straight-line code: behind branches the compiler no longer sees that all lanes agree, and takes
  // the addresses of the main loop out of uniform registers.
  ATTN_DEVICE bool next(Tile& tile) {
    const bool pairs = p.pairs != 0;
    const int turn = pairs ? round / 2 : round;
    const int place = turn & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int index = turn * gridDim.x + place;
    if (index >= p.places) return false;
    const int part = index / p.places_in_part, rest = index - part * p.places_in_part;
    const int from_last = rest / p.heads_together;
    tile.head = part + rest - from_last * p.heads_together;
    const int longer = p.query_tiles - 1 - from_last;
    const bool is_shorter = pairs && (round & 1);
    const int row = is_shorter ? from_last : longer;
    round += pairs && from_last == longer ? 2 : 1;  // the row in the middle has no other

    tile.first_query = row * P::kQueries;
    tile.past_query = tile.first_query + P::kQueries < p.M ? tile.first_query + P::kQueries : p.M;
    tile.keys = tiles_seen<P::kKeys, true>(p.band, tile.head, tile.first_query, tile.past_query,
                                           tile.first_key);
    return true;
  }
};

}  // namespace attn::cuda::cosine

// What a backward launch is made of: sizes, shared memory, and the order of work.
//
// A block owns 128 keys and walks over the queries that see them. Letters: B batch, H query heads,
// Hk key/value heads, M queries, N keys, D width of all rows.
#pragma once

#include "cosine_sim/cuda/band.cuh"
#include "cosine_sim/cuda/unit_keys.cuh"

namespace attn::cuda::cosine {

struct Backward {
  TensorMap query, key, value,
      grad_out;                 // queries and keys are unit vectors, see backward_rows.cuh
  const float* rows;            // [B * H, query_tiles, 2, kQueries]: lse in bits, delta
  const float* key_inverse;     // [B * Hk, N]: 1 / |k|
  float* grad_query;            // [B * H, query_tiles, 2, 8, 128, 4], see add_grad_query
  void *grad_key, *grad_value;  // [B, Hk, N, D], contiguous, as keys and values are given
  Order order;                  // of keys and values
  int B, H, Hk, M, N;
  Band band;                    // which queries see a key, of those of whole tiles
  int query_tiles, key_blocks;  // of a head
  int pairs;                    // the order of blocks, see Blocks: a long and a short one in turn
  int places, places_in_head;   // pairs or blocks
};

template <class T_, int kWidth_>
struct BackwardPlan {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kQueries = 8192 / kWidth_;  // of a tile
  static constexpr int kKeys = 128;                // of a block: 64 for each of two warpgroups
  static constexpr int kStages = 3;                // of queries, and of grad_out
  static constexpr int kThreads = 384;
  static constexpr int kFetchRegisters = 24;
  static constexpr int kMultiplyRegisters = 240;
  // dP starts when dK has given its operand's registers back: S and dP of 128 queries take 128.
  static constexpr bool kLate = kQueries == 128;
  // A warpgroup's part of dQ is 64 x 64: all queries and half of the columns, or the reverse.
  static_assert(kQueries * kWidth == 128 * 64);

  static constexpr int kKeyBytes = kKeys * kWidth * 2;
  static constexpr int kQueryBytes = kQueries * kWidth * 2;
  static constexpr int kScoreBytes = kQueries * kKeys * 2;
  static constexpr int kRowBytes = 2 * kQueries * 4;

  static constexpr int kValueOffset = kKeyBytes;
  static constexpr int kQueryOffset = 2 * kKeyBytes;
  static constexpr int kGradOffset = kQueryOffset + kStages * kQueryBytes;
  static constexpr int kScoreOffset = kGradOffset + kStages * kQueryBytes;
  static constexpr int kRowOffset = kScoreOffset + 2 * kScoreBytes;
  static constexpr int kBarrierOffset = kRowOffset + kStages * kRowBytes;
  static constexpr int kBarriers = 4 + 4 * kStages;
  static constexpr int kSharedBytes = kBarrierOffset + kBarriers * 8;
  static_assert(kSharedBytes <= 227 * 1024);
};

template <class P>
struct BackwardShared {
  unsigned char* base;

  ATTN_DEVICE unsigned char* key() const { return base; }
  ATTN_DEVICE unsigned char* value() const { return base + P::kValueOffset; }
  ATTN_DEVICE unsigned char* query(int stage) const {
    return base + P::kQueryOffset + stage * P::kQueryBytes;
  }
  ATTN_DEVICE unsigned char* grad_out(int stage) const {
    return base + P::kGradOffset + stage * P::kQueryBytes;
  }
  // [kQueries / 64][keys][64 queries]
  ATTN_DEVICE unsigned char* score(int buffer) const {
    return base + P::kScoreOffset + buffer * P::kScoreBytes;
  }
  ATTN_DEVICE float* rows(int stage) const {
    return reinterpret_cast<float*>(base + P::kRowOffset + stage * P::kRowBytes);
  }
  ATTN_DEVICE uint64_t* barrier(int i) const {
    return reinterpret_cast<uint64_t*>(base + P::kBarrierOffset) + i;
  }
  ATTN_DEVICE uint64_t* keys_arrived() const { return barrier(0); }
  ATTN_DEVICE uint64_t* keys_free() const { return barrier(1); }
  ATTN_DEVICE uint64_t* values_arrived() const { return barrier(2); }
  ATTN_DEVICE uint64_t* values_free() const { return barrier(3); }
  ATTN_DEVICE uint64_t* query_arrived(int stage) const { return barrier(4 + stage); }
  ATTN_DEVICE uint64_t* query_free(int stage) const { return barrier(4 + P::kStages + stage); }
  ATTN_DEVICE uint64_t* grad_arrived(int stage) const {
    return barrier(4 + 2 * P::kStages + stage);
  }
  ATTN_DEVICE uint64_t* grad_free(int stage) const { return barrier(4 + 3 * P::kStages + stage); }

  ATTN_DEVICE void init_barriers() const {
    constexpr int kWarps = 8;
    barrier_init(keys_arrived(), 1);
    barrier_init(keys_free(), kWarps);
    barrier_init(values_arrived(), 1);
    barrier_init(values_free(), kWarps);
    for (int i = 0; i < P::kStages; ++i) {
      barrier_init(query_arrived(i), 1);
      barrier_init(query_free(i), kWarps);
      barrier_init(grad_arrived(i), 1);
      barrier_init(grad_free(i), kWarps);
    }
    barrier_init_fence();
  }
};

// Keys of one head, and the tiles of queries that see them, of each query head of the group.
struct Block {
  int head;  // of B * Hk
  int first_key, past_key;
  Range queries;
  int tiles;  // of all heads
};

// The blocks of a multiprocessor: heads in order, with blocks where the band has them, and where
// the first blocks are the longest, pairs of a long and a short one. Every other round runs
// backwards. Straight-line code: see the forward's Tiles.
template <class P>
struct Blocks {
  const Backward& p;
  int round = 0;

  ATTN_DEVICE bool next(Block& block) {
    const bool pairs = p.pairs != 0;
    const int turn = pairs ? round / 2 : round;
    const int place = turn & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int index = turn * gridDim.x + place;
    if (index >= p.places) return false;
    block.head = index / p.places_in_head;
    const int longer = index - block.head * p.places_in_head;
    const int shorter = p.key_blocks - 1 - longer;
    const int number = pairs && (round & 1) ? shorter : longer;
    round += pairs && longer == shorter ? 2 : 1;  // the block in the middle has no other
    block.first_key = number * P::kKeys;
    block.past_key = block.first_key + P::kKeys < p.N ? block.first_key + P::kKeys : p.N;
    if (p.band.tiles) {
      block.first_key = in_all_lanes(p.band.tiles[number]);
      block.past_key = in_all_lanes(p.band.tiles[number + 1]);
    }
    int origin;
    block.queries =
        tiles_seen<P::kQueries, false>(p.band, block.head, block.first_key, block.past_key, origin);
    // Keys past the end are hidden from all.
    if (block.past_key - block.first_key < P::kKeys) block.queries.full_end = 0;
    block.tiles = (block.queries.end - block.queries.begin) * (p.H / p.Hk);
    return true;
  }
};

// Walks over a block's tiles of queries.
struct Cursor {
  int head;  // of B * H
  int tile;

  ATTN_DEVICE Cursor(const Backward& p, const Block& block)
      : head(block.head * (p.H / p.Hk)), tile(block.queries.begin) {}
  ATTN_DEVICE void advance(const Block& block) {
    const bool last = tile + 1 == block.queries.end;
    tile = last ? block.queries.begin : tile + 1;
    head += last ? 1 : 0;
  }
};

}  // namespace attn::cuda::cosine

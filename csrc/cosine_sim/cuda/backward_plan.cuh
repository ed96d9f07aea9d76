// What a backward launch is made of: sizes, shared memory, and the order of work.
//
// A block owns 128 keys and walks over the queries that see them. Letters: B batch, H query heads,
// Hk key/value heads, M queries, N keys, D width of all rows, in tiles of kWidth columns.
#pragma once

#include "cosine_sim/cuda/backward_rows.cuh"
#include "cosine_sim/cuda/band.cuh"
#include "cosine_sim/cuda/relative_bias.cuh"

namespace attn::cuda::cosine {

struct Backward {
  TensorMap query, key, value,
      grad_out;                 // queries are unit vectors, see backward_rows.cuh
  const float* rows;            // [B * H, query_tiles, kRowParts, kQueries]: lse in bits, delta,
                                // and what makes queries unit vectors
  const float* key_inverse;     // [B * Hk, N]: 1 / |k|, where blocks do not find it
  float* query_sums;            // [B * H, query_tiles, kWidth / 8, ...], see add_grad_query; of
                                // whole heads [blocks of the grid, H / Hk, ...] instead
  float* key_sums;              // [B, Hk, N, D], of halves of columns: see key_gradients_kernel
  void *grad_key, *grad_value;  // [B, Hk, N, D], contiguous, as keys and values are given
  Order order;                  // of keys and values
  int B, H, Hk, M, N, D;
  Band band;                    // which queries see a key, of those of whole tiles
  int query_tiles, key_blocks;  // of a head
  // The order of blocks, see Blocks: a long and a short one in turn, or those of a head.
  int pairs;
  int places, places_in_head;  // pairs, blocks or heads
  RelativeBias bias;
  int whole_heads;
  float floor_factor;  // what queries get whose length is the norm's floor, without a sign
  void* grad_query;    // [B, H, M, D], which blocks write that have whole heads
};

template <class T_, int kWidth_, bool kBias_ = false>
struct BackwardPlan {
  using T = T_;
  static constexpr bool kBias = kBias_;  // scores begin as relative_bias
  static constexpr int kWidth = kWidth_;
  // Registers hold gradients of 128 columns: of wider rows a block has those of one half, its own
  // columns, and reads the others for S and dP alone.
  static constexpr int kHalves = kWidth_ > 128 ? 2 : 1;
  static constexpr int kColumns = kWidth_ / kHalves;
  static constexpr int kPanels = (kColumns + 63) / 64;      // of 64 columns: rows of 128 bytes
  static constexpr int kQueries = kWidth_ > 64 ? 64 : 128;  // of a tile
  static constexpr int kKeys = 128;  // of a block: 64 for each of two warpgroups
  // Narrow rows leave shared memory for the keys of the next block, which three warps make unit
  // vectors beside the products, and their sums stay in the L2 cache while a multiprocessor has a
  // whole head, see Blocks. Both cost wider rows more than they save, and with relative_bias these
  // warps have other work.
  static constexpr bool kNarrow = kWidth_ <= 64 && !kBias;
  static constexpr int kRowParts = kNarrow ? 3 : 2;
  static constexpr int kKeyStages = kNarrow ? 2 : 1;
  // Of own columns; of the others, where there are any, one. Queries are the last that dK needs,
  // and the first that S does.
  static constexpr int kQueryStages = kHalves == 2 ? 2 : 3;
  static constexpr int kGradStages = kHalves == 2 ? 1 : 3;
  static constexpr int kScoreBuffers = kHalves == 2 ? 1 : 2;
  static constexpr int kThreads = 384;
  static constexpr int kUnitThreads = 96;  // that make keys unit vectors
  static constexpr int kFetchRegisters = 24;
  static constexpr int kMultiplyRegisters = 240;
  // More than a launch of so many threads has would be waited for without an end.
  static_assert(kFetchRegisters + 2 * kMultiplyRegisters <= 3 * (65536 / kThreads / 8 * 8));
  // dP starts when dK has given its operand's registers back: S and dP of 128 queries take 128.
  static constexpr bool kLate = kWidth == 64;
  // A warpgroup's part of dQ: all queries and a panel of columns, or 64 queries and all columns.
  static constexpr int kPart = kQueries == 64 ? 64 : kColumns;
  static_assert(kPanels == (kQueries == 64 ? 2 : 1) && kColumns % 16 == 0);

  static constexpr int kSumWarps = kBias ? 3 : 0;  // that add up gradients of relative_bias
  static constexpr int kKeyBytes = kKeys * kPanels * 128;
  static constexpr int kQueryBytes = kQueries * kPanels * 128;
  // Rows of keys of a panel of dS, and rows of zeros around panels.
  static constexpr int kMarginRows = kBias ? 32 : 0, kScoreRows = kKeys + kMarginRows;
  static constexpr int kScoreBytes = kQueries * kScoreRows * 2;
  static constexpr int kRowBytes = 2 * kQueries * 4;  // lse and delta

  static constexpr int kValueOffset = kKeyStages * kHalves * kKeyBytes;
  static constexpr int kQueryOffset = kValueOffset + kHalves * kKeyBytes;
  static constexpr int kGradOffset = kQueryOffset + kQueryStages * kQueryBytes;
  static constexpr int kOtherOffset = kGradOffset + kGradStages * kQueryBytes;
  static constexpr int kScoreOffset =
      kOtherOffset + (kHalves - 1) * 2 * kQueryBytes + kMarginRows * 128;
  static constexpr int kRowOffset = kScoreOffset + kScoreBuffers * kScoreBytes;
  static constexpr int kBiasBytes = kBias ? (kKeys + kQueries) * 4 : 0;  // diagonals of a tile
  static constexpr int kBiasOffset = kRowOffset + kQueryStages * kRowBytes;
  // A warp's memory where it adds up diagonals: see SumDiagonals.
  static constexpr int kDiagonalRow = 40, kDiagonalFloats = 8 * kDiagonalRow;
  static constexpr int kDiagonalOffset = kBiasOffset + kQueryStages * kBiasBytes;
  static constexpr int kInverseOffset = kDiagonalOffset + kSumWarps * kDiagonalFloats * 4;
  static constexpr int kBarrierOffset = kInverseOffset + (kNarrow ? kKeyStages * kKeys * 4 : 0);
  static constexpr int kSharedBarriers = 8 + 2 * kQueryStages + 2 * kGradStages;
  static constexpr int kBarriers = kSharedBarriers + (kNarrow ? 3 * kKeyStages : 0);
  static constexpr int kSharedBytes = kBarrierOffset + kBarriers * 8;
  static_assert(kSharedBytes <= 227 * 1024);
};

template <class P>
struct BackwardShared {
  unsigned char* base;

  // Own columns, then the others.
  ATTN_DEVICE unsigned char* key(int stage) const {
    return base + stage * (P::kHalves * P::kKeyBytes);
  }
  // 1 / |k|, of narrow rows
  ATTN_DEVICE float* key_inverse(int stage) const {
    return reinterpret_cast<float*>(base + P::kInverseOffset) + stage * P::kKeys;
  }
  ATTN_DEVICE unsigned char* value() const { return base + P::kValueOffset; }
  ATTN_DEVICE unsigned char* query(int stage) const {
    return base + P::kQueryOffset + stage * P::kQueryBytes;
  }
  ATTN_DEVICE unsigned char* grad_out(int stage) const {
    return base + P::kGradOffset + stage * P::kQueryBytes;
  }
  ATTN_DEVICE unsigned char* other_query() const { return base + P::kOtherOffset; }
  ATTN_DEVICE unsigned char* other_grad_out() const {
    return base + P::kOtherOffset + P::kQueryBytes;
  }
  // [kQueries / 64][kScoreRows][64 queries]
  ATTN_DEVICE unsigned char* score(int buffer) const {
    return base + P::kScoreOffset + buffer * P::kScoreBytes;
  }
  ATTN_DEVICE float* rows(int stage) const {
    return reinterpret_cast<float*>(base + P::kRowOffset + stage * P::kRowBytes);
  }
  ATTN_DEVICE float* bias(int stage) const {
    return reinterpret_cast<float*>(base + P::kBiasOffset + stage * P::kBiasBytes);
  }
  ATTN_DEVICE float* diagonals(int warp) const {
    return reinterpret_cast<float*>(base + P::kDiagonalOffset) + warp * P::kDiagonalFloats;
  }
  ATTN_DEVICE uint64_t* barrier(int i) const {
    return reinterpret_cast<uint64_t*>(base + P::kBarrierOffset) + i;
  }
  // Of narrow rows behind the others: there are two, and `ready` when they are unit vectors.
  ATTN_DEVICE uint64_t* keys_arrived(int stage) const { return barrier(of_keys(stage)); }
  ATTN_DEVICE uint64_t* keys_free(int stage) const { return barrier(of_keys(stage) + 1); }
  ATTN_DEVICE uint64_t* keys_ready(int stage) const {
    return barrier(of_keys(stage) + (P::kNarrow ? 2 : 0));
  }
  ATTN_DEVICE static int of_keys(int stage) {
    return P::kNarrow ? P::kSharedBarriers + 3 * stage : 0;
  }
  ATTN_DEVICE uint64_t* values_arrived() const { return barrier(2); }
  ATTN_DEVICE uint64_t* values_free() const { return barrier(3); }
  ATTN_DEVICE uint64_t* other_query_arrived() const { return barrier(4); }
  ATTN_DEVICE uint64_t* other_query_free() const { return barrier(5); }
  ATTN_DEVICE uint64_t* other_grad_arrived() const { return barrier(6); }
  ATTN_DEVICE uint64_t* other_grad_free() const { return barrier(7); }
  ATTN_DEVICE uint64_t* query_arrived(int stage) const { return barrier(8 + stage); }
  ATTN_DEVICE uint64_t* query_free(int stage) const { return barrier(8 + P::kQueryStages + stage); }
  ATTN_DEVICE uint64_t* grad_arrived(int stage) const {
    return barrier(8 + 2 * P::kQueryStages + stage);
  }
  ATTN_DEVICE uint64_t* grad_free(int stage) const {
    return barrier(8 + 2 * P::kQueryStages + P::kGradStages + stage);
  }

  ATTN_DEVICE void init_barriers() const {
    constexpr int kWarps = 8;
    for (int i = 0; i < 8; i += 2) {
      barrier_init(barrier(i), 1);
      barrier_init(barrier(i + 1), kWarps);
    }
    for (int i = 0; i < P::kQueryStages; ++i) {
      barrier_init(query_arrived(i), 1);
      barrier_init(query_free(i), kWarps);
    }
    for (int i = 0; i < P::kGradStages; ++i) {
      barrier_init(grad_arrived(i), 1);
      barrier_init(grad_free(i), kWarps);
    }
    for (int i = 0; P::kNarrow && i < P::kKeyStages; ++i) {
      barrier_init(keys_arrived(i), 1);
      barrier_init(keys_free(i), kWarps);
      barrier_init(keys_ready(i), P::kUnitThreads);
    }
    barrier_init_fence();
  }
};

// Keys of one head, and the tiles of queries that see them, of each query head of the group.
struct Block {
  int head;  // of B * Hk
  int half;  // of the columns
  int first_key, past_key;
  Range queries;
  int tiles;                  // of all heads
  int first_tile, last_tile;  // in the order in which they are met
  // Tiles of queries that no block before has met, and those that none behind will.
  int new_from, done_before;
  int sums_head;  // from a query head to that of its sums
};

// The blocks of a multiprocessor: heads in order, and where the first blocks are the longest, pairs
// of a long and a short one. Every other round runs backwards. Or all blocks of a head, one after
// the other, and no other multiprocessor adds to its gradients of queries. Straight-line code: see
// the forward's Tiles.
template <class P>
struct Blocks {
  const Backward& p;
  int round = 0, met = 0;

  ATTN_DEVICE bool next(Block& block) {
    const bool pairs = p.pairs != 0, whole = P::kNarrow && p.whole_heads != 0;
    const int turn = whole ? round / p.key_blocks : pairs ? round / 2 : round;
    const int place = turn & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int index = turn * gridDim.x + place;
    if (index >= p.places) return false;
    const int either = index / P::kHalves;
    block.half = index - either * P::kHalves;
    block.head = either / p.places_in_head;
    const int longer = either - block.head * p.places_in_head;
    const int shorter = p.key_blocks - 1 - longer;
    const int number = whole                  ? round - turn * p.key_blocks
                       : pairs && (round & 1) ? shorter
                                              : longer;
    round += pairs && longer == shorter ? 2 : 1;  // the block in the middle has no other
    block.first_key = number * P::kKeys;
    block.past_key = block.first_key + P::kKeys < p.N ? block.first_key + P::kKeys : p.N;
    int origin;
    block.queries =
        tiles_seen<P::kQueries, false>(p.band, block.head, block.first_key, block.past_key, origin);
    // Keys past the end are hidden from all.
    if (block.past_key - block.first_key < P::kKeys) block.queries.full_end = 0;
    block.new_from = 1 << 30, block.done_before = 0, block.sums_head = 0;
    if (whole) take_whole_head(block, number);
    block.tiles = (block.queries.end - block.queries.begin) * (p.H / p.Hk);
    block.first_tile = block.queries.begin, block.last_tile = block.queries.end - 1;
    // What the block before met last is in the L2 cache.
    if (whole && number % 2 == 1) {
      block.first_tile = block.last_tile, block.last_tile = block.queries.begin;
    }
    return true;
  }

 private:
  ATTN_DEVICE Range queries_of(int head, int number) const {
    int origin;
    const int first = number * P::kKeys, past = first + P::kKeys;
    return tiles_seen<P::kQueries, false>(p.band, head, first, past < p.N ? past : p.N, origin);
  }

  // Every tile of queries is met by some block, to write zeros for those that see nothing.
  ATTN_DEVICE void take_whole_head(Block& block, int number) {
    const bool last = number + 1 == p.key_blocks;
    block.new_from = number == 0 ? 0 : met;
    Range& tiles = block.queries;
    if (tiles.begin > block.new_from) tiles.begin = block.new_from;
    if (last) tiles.end = p.query_tiles;
    if (tiles.end < block.new_from) tiles.end = block.new_from;
    met = tiles.end;
    const int next = last ? met : queries_of(block.head, number + 1).begin;
    block.done_before = next < met ? next : met;
    block.sums_head = (static_cast<int>(blockIdx.x) - block.head) * (p.H / p.Hk);
  }
};

// Walks over a block's tiles of queries.
template <class P>
struct Cursor {
  int head;  // of B * H
  int tile;

  ATTN_DEVICE Cursor(const Backward& p, const Block& block)
      : head(block.head * (p.H / p.Hk)),
        tile(P::kNarrow ? block.first_tile : block.queries.begin) {}
  ATTN_DEVICE void advance(const Block& block) {
    const int first = P::kNarrow ? block.first_tile : block.queries.begin;
    const bool last = P::kNarrow ? tile == block.last_tile : tile + 1 == block.queries.end;
    const int next = P::kNarrow && tile > block.last_tile ? tile - 1 : tile + 1;
    tile = last ? first : next;
    head += last ? 1 : 0;
  }
};

}  // namespace attn::cuda::cosine

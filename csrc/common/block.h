// A block of queries against a block of keys.
#pragma once

namespace attn::ATTN_ISA {

constexpr int kQueryBlock = 96;
static_assert(kQueryBlock % kTileRows == 0);

// Keys per block: whole panels and, for the products over queries, whole tile rows.
template <class T>
constexpr int kKeyBlock = 256 / std::lcm(kTileRows, kPanel<T>) * std::lcm(kTileRows, kPanel<T>);

// Smaller blocks where there would be fewer than two per thread.
inline int64_t query_block_size(const AttentionProblem& p) {
  int64_t size = kQueryBlock;
  while (size > 2 * kTileRows && p.B * p.H * ((p.M + size - 1) / size) < 2 * num_threads()) {
    size = size / 2 / kTileRows * kTileRows;
  }
  return size;
}

// Rows that a block of queries has at most, the padding of its last tile included.
inline int64_t query_block_rows(const AttentionProblem& p) {
  return round_up(std::min<int64_t>(kQueryBlock, p.M), kTileRows);
}

// Queries [first, first + rows) of one head. Rows are processed kTileRows at a time; the last ones
// of the last tile may be padding, which repeats the interval of the last query.
struct QueryBlock {
  int64_t batch, head, kv_head;  // kv_head counts over B * Hk
  int64_t first, rows, tiles;
  int64_t begin[kQueryBlock];  // visible keys of each row
  int64_t end[kQueryBlock];

  QueryBlock(const AttentionProblem& p, int64_t batch, int64_t head, int64_t first, int64_t size)
      : batch(batch), head(head), kv_head(batch * p.Hk + head / (p.H / p.Hk)), first(first) {
    rows = std::min(size, p.M - first);
    tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t r = 0; r < tiles * kTileRows; ++r) {
      const Interval keys = p.visible.of(batch, first + std::min(r, rows - 1));
      begin[r] = keys.begin;
      end[r] = keys.end;
    }
  }

  int64_t keys_begin() const { return begin[0]; }
  int64_t keys_end() const { return end[tiles * kTileRows - 1]; }
  // The keys that any row of a tile sees lie in this interval.
  int64_t tile_begin(int64_t tile) const { return begin[tile * kTileRows]; }
  int64_t tile_end(int64_t tile) const { return end[tile * kTileRows + kTileRows - 1]; }
  // Every row of the tile sees all of these keys.
  bool tile_is_full(int64_t tile, int64_t keys, int64_t count) const {
    return begin[tile * kTileRows + kTileRows - 1] <= keys && keys + count <= end[tile * kTileRows];
  }
};

// Keys [first, last) of a block, whole panels.
template <class T>
struct KeyBlock {
  int64_t first, last;

  // The panels of this block that a tile of rows sees, relative to the block.
  Interval panels(const QueryBlock& q, int64_t tile) const {
    const int64_t begin = std::max(first, q.tile_begin(tile) / kPanel<T> * kPanel<T>);
    const int64_t end = std::min(last, round_up(q.tile_end(tile), kPanel<T>));
    return begin < end ? Interval{begin - first, end - first} : Interval{0, 0};
  }
};

// Calls body(KeyBlock) for all blocks of keys that a query block sees.
template <class T, class Body>
ATTN_INLINE void for_each_key_block(const QueryBlock& q, const Body& body) {
  const int64_t end = round_up(q.keys_end(), kPanel<T>);
  for (int64_t n = q.keys_begin() / kPanel<T> * kPanel<T>; n < end; n += kKeyBlock<T>) {
    body(KeyBlock<T>{n, std::min(n + kKeyBlock<T>, end)});
  }
}

// Hides the keys of row [begin, end) that lie outside of [visible_begin, visible_end).
template <class T>
ATTN_INLINE void hide_outside(T* row, int64_t begin, int64_t end, int64_t visible_begin,
                              int64_t visible_end) {
  constexpr T hidden = -std::numeric_limits<T>::infinity();
  for (int64_t i = begin; i < std::min(visible_begin, end); ++i) row[i] = hidden;
  for (int64_t i = std::max(visible_end, begin); i < end; ++i) row[i] = hidden;
}

}  // namespace attn::ATTN_ISA

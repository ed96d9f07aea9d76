// What forward and backward share about a block of queries against a block of keys.
#pragma once

namespace attn::cosine_sim::ATTN_ISA {

constexpr int kQueryBlock = 96;
static_assert(kQueryBlock % kTileRows == 0);

// Keys per block: whole panels and, for the products over queries, whole tile rows.
template <class T>
constexpr int kKeyBlock = 256 / std::lcm(kTileRows, kPanel<T>) * std::lcm(kTileRows, kPanel<T>);

// Queries [first, first + rows) of one head. Rows are processed kTileRows at a time; the last ones
// of the last tile may be padding, which repeats the interval of the last query.
struct QueryBlock {
  int64_t batch, head, kv_head;  // kv_head counts over B * Hk
  int64_t first, rows, tiles;
  int64_t begin[kQueryBlock];  // visible keys of each row
  int64_t end[kQueryBlock];

  QueryBlock(const Problem& p, int64_t batch, int64_t head, int64_t first, int64_t size)
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

// row[i] = hidden where mask[i * stride] is false.
template <class T>
ATTN_INLINE void mask_row(T* row, const bool* mask, int64_t stride, int64_t count, T hidden) {
  constexpr int lanes = Simd<T>::lanes;
  typedef uint8_t Bytes __attribute__((vector_size(lanes)));
  int64_t i = 0;
  for (; stride == 1 && i + lanes <= count; i += lanes) {
    Bytes bytes;
    __builtin_memcpy(&bytes, mask + i, sizeof(bytes));
    const IVec<T> keep = __builtin_convertvector(bytes, IVec<T>) != 0;
    store<T>(row + i, keep ? load(row + i) : splat<T>(hidden));
  }
  for (; i < count; ++i) row[i] = mask[i * stride] ? row[i] : hidden;
}

template <class T>
void hide_masked(T* row, const Problem& p, const QueryBlock& q, int64_t query, int64_t begin,
                 int64_t end, T hidden) {
  const int64_t* stride = p.mask.stride;
  const bool* mask = static_cast<const bool*>(p.mask.data) + q.batch * stride[0] +
                     q.head * stride[1] + query * stride[2] + begin * stride[3];
  mask_row(row, mask, stride[3], end - begin, hidden);
}

// row[n] += what bias, relative bias and mask say about keys [begin, end) of one query;
// scratch has room for as many elements.
template <class T>
void add_extras(T* row, T* scratch, const Problem& p, const Parameters<T>& parameters,
                const QueryBlock& q, int64_t query, int64_t begin, int64_t end) {
  const int64_t count = end - begin;
  if (p.bias) {
    const int64_t* stride = p.bias.stride;
    load_row(scratch, p.bias,
             q.batch * stride[0] + q.head * stride[1] + query * stride[2] + begin * stride[3],
             stride[3], count);
    for (int64_t i = 0; i < count; ++i) row[i] += scratch[i];
  }
  if (p.relative_bias) {
    const T* offsets =
        parameters.relative_bias.data() + q.head * (p.M + p.N - 1) + (begin - query + p.M - 1);
    for (int64_t i = 0; i < count; ++i) row[i] += offsets[i];
  }
  if (p.mask) {
    hide_masked(row, p, q, query, begin, end, -std::numeric_limits<T>::infinity());
  }
}

// The end of a row whose weights exp(score - shift) add up to sum: its lse, and what its
// accumulated values are multiplied with. A sink is one more weight without a value.
struct Total {
  double lse, factor;

  Total(double shift, double sum, double sink) {
    constexpr double hidden = -std::numeric_limits<double>::infinity();
    lse = sum > 0 ? shift + std::log(sum) : hidden;
    factor = sum > 0 ? 1 / sum : 0;
    if (sink == hidden) return;
    const double larger = std::max(lse, sink);
    const double with_sink = larger + std::log(std::exp(lse - larger) + std::exp(sink - larger));
    factor *= std::exp(lse - with_sink);
    lse = with_sink;
  }
};

// Hides the keys of row [begin, end) that lie outside of [visible_begin, visible_end).
template <class T>
ATTN_INLINE void hide_outside(T* row, int64_t begin, int64_t end, int64_t visible_begin,
                              int64_t visible_end) {
  constexpr T hidden = -std::numeric_limits<T>::infinity();
  for (int64_t i = begin; i < std::min(visible_begin, end); ++i) row[i] = hidden;
  for (int64_t i = std::max(visible_end, begin); i < end; ++i) row[i] = hidden;
}

}  // namespace attn::cosine_sim::ATTN_ISA

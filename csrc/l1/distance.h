// Tiles of distances sum_d |q - k|, and the scores that are made of them.
#pragma once

namespace attn::l1::ATTN_ISA {

using namespace attn::ATTN_ISA;

template <class T>
ATTN_INLINE Vec<T> absolute(Vec<T> x) {
  using Bits = typename Simd<T>::Bits;
  return (Vec<T>)((Bits)x & ~(Bits)splat<T>(T(-0.0)));
}

// tile += |left - column| over Count consecutive elements of the width, whose terms are added up
// first: as accurate as the sum of a Count-th as many.
template <int Count, class T>
ATTN_INLINE void add_distances(Tile<T>& tile, const T* left, const T* panel) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      Vec<T> terms[Count];
#pragma GCC unroll 4
      for (int i = 0; i < Count; ++i) {
        terms[i] = absolute<T>(load(panel + i * kPanel<T> + v * Simd<T>::lanes) -
                               splat<T>(left[r * kRowPitch + i]));
      }
#pragma GCC unroll 4
      for (int half = Count / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
        for (int i = 0; i < half; ++i) terms[i] += terms[i + half];
      }
      tile.at[r][v] += terms[0];
    }
  }
}

// epilogue(tile) for the distances of rows at kRowPitch and the columns of a panel. A function of
// its own: gcc then keeps the whole tile in registers.
template <class T, class Epilogue>
__attribute__((noinline)) void distances(const T* left, const T* panel, int64_t depth,
                                         const Epilogue& epilogue) {
  constexpr int kStep = 4;
  Tile<T> tile;
  clear(tile);
  int64_t d = 0;
  for (; d + kStep <= depth; d += kStep) {
    add_distances<kStep>(tile, left + d, panel + d * kPanel<T>);
  }
  for (; d < depth; ++d) add_distances<1>(tile, left + d, panel + d * kPanel<T>);
  epilogue(tile);
}

template <class T>
ATTN_INLINE T distance(const T* a, const T* b, int64_t count) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum += absolute<T>(load(a + i) - load(b + i));
  T tail = 0;
  for (; i < count; ++i) tail += std::fabs(a[i] - b[i]);
  return horizontal_sum<T>(sum) + tail;
}

// Every operation rounds, as it does in the formula: a product that went into an FMA would not.
template <class T>
struct Score {
  bool inverse;
  T factor, eps;

  explicit Score(const Problem& p)
      : inverse(p.inverse),
        factor(static_cast<T>(p.inverse ? p.scale : -p.scale)),
        eps(static_cast<T>(p.eps)) {}

  template <class V>  // a vector or one number
  ATTN_INLINE V of(V distance) const {
    const V product = rounded(distance * factor);
    return inverse ? rounded(T(1) / (eps + product)) : product;
  }

  ATTN_INLINE void of_tile(Tile<T>& tile) const {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) tile.at[r][v] = of(tile.at[r][v]);
    }
  }
};

// Rows of queries as left operands, zeros after the last one.
template <class T>
void load_queries(T* target, const Problem& p, const QueryBlock& q) {
  for (int64_t r = 0; r < q.tiles * kTileRows; ++r) {
    T* row = target + r * kRowPitch;
    if (r < q.rows) {
      load_padded(row, p.query, q.batch, q.head, q.first + r, p.D);
    } else {
      std::fill(row, row + round_up(p.D, kPanel<T>), T(0));
    }
  }
}

// Every tile of queries and keys of a block: seen(tile, n, distances) where a query sees a key,
// else hidden(tile, n).
template <class T, class Seen, class Hidden>
ATTN_INLINE void for_each_tile(const QueryBlock& q, KeyBlock<T> keys, const T* queries,
                               const T* key_columns, int64_t width, const Seen& seen,
                               const Hidden& hidden) {
  for (int64_t n = keys.first; n < keys.last; n += kPanel<T>) {
    const T* panel = key_columns + n * width;
    for (int64_t tile = 0; tile < q.tiles; ++tile) {
      if (n + kPanel<T> <= q.tile_begin(tile) || q.tile_end(tile) <= n) {
        hidden(tile, n);
        continue;
      }
      distances(queries + tile * kTileRows * kRowPitch, panel, width,
                [&](Tile<T>& sums) ATTN_INLINE_LAMBDA { seen(tile, n, sums); });
    }
  }
}

}  // namespace attn::l1::ATTN_ISA

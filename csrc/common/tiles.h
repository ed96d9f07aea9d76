// Matrix products as register tiles: kTileRows rows by kTileVectors vectors stay in registers while
// the depth is walked.
//
// Left operands are rows at a fixed pitch of kRowPitch elements (constant offsets from one
// pointer). Right operands are panels: [depth][kPanel], kPanel = one tile's width, contiguous.
#pragma once

namespace attn::ATTN_ISA {

constexpr int kTileRows = ATTN_TILE_ROWS;
constexpr int kTileVectors = 2;
// 17 cache lines of floats: rows do not fall into the same cache sets.
constexpr int kRowPitch = 272;
constexpr int kMaxWidth = 256;  // of a left operand: D, E, keys per block

template <class T>
constexpr int kPanel = kTileVectors * Simd<T>::lanes;
template <class T>
constexpr int kTileSize = kTileRows * kPanel<T>;

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <class T>
struct Tile {
  Vec<T> at[kTileRows][kTileVectors];
};

template <class T>
ATTN_INLINE void clear(Tile<T>& tile) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) tile.at[r][v] = Vec<T>{};
  }
}

template <class T>
ATTN_INLINE void store_tile(T* target, const Tile<T>& tile, int64_t pitch = kPanel<T>) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      store<T>(target + r * pitch + v * Simd<T>::lanes, tile.at[r][v]);
    }
  }
}

// tile += left * panel; left element (row, k) is left[row * RowStep + k * DepthStep].
template <int RowStep, int DepthStep, class T>
ATTN_INLINE void multiply_add(Tile<T>& tile, const T* left, const T* panel, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) right[v] = load(panel + v * Simd<T>::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> x = splat<T>(left[r * RowStep]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) tile.at[r][v] += x * right[v];
    }
    left += DepthStep;
    panel += kPanel<T>;
  }
}

// epilogue(tile) for the tile left * panel, left being rows at kRowPitch. A function of its own:
// gcc then keeps the whole tile in registers.
template <class T, class Epilogue>
__attribute__((noinline)) void multiply(const T* left, const T* panel, int64_t depth,
                                        const Epilogue& epilogue) {
  Tile<T> tile;
  clear(tile);
  multiply_add<kRowPitch, 1>(tile, left, panel, depth);
  epilogue(tile);
}

// target += left * panel. A function of its own, sums from zero and added at the end: gcc then
// keeps the whole tile in registers.
template <int RowStep, int DepthStep, class T>
__attribute__((noinline)) void accumulate(T* target, const T* left, const T* panel, int64_t depth) {
  Tile<T> tile;
  clear(tile);
  multiply_add<RowStep, DepthStep>(tile, left, panel, depth);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      T* row = target + r * kPanel<T> + v * Simd<T>::lanes;
      store<T>(row, load(row) + tile.at[r][v]);
    }
  }
}

// Transposes lanes x lanes elements: target row i (at pitch kPanel) = column i of source. Each
// round interleaves row i with row i + lanes/2, which rotates the bits of (row, column) by one.
template <class T>
ATTN_INLINE void transpose_square(T* target, const T* source, int64_t source_pitch) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> rows[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) rows[i] = load(source + i * source_pitch);
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    Vec<T> next[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave_low<T>(rows[i], rows[i + lanes / 2]);
      next[2 * i + 1] = interleave_high<T>(rows[i], rows[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) store<T>(target + i * kPanel<T>, rows[i]);
}

// panel[d][row] = row `row`, element d, for kPanel rows at a pitch.
template <class T>
void pack_transposed(T* panel, const T* rows, int64_t pitch, int64_t width) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t d = 0;
  for (; d + lanes <= width; d += lanes) {
    for (int v = 0; v < kTileVectors; ++v) {
      transpose_square<T>(panel + d * kPanel<T> + v * lanes, rows + v * lanes * pitch + d, pitch);
    }
  }
  for (; d < width; ++d) {
    for (int row = 0; row < kPanel<T>; ++row) panel[d * kPanel<T> + row] = rows[row * pitch + d];
  }
}

// Cuts one row into the row panels [width / kPanel][rows][kPanel] that serve as right operands of
// products over rows. The row is readable up to a multiple of kPanel.
template <class T>
ATTN_INLINE void pack_row(T* panels, const T* row, int64_t width, int64_t panel_size) {
  for (int64_t d = 0; d < width; d += kPanel<T>) {
    for (int v = 0; v < kTileVectors; ++v) {
      store<T>(panels + v * Simd<T>::lanes, load(row + d + v * Simd<T>::lanes));
    }
    panels += panel_size;
  }
}

}  // namespace attn::ATTN_ISA

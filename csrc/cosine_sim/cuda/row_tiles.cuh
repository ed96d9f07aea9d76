// Tiles of rows of packed sequences, found on the device.
#pragma once

#include "cosine_sim/cuda/band.cuh"
#include "cosine_sim/cuda/scan.cuh"

namespace attn::cuda::cosine {

struct RowTiles {
  Band band;  // of one batch, with start and stop
  int* tiles;
  int count;  // at least as many as there are
};

// A tile that two sequences share computes both. A tile ends where a long sequence begins: at a row
// that sees nothing that the row before it sees, and something that a row far behind sees.
template <int kRows>
constexpr int kLong = 4 * kRows;
template <int kRows>
ATTN_DEVICE bool is_cut(const Band& band, int row) {
  const int* start = band.start;
  const int* stop = band.stop;
  const int far = row + kLong<kRows> - 1;
  return row == 0 || (start[row] >= stop[row - 1] && far < band.rows && start[far] < stop[row]);
}
// No more than these: rows and, where they are cut, one more for each long sequence.
template <int kRows>
int most_tiles(const Band& band) {
  return (band.rows + kRows - 1) / kRows + band.rows / kLong<kRows>;
}

template <int kRows>
__global__ void __launch_bounds__(kScanThreads)
    row_tiles_kernel(const __grid_constant__ RowTiles p) {
  const Chunk rows = chunk_of(p.band.rows);
  int last = -1, total;
  for (int row = rows.begin; row < rows.end; ++row) last = is_cut<kRows>(p.band, row) ? row : last;
  const int cut = scan_before(last, -1, total, [](int x, int y) { return x > y ? x : y; });
  int count = 0;
  last = cut;
  for (int row = rows.begin; row < rows.end; ++row) {
    last = is_cut<kRows>(p.band, row) ? row : last;
    count += (row - last) % kRows == 0;
  }
  int at = scan_before(count, 0, total, [](int x, int y) { return x + y; });
  last = cut;
  for (int row = rows.begin; row < rows.end; ++row) {
    last = is_cut<kRows>(p.band, row) ? row : last;
    if ((row - last) % kRows == 0) p.tiles[at++] = row;
  }
  for (int i = total + threadIdx.x; i <= p.count; i += kScanThreads) p.tiles[i] = p.band.rows;
}

}  // namespace attn::cuda::cosine

// Which columns a row sees: one interval, so that tiles are left out, taken whole, or compared.
//
// Rows are queries and columns keys, or the reverse: a band turns into a band.
#pragma once

#include "common/cuda/hopper.cuh"

namespace attn::cuda::cosine {

struct Interval {
  int first, past;
};

struct Band {
  int rows, columns;
  int first, past;   // row r sees columns r + first <= c < r + past
  const int* start;  // or null; [1 or B, rows] with stop: a row sees columns start <= c < stop
  const int* stop;   // instead. Neither decreases from row to row
  int batch, heads;  // from the rows of a batch to those of the next; heads of a batch

  ATTN_HOST_DEVICE Interval of(int head, int row) const {
    Interval x{row + first, row + past};
    if (start) {
      // The division stays in here: it takes longer than all else. Past the end nothing is seen.
      const int64_t at = int64_t{head / heads} * batch + row;
      x = {row < rows ? start[at] : 0, row < rows ? stop[at] : 0};
    }
    return x;
  }
};

// Tiles of columns from `begin` to `end` that some row of a tile of rows sees, at least one, to
// write zeros; and those that every row sees whole, which may be none.
struct Range {
  int begin, full_begin, full_end, end;

  ATTN_DEVICE bool is_full(int tile) const { return tile >= full_begin && tile < full_end; }
};

ATTN_DEVICE int within(int x, int low, int high) {
  x = x < high ? x : high;
  return x > low ? x : low;
}

// Of rows from `row` to `past`, which may be none. Tiles of columns are counted from the column
// `origin`, which then is the first one that a row sees where it is not given. All lanes of a warp
// take part, and get the same.
template <int kColumns, bool kFromFirst>
ATTN_DEVICE Range tiles_seen(const Band& band, int head, int row, int past, int& origin) {
  const int last = past - 1;
  Interval above{row + band.first, row + band.past}, below{last + band.first, last + band.past};
  if (band.start) {
    above = band.of(head, row), below = row < past ? band.of(head, last) : above;
    above.first = shuffle(above.first, 0), above.past = shuffle(above.past, 0);
    below.first = shuffle(below.first, 0), below.past = shuffle(below.past, 0);
  }
  const int n = band.columns, first = within(above.first, 0, n - 1);
  origin = kFromFirst ? first : 0;
  const auto tiles = [&](int columns) { return static_cast<unsigned>(columns) / kColumns; };
  Range x;
  x.begin = tiles(first - origin);
  x.full_begin = tiles(within(below.first, origin, n) - origin + kColumns - 1);
  const int full = tiles(within(above.past, origin, n) - origin);
  const int end = tiles(within(below.past, origin, n) - origin + kColumns - 1);
  x.full_end = full > x.begin ? full : x.begin;
  x.end = end > x.begin ? end : x.begin + 1;
  return x;
}

// A thread's columns of a tile are 8 j + e, of which e is 0 or 1, counted from `column`: a bit for
// each, 2 j + e, that is set where the row sees it.
ATTN_DEVICE uint32_t bits_below(int limit) {
  const int pair = limit % 8;
  const int count = limit / 8 * 2 + (pair < 2 ? pair : 2);
  return count <= 0 ? 0 : 0xffffffffu >> (count < 32 ? 32 - count : 0);
}
ATTN_DEVICE uint32_t bits_seen(const Band& band, Interval x, int column) {
  const int past = x.past < band.columns ? x.past : band.columns;
  return bits_below(past - column) & ~bits_below(x.first - column);
}

}  // namespace attn::cuda::cosine

// What the host does for forward and backward.
#pragma once

#include <algorithm>

#include "common/cuda/launch.cuh"
#include "common/view.h"
#include "cosine_sim/cuda/band.cuh"
#include "cosine_sim/cuda/unit_keys.cuh"

namespace attn::cuda::cosine {

inline RowsOf rows_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// The columns of the tiles that rows lie in: those that kernels are made for.
inline int64_t tile_width(int64_t width) {
  for (const int64_t tile : {32, 64, 80, 96, 128, 192}) {
    if (width <= tile) return tile;
  }
  return 256;
}

// The width that kernels going from row to row take for rows in tiles of kWidth columns.
template <int kWidth>
constexpr int kLanesWidth = kWidth <= 32    ? 32
                            : kWidth <= 64  ? 64
                            : kWidth <= 128 ? 128
                                            : 256;

// Blocks for the rows of a head, of the kernels that go from row to row.
template <int kWidth>
int row_blocks(int rows) {
  return (rows + kRowsOfBlock<kWidth> - 1) / kRowsOfBlock<kWidth>;
}

// Which keys a query sees: those from `left` before its diagonal to `right` behind it, where the
// last query's diagonal is at the last key. Or what each row sees: `start` and `stop` of Band,
// where the band still says how lengths of rows differ.
struct Reach {
  int64_t left, right;
  const int *start = nullptr, *stop = nullptr;
  int64_t batch = 0;  // from the rows of a batch to those of the next

  // Rows are queries.
  Band keys_seen(int64_t queries, int64_t keys, int64_t heads) const {
    return band(queries, keys, keys - queries - left, keys - queries + right + 1, heads);
  }
  // Rows are keys.
  Band queries_seeing(int64_t queries, int64_t keys, int64_t heads) const {
    return band(keys, queries, queries - keys - right, queries - keys + left + 1, heads);
  }

 private:
  // 2^30 is beyond all columns: there are at most 2^29 rows of each kind.
  Band band(int64_t rows, int64_t columns, int64_t first, int64_t past, int64_t heads) const {
    const auto near = [](int64_t x) {
      constexpr int64_t kFar = int64_t{1} << 30;
      return static_cast<int>(std::min(std::max(x, -kFar), kFar));
    };
    Band x{static_cast<int>(rows), static_cast<int>(columns), near(first), near(past), start, stop};
    x.batch = static_cast<int>(batch), x.heads = static_cast<int>(heads);
    return x;
  }
};

// Columns that a row of the band sees.
inline int64_t length(const Band& band, int64_t row) {
  const int64_t n = band.columns;
  const int64_t first = std::max<int64_t>(row + band.first, 0);
  return std::max<int64_t>(std::min(row + band.past, n) - std::min(first, n), 0);
}

// Batches and key/value heads of a call that are computed together.
struct Part {
  int64_t batch, batches, head, heads;
  bool whole = false;

  // x [B, H, ...] of these, with `group` heads to a key/value head.
  Tensor of(Tensor x, int64_t group = 1) const {
    if (whole) return x;
    Tensor rows = torch::stable::narrow(x, 0, batch, batches);
    return torch::stable::narrow(rows, 1, head * group, heads * group);
  }

  Reach of(Reach reach) const {
    if (reach.start) reach.start += batch * reach.batch, reach.stop += batch * reach.batch;
    return reach;
  }
  Order of(Order order) const {
    if (order.rows) order.rows += batch * order.batch;
    return order;
  }
};

// Rows of keys as unit vectors, or of values as they are, in an order.
template <class T, int kWidth, bool kUnit>
Tensor in_order(const Device& device, const Tensor& x, const Order& order) {
  Tensor result = allocate(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  const int heads = static_cast<int>(x.size(0) * x.size(1));
  UnitKeys p{};
  p.key = rows_of(x), p.order = order;
  p.Hk = static_cast<int>(x.size(1)), p.N = static_cast<int>(x.size(2));
  p.D = static_cast<int>(x.size(3));
  p.unit = result.data_ptr();
  const dim3 grid(static_cast<unsigned>(heads * row_blocks<kWidth>(p.N)));
  launch<&unit_keys_kernel<T, kWidth, kUnit>>(device, "cosine_sim: rows in order", grid, 256, 0, p);
  return result;
}

// Runs the call at once where its workspace, of `bytes` for a key/value head, is at most `most`,
// else in parts of half of it: whole batches, or heads of one batch, whose results are neighbours.
template <class Run>
void in_parts(int64_t batches, int64_t heads, int64_t bytes, int64_t most, const Run& run) {
  if (batches * heads * bytes <= most) return run(Part{0, batches, 0, heads, true});
  const int64_t fit = std::max<int64_t>(most / 2 / bytes, 1);
  const int64_t batch_step = std::max<int64_t>(fit / heads, 1), head_step = std::min(fit, heads);
  for (int64_t b = 0; b < batches; b += batch_step) {
    for (int64_t h = 0; h < heads; h += head_step) {
      run(Part{b, std::min(batch_step, batches - b), h, std::min(head_step, heads - h)});
    }
  }
}

}  // namespace attn::cuda::cosine

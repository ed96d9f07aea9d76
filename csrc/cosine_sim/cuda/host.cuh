// What the host does for forward and backward.
#pragma once

#include <algorithm>

#include "common/view.h"
#include "cosine_sim/cuda/unit_keys.cuh"

namespace attn::cuda::cosine {

inline RowsOf rows_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Blocks for the rows of a head, of the kernels that go from row to row.
template <int kWidth>
int row_blocks(int rows) {
  return (rows + kRowsOfBlock<kWidth> - 1) / kRowsOfBlock<kWidth>;
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
};

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

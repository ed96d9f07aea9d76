// What the host does for forward and backward.
#pragma once

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

}  // namespace attn::cuda::cosine

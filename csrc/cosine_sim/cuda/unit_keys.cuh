// Keys as unit vectors, before the kernels that read each of them many times, and rows of keys and
// values in another order.
#pragma once

#include "cosine_sim/cuda/rows.cuh"

namespace attn::cuda::cosine {

// Strides in elements; a row's elements are neighbours.
struct RowsOf {
  const void* x;
  int64_t batch, head, row;
};

template <class T>
ATTN_DEVICE const T* row_of(const RowsOf& x, int batch, int head, int row) {
  return static_cast<const T*>(x.x) + batch * x.batch + head * x.head + row * x.row;
}

template <int kLanes>
ATTN_DEVICE float sum_of_lanes(float x) {
  ATTN_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
template <class T>
ATTN_DEVICE uint4 load_piece(const T* from) {
  return load4(reinterpret_cast<const uint32_t*>(from));
}

// Rows of up to kWidth elements, a power of two: kWidth / 8 lanes share one. Blocks of a head: each
// reads kAtOnce rows per lane group.
template <int kWidth>
constexpr int kAtOnce = 256 / kWidth;
template <int kWidth>
constexpr int kRowsOfBlock = 256 / (kWidth / 8) * kAtOnce<kWidth>;

// Rows in the order of a batch: [1 or B, N], or null where they are as they are.
struct Order {
  const int* rows;
  int batch;  // from those of a batch to those of the next

  ATTN_HOST_DEVICE int of(int of_batch, int row) const {
    return rows ? rows[int64_t{of_batch} * batch + row] : row;
  }
};

struct UnitKeys {
  RowsOf key;
  Order order;
  int Hk, N, D;
  float* inverse;  // [B, Hk, N], or null
  void* unit;      // [B, Hk, N, D]
};

// Unit vectors, or rows as they are.
template <class T, int kWidth, bool kUnit = true>
ATTN_DEVICE void find_unit_keys(const UnitKeys& p, int number) {
  constexpr int kLanes = kWidth / 8, kRows = 256 / kLanes;
  const int part = threadIdx.x % kLanes;
  const int blocks = (p.N + kRowsOfBlock<kWidth> - 1) / kRowsOfBlock<kWidth>;
  const int head = number / blocks;
  const int first = (number - head * blocks) * kRowsOfBlock<kWidth> + threadIdx.x / kLanes;
  uint4 x[kAtOnce<kWidth>];
  ATTN_UNROLL
  for (int i = 0; i < kAtOnce<kWidth>; ++i) {
    const int n = first + i * kRows;
    x[i] = make_uint4(0, 0, 0, 0);
    if (n < p.N && part * 8 < p.D) {
      const int batch = head / p.Hk;
      x[i] = load_piece(row_of<T>(p.key, batch, head % p.Hk, p.order.of(batch, n)) + part * 8);
    }
  }
  ATTN_UNROLL
  for (int i = 0; i < kAtOnce<kWidth>; ++i) {
    const int n = first + i * kRows;
    const int64_t row = int64_t{head} * p.N + n;
    float inverse = 1.0f;
    if constexpr (kUnit) {
      inverse = inverse_length(sum_of_lanes<kLanes>(squares<T>(x[i], 0.0f)));
    }
    if (n >= p.N) continue;
    if (part == 0 && p.inverse) p.inverse[row] = inverse;
    if (part * 8 >= p.D) continue;
    store4(reinterpret_cast<uint32_t*>(static_cast<T*>(p.unit) + row * p.D + part * 8),
           make_uint4(scaled<T>(x[i].x, inverse), scaled<T>(x[i].y, inverse),
                      scaled<T>(x[i].z, inverse), scaled<T>(x[i].w, inverse)));
  }
}

template <class T, int kWidth, bool kUnit>
__global__ void __launch_bounds__(256) unit_keys_kernel(const __grid_constant__ UnitKeys p) {
  find_unit_keys<T, kWidth, kUnit>(p, blockIdx.x);
}

}  // namespace attn::cuda::cosine

// Keys as unit vectors, by a kernel of their own: pays where many queries read each of them.
#pragma once

#include "cosine_sim/cuda/rows.cuh"

namespace attn::cuda::cosine {

struct KeyRows {
  const void* key;
  int64_t batch, head, row;  // strides in elements; a row's elements are neighbours
  int Hk, N;
  int rows;    // B * Hk * N
  void* unit;  // [B, Hk, N, D]
};

// Lanes that share a row hold 8 elements each; four rows at a time are under way.
template <class T, int kWidth>
__global__ void __launch_bounds__(256) unit_keys_kernel(const __grid_constant__ KeyRows p) {
  constexpr int kLanes = kWidth / 8, kAtOnce = 4;
  const int part = threadIdx.x % kLanes;
  const int first = (blockIdx.x * 256 + threadIdx.x) / kLanes;
  const int stride = gridDim.x * 256 / kLanes;
  for (int base = first; base - first < p.rows; base += kAtOnce * stride) {
    uint4 x[kAtOnce];
    ATTN_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = base + i * stride, head = row / p.N, n = row - head * p.N;
      x[i] = make_uint4(0, 0, 0, 0);
      if (row < p.rows) {
        const int b = head / p.Hk;
        const T* from = static_cast<const T*>(p.key) + b * p.batch + (head - b * p.Hk) * p.head +
                        n * p.row + part * 8;
        x[i] = load4(reinterpret_cast<const uint32_t*>(from));
      }
    }
    ATTN_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = base + i * stride;
      float squared = squares<T>(x[i], 0.0f);
      ATTN_UNROLL
      for (int mask = 1; mask < kLanes; mask *= 2) squared += shuffle_xor(squared, mask);
      const float inverse = inverse_length(squared);
      if (row >= p.rows) continue;
      uint32_t* to =
          reinterpret_cast<uint32_t*>(static_cast<T*>(p.unit) + int64_t{row} * kWidth + part * 8);
      store4(to, make_uint4(scaled<T>(x[i].x, inverse), scaled<T>(x[i].y, inverse),
                            scaled<T>(x[i].z, inverse), scaled<T>(x[i].w, inverse)));
    }
  }
}

}  // namespace attn::cuda::cosine

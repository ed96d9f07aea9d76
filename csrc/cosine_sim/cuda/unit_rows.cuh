// Rows as unit vectors with the tangents of these, before the kernel that reads each many times.
#pragma once

#include "cosine_sim/cuda/unit_keys.cuh"

namespace attn::cuda::cosine {

struct UnitRows {
  RowsOf x, tangent;
  int heads, rows, D;            // heads of a batch
  float factor, tangent_factor;  // of what is written
  void* unit;                    // [B, heads, rows, D]
  void* tangent_unit;
};

// factor * (tangent + along * x) of two neighbours.
template <class T>
ATTN_DEVICE uint32_t moved_along(uint32_t tangent, uint32_t x, float along, float factor) {
  const float2 a = unpack(tangent, T{}), b = unpack(x, T{});
  return pack((a.x + along * b.x) * factor, (a.y + along * b.y) * factor, T{});
}

// As find_unit_keys.
template <class T, int kWidth>
ATTN_DEVICE void find_unit_rows(const UnitRows& p, int number) {
  constexpr int kLanes = kWidth / 8, kRows = 256 / kLanes;
  const int part = threadIdx.x % kLanes;
  const int blocks = (p.rows + kRowsOfBlock<kWidth> - 1) / kRowsOfBlock<kWidth>;
  const int head = number / blocks, batch = head / p.heads;
  const int first = (number - head * blocks) * kRowsOfBlock<kWidth> + threadIdx.x / kLanes;
  uint4 x[kAtOnce<kWidth>], dx[kAtOnce<kWidth>];
  ATTN_UNROLL
  for (int i = 0; i < kAtOnce<kWidth>; ++i) {
    const int n = first + i * kRows;
    x[i] = dx[i] = make_uint4(0, 0, 0, 0);
    if (n < p.rows && part * 8 < p.D) {
      x[i] = load_piece(row_of<T>(p.x, batch, head - batch * p.heads, n) + part * 8);
      dx[i] = load_piece(row_of<T>(p.tangent, batch, head - batch * p.heads, n) + part * 8);
    }
  }
  ATTN_UNROLL
  for (int i = 0; i < kAtOnce<kWidth>; ++i) {
    const int n = first + i * kRows;
    const float squared = sum_of_lanes<kLanes>(squares<T>(x[i], 0.0f));
    const float product = sum_of_lanes<kLanes>(dot<T>(x[i], dx[i]));
    const float inverse = inverse_length(squared);
    // Below the floor of the norm the divisor is a constant: nothing to project out.
    const float along = squared > 1e-24f ? -(product * inverse) * inverse : 0.0f;
    if (n >= p.rows || part * 8 >= p.D) continue;
    const int64_t at = (int64_t{head} * p.rows + n) * p.D + part * 8;
    const float f = inverse * p.factor, t = inverse * p.tangent_factor;
    store4(reinterpret_cast<uint32_t*>(static_cast<T*>(p.unit) + at),
           make_uint4(scaled<T>(x[i].x, f), scaled<T>(x[i].y, f), scaled<T>(x[i].z, f),
                      scaled<T>(x[i].w, f)));
    store4(reinterpret_cast<uint32_t*>(static_cast<T*>(p.tangent_unit) + at),
           make_uint4(moved_along<T>(dx[i].x, x[i].x, along, t),
                      moved_along<T>(dx[i].y, x[i].y, along, t),
                      moved_along<T>(dx[i].z, x[i].z, along, t),
                      moved_along<T>(dx[i].w, x[i].w, along, t)));
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(256) unit_rows_kernel(const __grid_constant__ UnitRows p) {
  find_unit_rows<T, kWidth>(p, blockIdx.x);
}

}  // namespace attn::cuda::cosine

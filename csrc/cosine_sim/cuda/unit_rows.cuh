// Rows as unit vectors with the tangents of these, before the kernel that reads each many times.
#pragma once

#include "cosine_sim/cuda/unit_keys.cuh"

namespace attn::cuda::cosine {

struct UnitRows {
  RowsOf x, tangent;
  int heads, rows;       // heads of a batch
  float tangent_factor;  // of what is written
  void* unit;            // [B, heads, rows, kWidth]
  void* tangent_unit;
};

// factor * (tangent + along * x) of two neighbours.
template <class T>
ATTN_DEVICE uint32_t moved_along(uint32_t tangent, uint32_t x, float along, float factor) {
  const float2 a = unpack(tangent, T{}), b = unpack(x, T{});
  return pack((a.x + along * b.x) * factor, (a.y + along * b.y) * factor, T{});
}

// 8 elements of a row and of its tangent, of which kLanes lanes have all, as those of a unit vector
// times `factor` and of its tangent times `tangent_factor`.
template <class T, int kLanes>
ATTN_DEVICE void make_unit(uint4& x, uint4& tangent, float factor, float tangent_factor) {
  const float squared = sum_of_lanes<kLanes>(squares<T>(x, 0.0f));
  const float product = sum_of_lanes<kLanes>(dot<T>(x, tangent));
  const float inverse = inverse_length(squared);
  // Below the floor of the norm the divisor is a constant: nothing to project out.
  const float along = squared > 1e-24f ? -(product * inverse) * inverse : 0.0f;
  const float f = inverse * factor, t = inverse * tangent_factor;
  tangent = make_uint4(
      moved_along<T>(tangent.x, x.x, along, t), moved_along<T>(tangent.y, x.y, along, t),
      moved_along<T>(tangent.z, x.z, along, t), moved_along<T>(tangent.w, x.w, along, t));
  x = make_uint4(scaled<T>(x.x, f), scaled<T>(x.y, f), scaled<T>(x.z, f), scaled<T>(x.w, f));
}

// As find_unit_keys.
template <class T, int kWidth>
ATTN_DEVICE void find_unit_rows(const UnitRows& p, int number) {
  constexpr int kLanes = kWidth / 8, kRows = 256 / kLanes;
  const int part = threadIdx.x % kLanes;
  const int blocks = (p.rows + kRowsOfBlock<kWidth> - 1) / kRowsOfBlock<kWidth>;
  const int head = number / blocks, batch = head / p.heads;
  const int first = (number - head * blocks) * kRowsOfBlock<kWidth> + threadIdx.x / kLanes;
  uint4 x[kAtOnce<kWidth>], tangent[kAtOnce<kWidth>];
  ATTN_UNROLL
  for (int i = 0; i < kAtOnce<kWidth>; ++i) {
    const int n = first + i * kRows;
    x[i] = tangent[i] = make_uint4(0, 0, 0, 0);
    if (n < p.rows) {
      x[i] = load_piece(row_of<T>(p.x, batch, head - batch * p.heads, n) + part * 8);
      tangent[i] = load_piece(row_of<T>(p.tangent, batch, head - batch * p.heads, n) + part * 8);
    }
  }
  ATTN_UNROLL
  for (int i = 0; i < kAtOnce<kWidth>; ++i) {
    const int n = first + i * kRows;
    make_unit<T, kLanes>(x[i], tangent[i], 1.0f, p.tangent_factor);
    if (n >= p.rows) continue;
    const int64_t at = (int64_t{head} * p.rows + n) * kWidth + part * 8;
    store4(reinterpret_cast<uint32_t*>(static_cast<T*>(p.unit) + at), x[i]);
    store4(reinterpret_cast<uint32_t*>(static_cast<T*>(p.tangent_unit) + at), tangent[i]);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(256) unit_rows_kernel(const __grid_constant__ UnitRows p) {
  find_unit_rows<T, kWidth>(p, blockIdx.x);
}

}  // namespace attn::cuda::cosine

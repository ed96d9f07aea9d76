// What the backward reads and writes per row, at the speed of memory: unit queries, lse and delta
// before it, gradients of queries through the norm after it.
#pragma once

#include "cosine_sim/cuda/unit_keys.cuh"

namespace attn::cuda::cosine {

struct QueryRows {
  RowsOf query, out, grad_out;
  const float *lse, *grad_lse;  // [B, H, M]; the gradient may be null
  void* unit;                   // [B, H, M, D]: query / |query| * factor
  float* rows;                  // [B * H, tiles, 2, kQueries]
  float* grad_query;            // [B * H, padded, D], zeros
  int H, M, padded;             // padded: tiles * kQueries
  float factor;                 // scale * log2(e)
};

// Lanes that share a row hold 8 elements each.
template <class T>
ATTN_DEVICE float dot(uint4 x, uint4 y) {
  const float2 a = unpack(x.x, T{}), b = unpack(x.y, T{}), c = unpack(x.z, T{}),
               d = unpack(x.w, T{});
  const float2 e = unpack(y.x, T{}), f = unpack(y.y, T{}), g = unpack(y.z, T{}),
               h = unpack(y.w, T{});
  return a.x * e.x + a.y * e.y + b.x * f.x + b.y * f.y +
         (c.x * g.x + c.y * g.y + d.x * h.x + d.y * h.y);
}
template <class T, int kWidth, int kQueries>
ATTN_DEVICE void query_rows(const QueryRows& p, int number) {
  constexpr int kLanes = kWidth / 8, kRows = 256 / kLanes;
  const int part = threadIdx.x % kLanes;
  const int blocks = (p.padded + kRowsOfBlock<kWidth> - 1) / kRowsOfBlock<kWidth>;
  const int head = number / blocks;
  const int first = (number - head * blocks) * kRowsOfBlock<kWidth> + threadIdx.x / kLanes;
  uint4 x[kAtOnce<kWidth>], y[kAtOnce<kWidth>], z[kAtOnce<kWidth>];
  ATTN_UNROLL
  for (int i = 0; i < kAtOnce<kWidth>; ++i) {
    const int m = first + i * kRows;
    x[i] = y[i] = z[i] = make_uint4(0, 0, 0, 0);
    if (m < p.M) {
      const int b = head / p.H, h = head - b * p.H;
      x[i] = load_piece(row_of<T>(p.query, b, h, m) + part * 8);
      y[i] = load_piece(row_of<T>(p.out, b, h, m) + part * 8);
      z[i] = load_piece(row_of<T>(p.grad_out, b, h, m) + part * 8);
    }
  }
  ATTN_UNROLL
  for (int i = 0; i < kAtOnce<kWidth>; ++i) {
    const int m = first + i * kRows;
    const float squared = sum_of_lanes<kLanes>(squares<T>(x[i], 0.0f));
    const float delta = sum_of_lanes<kLanes>(dot<T>(y[i], z[i]));
    if (m >= p.padded) continue;
    const int64_t row = int64_t{head} * p.M + m;
    if (part == 0) {
      const float lse = m < p.M ? p.lse[row] : -INFINITY;
      const int tile = m / kQueries, at = m - tile * kQueries;
      float* to = p.rows + (int64_t{head} * (p.padded / kQueries) + tile) * (2 * kQueries) + at;
      to[0] = lse == -INFINITY ? INFINITY : lse * static_cast<float>(kBitsPerNat);
      to[kQueries] = m < p.M && p.grad_lse ? delta - p.grad_lse[row] : delta;
    }
    float* grad = p.grad_query + (int64_t{head} * p.padded + m) * kWidth + part * 8;
    store4(grad, make_float4(0, 0, 0, 0));
    store4(grad + 4, make_float4(0, 0, 0, 0));
    if (m >= p.M) continue;
    const float factor = inverse_length(squared) * p.factor;
    store4(reinterpret_cast<uint32_t*>(static_cast<T*>(p.unit) + row * kWidth + part * 8),
           make_uint4(scaled<T>(x[i].x, factor), scaled<T>(x[i].y, factor),
                      scaled<T>(x[i].z, factor), scaled<T>(x[i].w, factor)));
  }
}

// Of the grid's blocks the first `query_blocks` have queries, the others keys.
template <class T, int kWidth, int kQueries>
__global__ void __launch_bounds__(256)
    rows_kernel(const __grid_constant__ QueryRows queries, const __grid_constant__ UnitKeys keys,
                const __grid_constant__ int query_blocks) {
  let_next_kernel_start();
  const int number = blockIdx.x;
  if (number < query_blocks) {
    query_rows<T, kWidth, kQueries>(queries, number);
  } else {
    find_unit_keys<T, kWidth>(keys, number - query_blocks);
  }
}

struct QueryGradients {
  RowsOf query;
  const float* sum;  // [B * H, tiles, 2, 8, 128, 4]: of dS k, see MultiplyBackward::add_grad_query
  void* grad;        // [B, H, M, D]
  int H, M, tiles;
  float scale;
};

// A block has a tile of queries; threads hold rows g and g + 8 as the matrix units do.
template <class T, int kWidth, int kQueries>
__global__ void __launch_bounds__(2 * kQueries)
    query_gradients_kernel(const __grid_constant__ QueryGradients p) {
  wait_for_kernel_before();
  const int head = blockIdx.x / p.tiles, tile = blockIdx.x - head * p.tiles;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int warpgroup = threadIdx.x / 128;  // of tiles of 128 queries; else a thread has both parts
  const float* sum = p.sum + (int64_t{blockIdx.x} * 2 + warpgroup) * (64 * 64) + thread * 4;
  float g[2][kWidth / 4];
  ATTN_UNROLL
  for (int i = 0; i < kWidth / 8; ++i) {
    const float4 x = load4(sum + i * 512);
    g[0][2 * i] = x.x, g[0][2 * i + 1] = x.y, g[1][2 * i] = x.z, g[1][2 * i + 1] = x.w;
  }
  ATTN_UNROLL
  for (int below = 0; below < 2; ++below) {
    const int m = tile * kQueries + warpgroup * 64 + thread / 32 * 16 + lane / 4 + 8 * below;
    uint32_t q[kWidth / 8];
    const T* from = row_of<T>(p.query, head / p.H, head % p.H, m) + lane % 4 * 8;
    float squared = 0.0f, along = 0.0f;
    ATTN_UNROLL
    for (int i = 0; i < kWidth / 32; ++i) {
      const uint4 x = m < p.M ? load_piece(from + 32 * i) : make_uint4(0, 0, 0, 0);
      uint32_t words[4] = {x.x, x.y, x.z, x.w};
      transpose_lanes(words, lane);
      ATTN_UNROLL
      for (int j = 0; j < 4; ++j) {
        q[4 * i + j] = words[j];
        const float2 pair = unpack(words[j], T{});
        squared += pair.x * pair.x + pair.y * pair.y;
        along += pair.x * g[below][8 * i + 2 * j] + pair.y * g[below][8 * i + 2 * j + 1];
      }
    }
    squared = sum_of_lanes<4>(squared);
    along = sum_of_lanes<4>(along);
    const float inverse = inverse_length(squared);
    // Below the floor of the norm the divisor is a constant: nothing to project out.
    along = squared > 1e-24f ? along * inverse * inverse : 0.0f;
    const float factor = inverse * p.scale;
    T* to = static_cast<T*>(p.grad) + (int64_t{head} * p.M + m) * kWidth + lane % 4 * 8;
    ATTN_UNROLL
    for (int i = 0; i < kWidth / 32; ++i) {
      uint32_t words[4];
      ATTN_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack(q[4 * i + j], T{});
        words[j] = pack((g[below][8 * i + 2 * j] - pair.x * along) * factor,
                        (g[below][8 * i + 2 * j + 1] - pair.y * along) * factor, T{});
      }
      transpose_lanes(words, lane);
      if (m < p.M) {
        store4(reinterpret_cast<uint32_t*>(to + 32 * i),
               make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
}

}  // namespace attn::cuda::cosine

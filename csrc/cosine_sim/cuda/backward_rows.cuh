// What the backward reads and writes per row, at the speed of memory: unit queries, lse and
// delta before it, gradients of queries through the norm after it.
#pragma once

#include "cosine_sim/cuda/relative_bias.cuh"
#include "cosine_sim/cuda/unit_keys.cuh"

namespace attn::cuda::cosine {

struct QueryRows {
  RowsOf query, out, grad_out;
  const float *lse, *grad_lse;  // [B, H, M]; the gradient may be null
  void* unit;                   // [B, H, M, D]: query / |query| * factor
  float* rows;                  // [B * H, tiles, kParts, kQueries], see Backward
  float* zeros;                 // [B * H, padded, columns], or null
  int H, M, D, padded;          // padded: tiles * kQueries
  int columns;                  // of a tile
  float factor;                 // scale * log2(e)
};

template <class T, int kWidth, int kQueries, int kParts>
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
    if (m < p.M && part * 8 < p.D) {
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
    const float factor = inverse_length(squared) * p.factor;
    if (m >= p.padded) continue;
    const int64_t row = int64_t{head} * p.M + m;
    if (part == 0) {
      const float lse = m < p.M ? p.lse[row] : -INFINITY;
      const int tile = m / kQueries, at = m - tile * kQueries;
      float* to =
          p.rows + (int64_t{head} * (p.padded / kQueries) + tile) * (kParts * kQueries) + at;
      to[0] = lse == -INFINITY ? INFINITY : in_bits(lse);
      to[kQueries] = m < p.M && p.grad_lse ? delta - p.grad_lse[row] : delta;
      if constexpr (kParts == 3) to[2 * kQueries] = factor;
    }
    if (p.zeros && part * 8 < p.columns) {
      float* to = p.zeros + (int64_t{head} * p.padded + m) * p.columns + part * 8;
      store4(to, make_float4(0, 0, 0, 0));
      store4(to + 4, make_float4(0, 0, 0, 0));
    }
    if (m >= p.M || part * 8 >= p.D) continue;
    store4(reinterpret_cast<uint32_t*>(static_cast<T*>(p.unit) + row * p.D + part * 8),
           make_uint4(scaled<T>(x[i].x, factor), scaled<T>(x[i].y, factor),
                      scaled<T>(x[i].z, factor), scaled<T>(x[i].w, factor)));
  }
}

// Of the grid's blocks the first `query_blocks` have queries, the others keys.
template <class T, int kWidth, int kQueries, int kParts>
__global__ void __launch_bounds__(256)
    rows_kernel(const __grid_constant__ QueryRows queries, const __grid_constant__ UnitKeys keys,
                const __grid_constant__ int query_blocks) {
  let_next_kernel_start();
  const int number = blockIdx.x;
  if (number < query_blocks) {
    query_rows<T, kWidth, kQueries, kParts>(queries, number);
  } else {
    find_unit_keys<T, kWidth>(keys, number - query_blocks);
  }
}

// The same for keys, where no block of the backward has whole rows of sums.
struct KeyGradients {
  RowsOf key;
  const float* sum;  // [B, Hk, N, D]: of dS q, with log2(e) as a factor
  void* grad;        // [B, Hk, N, D]
  int Hk, N, D;
};

template <class T, int kWidth>
__global__ void __launch_bounds__(256)
    key_gradients_kernel(const __grid_constant__ KeyGradients p) {
  wait_for_kernel_before();
  constexpr int kLanes = kWidth / 8, kRows = 256 / kLanes;
  const int blocks = (p.N + kRows - 1) / kRows, head = blockIdx.x / blocks;
  const int n = (blockIdx.x - head * blocks) * kRows + threadIdx.x / kLanes;
  const int part = threadIdx.x % kLanes * 8;
  const bool inside = n < p.N && part < p.D;
  const int64_t index = (int64_t{head} * p.N + n) * p.D + part;
  uint32_t k[4] = {0, 0, 0, 0};
  float g[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (inside) {
    const uint4 x = load_piece(row_of<T>(p.key, head / p.Hk, head % p.Hk, n) + part);
    k[0] = x.x, k[1] = x.y, k[2] = x.z, k[3] = x.w;
    const float4 low = load4(p.sum + index), high = load4(p.sum + index + 4);
    g[0] = low.x, g[1] = low.y, g[2] = low.z, g[3] = low.w;
    g[4] = high.x, g[5] = high.y, g[6] = high.z, g[7] = high.w;
  }
  float squared = 0.0f, along = 0.0f;
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(k[i], T{});
    squared += pair.x * pair.x + pair.y * pair.y;
    along += pair.x * g[2 * i] + pair.y * g[2 * i + 1];
  }
  squared = sum_of_lanes<kLanes>(squared);
  along = sum_of_lanes<kLanes>(along);
  const float inverse = inverse_length(squared);
  along = squared > 1e-24f ? along * inverse * inverse : 0.0f;
  const float factor = inverse * static_cast<float>(1 / kBitsPerNat);
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(k[i], T{});
    k[i] =
        pack((g[2 * i] - pair.x * along) * factor, (g[2 * i + 1] - pair.y * along) * factor, T{});
  }
  if (inside) {
    store4(reinterpret_cast<uint32_t*>(static_cast<T*>(p.grad) + index),
           make_uint4(k[0], k[1], k[2], k[3]));
  }
}

struct QueryGradients {
  RowsOf query;
  const float* sum;  // [B * H, tiles, ...]: of dS k, see MultiplyBackward::add_grad_query
  void* grad;        // [B, H, M, D]
  int H, M, D, tiles;
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
  const float* sum =
      p.sum + (int64_t{blockIdx.x} * (kQueries / 64) + warpgroup) * (64 * kWidth) + thread * 4;
  constexpr int kSums = kWidth / 4, kPieces = (kWidth + 31) / 32;
  float g[2][kSums];
  ATTN_UNROLL
  for (int i = 0; i < kWidth / 8; ++i) {
    const float4 x = load4(sum + i * 512);
    g[0][2 * i] = x.x, g[0][2 * i + 1] = x.y, g[1][2 * i] = x.z, g[1][2 * i + 1] = x.w;
  }
  ATTN_UNROLL
  for (int below = 0; below < 2; ++below) {
    const int m = tile * kQueries + warpgroup * 64 + thread / 32 * 16 + lane / 4 + 8 * below;
    uint32_t q[4 * kPieces];  // zeros past the end
    const T* from = row_of<T>(p.query, head / p.H, head % p.H, m) + lane % 4 * 8;
    const int columns = m < p.M ? p.D - lane % 4 * 8 : 0;  // from this lane's first on
    float squared = 0.0f, along = 0.0f;
    ATTN_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const uint4 x = 32 * i < columns ? load_piece(from + 32 * i) : make_uint4(0, 0, 0, 0);
      uint32_t words[4] = {x.x, x.y, x.z, x.w};
      transpose_lanes(words, lane);
      ATTN_UNROLL
      for (int j = 0; j < 4; ++j) {
        q[4 * i + j] = words[j];
        const float2 pair = unpack(words[j], T{});
        squared += pair.x * pair.x + pair.y * pair.y;
        const float* sums = g[below] + (8 * i + 2 * j) % kSums;
        along += pair.x * sums[0] + pair.y * sums[1];
      }
    }
    squared = sum_of_lanes<4>(squared);
    along = sum_of_lanes<4>(along);
    const float inverse = inverse_length(squared);
    // Below the floor of the norm the divisor is a constant: nothing to project out.
    along = squared > 1e-24f ? along * inverse * inverse : 0.0f;
    const float factor = inverse * p.scale;
    T* to = static_cast<T*>(p.grad) + (int64_t{head} * p.M + m) * p.D + lane % 4 * 8;
    ATTN_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      uint32_t words[4];
      ATTN_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack(q[4 * i + j], T{});
        const float* sums = g[below] + (8 * i + 2 * j) % kSums;
        words[j] =
            pack((sums[0] - pair.x * along) * factor, (sums[1] - pair.y * along) * factor, T{});
      }
      transpose_lanes(words, lane);
      if (32 * i < columns) {
        store4(reinterpret_cast<uint32_t*>(to + 32 * i),
               make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
}

}  // namespace attn::cuda::cosine

// Gradients of bias and relative_bias: sums of the gradients of scores over whatever they were
// broadcast along. A block owns what it writes, a tile of 64 x 32 sums in registers, and computes
// the tiles of scores that belong to it one after the other: no [M, N] tensor, no atomics.
#pragma once

#include "l1/cuda/backward.cuh"

namespace attn::cuda::l1 {

// Sizes of the gradient of bias, each 1 or full; its parts are summed by sum_parts_kernel.
struct BiasGradient {
  int B, H, M, N;
  int query_tiles, key_tiles;  // of the whole problem
  int parts;
  float* out;  // [parts, B, H, M, N], or [H, offsets, kDiagonals] of relative_bias
};

// A thread's sums of a tile to [query][key] in shared memory.
template <class P>
ATTN_DEVICE void store_tile(const Tile<16>& sums, float* to) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  constexpr int kTileRows = P::kKeys / 32;
  __syncthreads();
  if (warp < kTileRows * (P::kQueries / 16)) {
    for (int e = 0; e < 16; ++e) {
      const int i = e / 4, j = e % 4;
      const int key = warp % kTileRows * 32 + 4 * g + i, query = warp / kTileRows * 16 + 4 * t + j;
      to[query * P::kKeyPitch + key] = sums.at[i / 2][j / 2][i % 2 * 2 + j % 2];
    }
  }
  __syncthreads();
}

// Block (tile of the gradient, part).
template <class T, int kWidth>
__global__ void __launch_bounds__(Plan<T, kWidth>::kThreads)
    bias_kernel(const __grid_constant__ Problem p, const __grid_constant__ Gradients g,
                const __grid_constant__ BiasGradient bias) {
  using P = Plan<T, kWidth>;
  const int own_queries = bias.M == 1 ? 1 : bias.query_tiles;
  const int own_keys = bias.N == 1 ? 1 : bias.key_tiles;
  const int key = blockIdx.x % own_keys, query = blockIdx.x / own_keys % own_queries;
  const int bh = blockIdx.x / own_keys / own_queries, h = bh % bias.H, b = bh / bias.H;
  const int count_b = p.B / bias.B, count_h = p.H / bias.H;
  const int count_m = bias.query_tiles / own_queries, count_n = bias.key_tiles / own_keys;
  const int64_t count = int64_t{count_b} * count_h * count_m * count_n;
  Tile<16> sums = {};
  for (int64_t s = blockIdx.y; s < count; s += bias.parts) {
    const int n = key + static_cast<int>(s % count_n);
    const int m = query + static_cast<int>(s / count_n % count_m);
    const int head = h + static_cast<int>(s / count_n / count_m % count_h);
    const int batch = b + static_cast<int>(s / count_n / count_m / count_h);
    KeyTile<T, kWidth, true>(p, g, batch * p.Hk + head / (p.H / p.Hk), n)
        .add_score_grads(head, m, sums);
  }
  float* tile = shared_memory<float>();
  store_tile<P>(sums, tile);
  const int queries = bias.M == 1 ? 1 : P::kQueries, keys = bias.N == 1 ? 1 : P::kKeys;
  float* out = bias.out + (int64_t{blockIdx.y} * bias.B * bias.H + bh) * bias.M * bias.N;
  for (int i = threadIdx.x; i < queries * keys; i += P::kThreads) {
    const int m = i / keys, n = i % keys;
    const int64_t row = int64_t{query} * P::kQueries + m, column = int64_t{key} * P::kKeys + n;
    if (row >= bias.M || column >= bias.N) continue;
    float sum = 0.0f;
    for (int r = m; r < (bias.M == 1 ? P::kQueries : m + 1); ++r) {
      for (int c = n; c < (bias.N == 1 ? P::kKeys : n + 1); ++c) sum += tile[r * P::kKeyPitch + c];
    }
    out[row * bias.N + column] = sum;
  }
}

// Diagonals of a tile: key - query of its corner, -(kQueries - 1) .. kKeys - 1.
template <class P>
constexpr int kDiagonals = P::kQueries + P::kKeys - 1;

// Block (offset, head): all tiles whose corner has key - query = kStep * (offset - query_tiles +
// 1), kStep the smaller side of a tile. They lie one tile of the larger side apart.
template <class T, int kWidth>
__global__ void __launch_bounds__(Plan<T, kWidth>::kThreads)
    relative_bias_kernel(const __grid_constant__ Problem p, const __grid_constant__ Gradients g,
                         const __grid_constant__ BiasGradient bias) {
  using P = Plan<T, kWidth>;
  constexpr int kRatio = P::kKeys / P::kQueries;
  static_assert(kRatio * P::kQueries == P::kKeys);
  const int h = blockIdx.y, offset = static_cast<int>(blockIdx.x) - bias.query_tiles + 1;
  Tile<16> sums = {};
  for (int b = 0; b < p.B; ++b) {
    for (int n = 0; n < bias.key_tiles; ++n) {
      const int m = kRatio * n - offset;
      if (m < 0 || m >= bias.query_tiles) continue;
      KeyTile<T, kWidth, true>(p, g, b * p.Hk + h / (p.H / p.Hk), n).add_score_grads(h, m, sums);
    }
  }
  float* tile = shared_memory<float>();
  store_tile<P>(sums, tile);
  float* out = bias.out + (int64_t{h} * gridDim.x + blockIdx.x) * kDiagonals<P>;
  for (int i = threadIdx.x; i < kDiagonals<P>; i += P::kThreads) {
    float sum = 0.0f;
    for (int m = 0; m < P::kQueries; ++m) {
      const int n = m + i - (P::kQueries - 1);
      if (n >= 0 && n < P::kKeys) sum += tile[m * P::kKeyPitch + n];
    }
    out[i] = sum;
  }
}

// out[i] = sum of parts[part, i].
__global__ void __launch_bounds__(kPrepassThreads)
    sum_parts_kernel(const float* parts, int count, int64_t size, float* out) {
  const int64_t i = int64_t{blockIdx.x} * kPrepassThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int part = 0; part < count; ++part) sum += parts[part * size + i];
  out[i] = sum;
}

// grad[h, n - m + M - 1] from the diagonals of the offsets. `step` is the smaller side of a tile.
__global__ void __launch_bounds__(kPrepassThreads)
    sum_diagonals_kernel(const __grid_constant__ Problem p,
                         const __grid_constant__ BiasGradient bias, int step, int diagonals,
                         int offsets, float* grad) {
  const int64_t length = int64_t{p.M} + p.N - 1;
  const int64_t i = int64_t{blockIdx.x} * kPrepassThreads + threadIdx.x;
  if (i >= p.H * length) return;
  const int64_t h = i / length, difference = i % length - (p.M - 1);
  float sum = 0.0f;
  // Offset o holds differences step * (o - query_tiles + 1) - (step - 1) and on.
  for (int o = 0; o < offsets; ++o) {
    const int64_t place = difference - int64_t{step} * (o - bias.query_tiles + 1) + step - 1;
    if (place >= 0 && place < diagonals) sum += bias.out[(h * offsets + o) * diagonals + place];
  }
  grad[i] = sum;
}

}  // namespace attn::cuda::l1

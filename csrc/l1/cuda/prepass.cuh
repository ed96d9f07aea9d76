// The largest query or key of a key/value head, and the common factor that 16 bits get from it: a
// power of two that makes differences and their short sums fit half precision, whatever range the
// inputs have. What float32 gets: range.cuh.
#pragma once

#include "l1/cuda/problem.cuh"

namespace attn::cuda::l1 {

constexpr int kPrepassThreads = 256;
constexpr int kLargestParts = 64;

ATTN_DEVICE float warp_max(float x) {
  ATTN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// largest[b, kv head, part] = the largest |x| of one part of the rows of query and key: of finite
// numbers for 16 bits, infinity if there are others for float32. Grid: parts x B * Hk.
template <class T>
__global__ void __launch_bounds__(kPrepassThreads)
    largest_kernel(const __grid_constant__ Problem p) {
  constexpr int kPrepassWarps = kPrepassThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = blockIdx.x % p.largest_parts, head = blockIdx.x / p.largest_parts;
  const int b = head / p.Hk, hk = head % p.Hk;
  const int group = p.H / p.Hk;
  const int64_t query_rows = int64_t{group} * p.M;
  const int64_t stride = int64_t{kPrepassWarps} * p.largest_parts;
  float largest = 0.0f;
#pragma unroll 4
  for (int64_t row = int64_t{part} * kPrepassWarps + warp; row < query_rows + p.N; row += stride) {
    const bool is_query = row < query_rows;
    const T* source = is_query ? p.query.at<T>(b, hk * group + row / p.M, row % p.M)
                               : p.key.at<T>(b, hk, row - query_rows);
    const int64_t step = is_query ? p.query.stride[3] : p.key.stride[3];
    for (int d = lane; d < p.D; d += 32) {
      const float x = fabsf(to_float(source[d * step]));
      if (x <= 3.4028235e38f) {
        largest = fmaxf(largest, x);
      } else if (sizeof(T) == 4) {
        largest = INFINITY;
      }
    }
  }
  float* of_warps = shared_memory<float>();
  largest = warp_max(largest);
  if (lane == 0) of_warps[warp] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kPrepassWarps; ++i) largest = fmaxf(largest, of_warps[i]);
    p.largest[blockIdx.x] = largest;
  }
}

// All 32 lanes take part.
ATTN_DEVICE float largest_of(const Problem& p, int b, int hk) {
  float largest = 0.0f;
  const float* parts = p.largest + (int64_t{b} * p.Hk + hk) * p.largest_parts;
  for (int i = threadIdx.x % 32; i < p.largest_parts; i += 32) largest = fmaxf(largest, parts[i]);
  return warp_max(largest);
}

struct Factor {
  float up;    // inputs are multiplied by it, exactly
  float down;  // 1 / up
};

// Scaled inputs are below 2^12: a difference is below 2^13 and a sum of two below 2^14, where half
// precision ends at 2^16. All 32 lanes take part.
template <class T>
ATTN_DEVICE Factor common_factor(const Problem& p, int b, int hk) {
  const int exponent = static_cast<int>(float_bits(largest_of(p, b, hk)) >> 23) - 127;
  int shift = 11 - exponent;
  shift = shift < 126 ? shift : 126;
  return {bits_float(static_cast<uint32_t>(127 + shift) << 23),
          bits_float(static_cast<uint32_t>(127 - shift) << 23)};
}
template <>
ATTN_DEVICE Factor common_factor<float>(const Problem&, int, int) {
  return {1.0f, 1.0f};
}

}  // namespace attn::cuda::l1

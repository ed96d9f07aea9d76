// Passes over the rows of the output before the backward, and the gradient of the sinks.
#pragma once

#include "l1/cuda/backward_tile.cuh"

namespace attn::cuda::l1 {

constexpr int kRowThreads = 256;

// delta = sum of out * grad_out - grad_lse, and lse with +inf for a row that sees nothing, so that
// its weights are 0.
struct RowPass {
  Array grad_lse;  // float [B,H,M] or absent
  float *lse, *delta;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    rows_kernel(const __grid_constant__ Problem p, const __grid_constant__ Array grad_out,
                const __grid_constant__ RowPass pass) {
  const int64_t row = int64_t{blockIdx.x} * (kRowThreads / 32) + threadIdx.x / 32;
  if (row >= int64_t{p.B} * p.H * p.M) return;
  const int m = static_cast<int>(row % p.M), h = static_cast<int>(row / p.M % p.H);
  const int b = static_cast<int>(row / p.M / p.H);
  const T* out = p.out.at<T>(b, h, m);
  const T* grad = grad_out.at<T>(b, h, m);
  float sum = 0.0f;
  for (int e = threadIdx.x % 32; e < p.E; e += 32) {
    sum = fmaf(to_float(out[e * p.out.stride[3]]), to_float(grad[e * grad_out.stride[3]]), sum);
  }
  ATTN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (threadIdx.x % 32 != 0) return;
  const float lse = *p.lse.at<float>(b, h, m);
  pass.delta[row] = sum - (pass.grad_lse.data ? *pass.grad_lse.at<float>(b, h, m) : 0.0f);
  pass.lse[row] = lse == -INFINITY ? INFINITY : lse;
}

// grad_sink[h] = -sum over b, m of exp(sink - lse) delta. A block per head.
__global__ void __launch_bounds__(kRowThreads)
    sink_kernel(const __grid_constant__ Problem p, const float* lse, const float* delta,
                float* grad) {
  const int h = blockIdx.x;
  const float sink = *p.sink.at<float>(h);
  float* sums = shared_memory<float>();
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < int64_t{p.B} * p.M; i += kRowThreads) {
    const int64_t row = (i / p.M * p.H + h) * p.M + i % p.M;
    sum -= fast_exp2((sink - lse[row]) * 1.4426950408889634f) * delta[row];
  }
  sums[threadIdx.x] = sum;
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) grad[h] = sums[0];
}

// out = sums rounded, and sums = 0 for who comes next.
template <class T>
__global__ void __launch_bounds__(kRowThreads) round_kernel(float* sums, int64_t count, T* out) {
  const int64_t i = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (i >= count) return;
  out[i] = from_float<T>(sums[i]);
  sums[i] = 0.0f;
}

}  // namespace attn::cuda::l1

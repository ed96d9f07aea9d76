// The kernel of the backward: what its warps do.
#pragma once

#include "cosine_sim/cuda/backward_diagonals.cuh"
#include "cosine_sim/cuda/backward_multiply.cuh"

namespace attn::cuda::cosine {

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    backward_kernel(const __grid_constant__ Backward p) {
#ifdef ATTN_HOPPER
  const BackwardShared<P> shared{aligned_shared_memory()};
  if (threadIdx.x == 0) {
    prefetch_map(&p.query);
    prefetch_map(&p.key);
    prefetch_map(&p.value);
    prefetch_map(&p.grad_out);
    shared.init_barriers();
  }
  __syncthreads();
  let_next_kernel_start();
  if (threadIdx.x < 128) {
    fewer_registers<P::kFetchRegisters>();
    const int warp = shuffle(static_cast<int>(threadIdx.x / 32), 0);
    if (warp == 0) fetch_backward<P>(p, shared);
    if constexpr (P::kNarrow) {
      if (warp > 0) make_all_unit_keys<P>(p, shared, threadIdx.x - 32);
    }
    if constexpr (P::kSumWarps > 0) {
      if (warp > 0) {
        const int lane = static_cast<int>(threadIdx.x & 31);
        SumDiagonals<P>{p, shared, warp - 1, lane}.run();
      }
    }
  } else {
    more_registers<P::kMultiplyRegisters>();
    MultiplyBackward<P> multiply(p, shared, threadIdx.x - 128);
    multiply.run();
  }
#endif
}

}  // namespace attn::cuda::cosine

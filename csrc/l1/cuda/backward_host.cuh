// What the host's side of the backward consists of.
#pragma once

#include <algorithm>

#include "l1/cuda/arguments.cuh"
#include "l1/cuda/backward_tile.cuh"

namespace attn::cuda::l1 {

inline int64_t tiles_of(int64_t length, int64_t tile) {
  return (length + tile - 1) / tile;
}

inline unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "l1: too long for one launch: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

// Calls f with the element type and the least padded width that serves.
template <class F>
void with_plan(ScalarType dtype, const Problem& p, F f) {
  const int width = std::max(p.D, p.E);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (width <= 64) return f(zero, Plan<T, 64>{});
    if (width <= 128) return f(zero, Plan<T, 128>{});
    f(zero, Plan<T, 256>{});
  });
}

inline float* floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.data_ptr());
}

// The gradient of bias in float32, of its shape (backward_bias.cu).
Tensor bias_gradient(const Device& device, const Tensor& bias, ScalarType dtype, const Problem& p,
                     const Gradients& g);

// The gradient of relative_bias, to `out` [H, M + N - 1].
void relative_bias_gradient(const Device& device, const Tensor& out, ScalarType dtype,
                            const Problem& p, const Gradients& g);

}  // namespace attn::cuda::l1

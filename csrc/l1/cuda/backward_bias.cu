// Gradients of bias and relative_bias: launches of backward_bias.cuh.
#include "l1/cuda/backward_bias.cuh"

#include "l1/cuda/backward_host.cuh"

namespace attn::cuda::l1 {
namespace {

// As many blocks keep a GPU busy.
constexpr int64_t kBusyBlocks = 264;

void sum_parts(const Device& device, const float* parts, int count, int64_t size, float* out) {
  launch(device, "l1: sum of parts", &sum_parts_kernel,
         dim3(grid_size(tiles_of(size, kPrepassThreads))), kPrepassThreads, 0, parts, count, size,
         out);
}

template <class T, class P>
Tensor launch_bias(const Device& device, const Tensor& bias, const Problem& p, const Gradients& g) {
  BiasGradient of{};
  of.B = static_cast<int>(bias.size(0));
  of.H = static_cast<int>(bias.size(1));
  of.M = static_cast<int>(bias.size(2));
  of.N = static_cast<int>(bias.size(3));
  of.query_tiles = static_cast<int>(tiles_of(p.M, P::kQueries));
  of.key_tiles = static_cast<int>(tiles_of(p.N, P::kKeys));
  const int64_t owned =
      int64_t{of.B} * of.H * tiles_of(of.M, P::kQueries) * tiles_of(of.N, P::kKeys);
  const int64_t tiles = int64_t{p.B} * p.H * of.query_tiles * of.key_tiles;
  of.parts = static_cast<int>(std::clamp<int64_t>(kBusyBlocks / owned, 1, tiles / owned));
  const Tensor out = new_empty(bias, bias.sizes(), ScalarType::Float);
  const Tensor parts =
      of.parts == 1 ? out : new_empty(bias, {of.parts, bias.numel()}, ScalarType::Float);
  of.out = floats(parts);
  launch(device, "l1: gradient of bias", &bias_kernel<T, P::kWidth>,
         dim3(grid_size(owned), static_cast<unsigned>(of.parts)), P::kThreads,
         BackwardMemory<T, P>::kBytes, p, g, of);
  if (of.parts > 1) sum_parts(device, of.out, of.parts, bias.numel(), floats(out));
  return out;
}

template <class T, class P>
void launch_relative_bias(const Device& device, const Problem& p, const Gradients& g,
                          const Tensor& out) {
  BiasGradient of{};
  of.query_tiles = static_cast<int>(tiles_of(p.M, P::kQueries));
  of.key_tiles = static_cast<int>(tiles_of(p.N, P::kKeys));
  const int ratio = P::kKeys / P::kQueries;
  const int offsets = of.query_tiles + ratio * (of.key_tiles - 1);
  const Tensor sums = new_empty(out, {p.H, offsets, kDiagonals<P>}, ScalarType::Float);
  of.out = floats(sums);
  launch(device, "l1: gradient of relative_bias", &relative_bias_kernel<T, P::kWidth>,
         dim3(static_cast<unsigned>(offsets), static_cast<unsigned>(p.H)), P::kThreads,
         BackwardMemory<T, P>::kBytes, p, g, of);
  launch(device, "l1: sum of diagonals", &sum_diagonals_kernel,
         dim3(grid_size(tiles_of(out.numel(), kPrepassThreads))), kPrepassThreads, 0, p, of,
         P::kQueries, kDiagonals<P>, offsets, floats(out));
}

}  // namespace

Tensor bias_gradient(const Device& device, const Tensor& bias, ScalarType dtype, const Problem& p,
                     const Gradients& g) {
  Tensor out;
  with_plan(dtype, p, [&](auto zero, auto plan) {
    out = launch_bias<decltype(zero), decltype(plan)>(device, bias, p, g);
  });
  return out;
}

void relative_bias_gradient(const Device& device, const Tensor& out, ScalarType dtype,
                            const Problem& p, const Gradients& g) {
  with_plan(dtype, p, [&](auto zero, auto plan) {
    launch_relative_bias<decltype(zero), decltype(plan)>(device, p, g, out);
  });
}

}  // namespace attn::cuda::l1

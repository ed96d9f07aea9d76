// attn::_l1_fwd_cuda: shapes in, the kernels of forward.cuh.
#include "l1/cuda/forward.cuh"

#include <tuple>

#include "l1/cuda/arguments.cuh"

namespace attn::cuda::l1 {
namespace {

template <class T, int kKeys, int kWidth>
void launch_forward(const Device& device, const Problem& p) {
  const int64_t parts = (p.E + kWidth - 1) / kWidth;
  const int64_t blocks = (int64_t{p.M} + kQueries - 1) / kQueries * p.B * p.H * parts;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "l1: too many queries for one launch: ", blocks,
                  " blocks of ", kQueries);
  const dim3 grid(static_cast<unsigned>(blocks));
  if (p.has_extras()) {
    launch(device, "l1: forward", &forward_kernel<T, kKeys, kWidth, true>, grid, kThreads,
           ForwardMemory::at<T, kKeys, kWidth, true>(nullptr, p.D).bytes, p);
  } else {
    launch(device, "l1: forward", &forward_kernel<T, kKeys, kWidth, false>, grid, kThreads,
           ForwardMemory::at<T, kKeys, kWidth, false>(nullptr, p.D).bytes, p);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& mask, const OptionalTensor& bias,
                                   const OptionalTensor& relative_bias, const OptionalTensor& sink,
                                   const OptionalTensor& start, const OptionalTensor& stop,
                                   int64_t left, int64_t right, double scale,
                                   std::optional<double> eps) {
  Problem p = make_problem(
      {query, key, value, mask, bias, relative_bias, sink, start, stop, left, right, scale, eps});
  Tensor out = new_empty(query, {p.B, p.H, p.M, p.E});
  Tensor lse = new_empty(query, {p.B, p.H, p.M}, ScalarType::Float);
  p.out = array(out);
  p.lse = array(lse);
  if (lse.numel() == 0) return {out, lse};
  const Device device(query);
  OptionalTensor largest;
  if (query.scalar_type() != ScalarType::Float || may_use_grid(p)) {
    largest = launch_largest(device, query, p);
  }
  with_type(query.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (p.E <= 64) {
      launch_forward<T, 64, 64>(device, p);
    } else {
      launch_forward<T, 32, 128>(device, p);
    }
  });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_FRAGMENT(attn, m) {
  m.def(
      "_l1_fwd_cuda(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, "
      "Tensor? relative_bias, Tensor? sink, Tensor? start, Tensor? stop, SymInt left, "
      "SymInt right, float scale, float? eps) -> (Tensor out, Tensor lse)");
}
STABLE_TORCH_LIBRARY_IMPL(attn, ATTN_DISPATCH_KEY, m) {
  m.impl("_l1_fwd_cuda", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace attn::cuda::l1

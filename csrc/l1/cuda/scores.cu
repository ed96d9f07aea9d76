// attn::_l1_scores_fwd_cuda: shapes in, the kernels of scores.cuh.
#include "l1/cuda/scores.cuh"

#include "l1/cuda/arguments.cuh"

namespace attn::cuda::l1 {
namespace {

Tensor scores(const Tensor& query, const Tensor& key, double scale, std::optional<double> eps) {
  check_query_key_value(kOp, query, key, key);
  Problem p = make_problem(query, key, scale, eps);
  Tensor out = new_empty(query, {p.B, p.H, p.M, p.N});
  p.out = array(out);
  p.E = 1;
  if (out.numel() == 0) return out;
  const Device device(query);
  const OptionalTensor largest = find_largest(device, query, p);
  const int64_t blocks = (int64_t{p.M} + kQueries - 1) / kQueries * p.B * p.H;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31),
                  "l1_scores: too many queries for one launch: ", blocks, " blocks of ", kQueries);
  const int keys = kScoreTiles * kScoreKeys;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>((p.N + keys - 1) / keys));
  with_type(query.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int words = std::min(padded_words<T>(p.D), kSliceWords);
    const size_t shared = sizeof(uint32_t) * words * (kQueryPitch + kKeyPitch<kScoreKeys>);
    launch(device, "l1_scores: forward", &scores_kernel<T>, grid, kThreads, shared, p);
  });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(attn, m) {
  m.def("_l1_scores_fwd_cuda(Tensor query, Tensor key, float scale, float? eps) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(attn, ATTN_DISPATCH_KEY, m) {
  m.impl("_l1_scores_fwd_cuda", TORCH_BOX(&scores));
}

}  // namespace
}  // namespace attn::cuda::l1

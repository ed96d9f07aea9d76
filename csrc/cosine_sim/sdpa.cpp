#include "cosine_sim/sdpa.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "common/checks.h"
#include "common/isa.h"

namespace attn::cosine_sim {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// The same memory without autograd's knowledge of it, rows contiguous.
Tensor plain(const Tensor& tensor) {
  Tensor alias = torch::stable::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                                          tensor.device(), tensor.scalar_type());
  return tensor.stride(3) == 1 ? alias : torch::stable::contiguous(alias);
}

// [B, heads, length, D] normalised, in the dtype of the input.
Tensor normalized(const Problem& p, const Kernels& kernels, const Tensor& tensor) {
  if (p.groups == 0) return plain(tensor);
  Tensor result = allocate(tensor, tensor.sizes());
  kernels.normalize_float(p, view(tensor), tensor.size(1), tensor.size(2), view(result));
  return result;
}

bool is_causal(const Problem& p) {
  return p.visible.right < p.N;
}

}  // namespace

bool prefers_sdpa(const Problem& p) {
#if defined(ATTN_FORCE_SDPA)
  static const bool machine_has_products = true;
#else
  static const bool machine_has_products = has_bfloat16_products();
#endif
  const bool plain_scores = !p.has_extras() && !p.head_scale && !p.sink && !p.query_gain &&
                            !p.key_gain && !p.visible.start;
  const bool whole = p.visible.left >= p.M && p.visible.right >= p.N;
  const bool causal = p.visible.left >= p.M && p.visible.right == 0 && p.M == p.N;
  return machine_has_products && p.query.dtype == ScalarType::BFloat16 && plain_scores &&
         (whole || causal) && p.H == p.Hk && p.D == p.E && p.B * p.M * p.N > 0;
}

void sdpa_forward(const Problem& p, const Kernels& kernels, const Tensor& query, const Tensor& key,
                  const Tensor& value, Tensor& out, Tensor& lse) {
  std::array<StableIValue, 7> stack{from(normalized(p, kernels, query)),
                                    from(normalized(p, kernels, key)),
                                    from(plain(value)),
                                    from(0.0),
                                    from(is_causal(p)),
                                    from(OptionalTensor()),
                                    from(std::optional<double>(p.scale))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      "aten::_scaled_dot_product_flash_attention_for_cpu", "", stack.data(), TORCH_ABI_VERSION));
  out = torch::stable::contiguous(to<Tensor>(stack[0]));
  lse = torch::stable::contiguous(to<Tensor>(stack[1]));
}

void sdpa_backward(const Problem& p, const Gradients& grads, const Kernels& kernels,
                   const Tensor& grad_out, const Tensor& query, const Tensor& key,
                   const Tensor& value, const Tensor& out, const Tensor& lse) {
  std::array<StableIValue, 10> stack{from(plain(grad_out)),
                                     from(normalized(p, kernels, query)),
                                     from(normalized(p, kernels, key)),
                                     from(plain(value)),
                                     from(out),
                                     from(lse),
                                     from(0.0),
                                     from(is_causal(p)),
                                     from(OptionalTensor()),
                                     from(std::optional<double>(p.scale))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "",
                            stack.data(), TORCH_ABI_VERSION));
  const Tensor grad_query = to<Tensor>(stack[0]);
  const Tensor grad_key = to<Tensor>(stack[1]);
  Problem value_problem = p;  // without a norm the rows are copied
  value_problem.groups = 0;
  const Tensor grad_value = to<Tensor>(stack[2]);
  const auto finish = kernels.normalize_backward_float;
  if (grads.query) finish(p, view(grad_query), p.query, p.H, p.M, grads.query);
  if (grads.key) finish(p, view(grad_key), p.key, p.H, p.N, grads.key);
  if (grads.value) finish(value_problem, view(grad_value), p.value, p.H, p.N, grads.value);
}

}  // namespace attn::cosine_sim

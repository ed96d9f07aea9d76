#include "common/attention.h"

#include <torch/csrc/stable/library.h>

#include <utility>

namespace attn {

using torch::stable::new_zeros;

namespace {

void check_options(const char* op, const AttentionArguments& a) {
  const ScalarType dtype = a.query.scalar_type();
  const int64_t B = a.query.size(0), H = a.query.size(1), M = a.query.size(2), N = a.key.size(2);
  if (a.mask.has_value()) {
    check_dtype(op, "mask", *a.mask, ScalarType::Bool);
    check_shape(op, "mask", *a.mask, {B, H, M, N}, /*or_one=*/true);
  }
  if (a.bias.has_value()) {
    if (a.bias->scalar_type() != dtype) check_dtype(op, "bias", *a.bias, compute_dtype(dtype));
    check_shape(op, "bias", *a.bias, {B, H, M, N}, /*or_one=*/true);
  }
  if (M + N > 0) check_parameter(op, "relative_bias", a.relative_bias, dtype, {H, M + N - 1});
  check_parameter(op, "sink", a.sink, dtype, {H});
  STD_TORCH_CHECK(a.start.has_value() == a.stop.has_value(), op,
                  ": start and stop must be given together");
  if (!a.start.has_value()) return;
  for (const auto& [name, tensor] : {std::pair("start", &*a.start), std::pair("stop", &*a.stop)}) {
    check_dtype(op, name, *tensor, ScalarType::Int);
    check_shape(op, name, *tensor, {tensor->dim() == 2 && tensor->size(0) == 1 ? 1 : B, M});
  }
}

}  // namespace

void read_arguments(const char* op, const AttentionArguments& a, AttentionProblem& p) {
  check_query_key_value(op, a.query, a.key, a.value);
  check_options(op, a);
  p.B = a.query.size(0);
  p.H = a.query.size(1);
  p.Hk = a.key.size(1);
  p.M = a.query.size(2);
  p.N = a.key.size(2);
  p.D = a.query.size(3);
  p.E = a.value.size(3);
  p.visible.num_queries = p.M;
  p.visible.num_keys = p.N;
  p.visible.left = Visibility::clamp_band(a.left);
  p.visible.right = Visibility::clamp_band(a.right);
  p.visible.start = view(a.start);
  p.visible.stop = view(a.stop);
  p.query = view(a.query);
  p.key = view(a.key);
  p.value = view(a.value);
  p.mask = view(a.mask);
  p.bias = view(a.bias);
  p.relative_bias = view(a.relative_bias);
  p.sink = view(a.sink);
}

void read_outputs(const char* op, const AttentionOutputs& o, AttentionProblem& p,
                  AttentionGradients& g) {
  const ScalarType dtype = p.query.dtype;
  check_dtype(op, "grad_out", o.grad_out, dtype);
  check_shape(op, "grad_out", o.grad_out, {p.B, p.H, p.M, p.E});
  check_parameter(op, "grad_lse", o.grad_lse, dtype, {p.B, p.H, p.M});
  check_dtype(op, "out", o.out, dtype);
  check_shape(op, "out", o.out, {p.B, p.H, p.M, p.E});
  check_parameter(op, "lse", o.lse, dtype, {p.B, p.H, p.M});
  p.out = view(o.out);
  p.lse = view(o.lse);
  g.grad_out = view(o.grad_out);
  g.grad_lse = view(o.grad_lse);
}

Tensor new_gradient(const Tensor& query, const OptionalTensor& input, bool wanted, View& target) {
  if (!wanted || !input.has_value()) {
    return allocate(query, {0}, input.has_value() ? input->scalar_type() : query.scalar_type());
  }
  Tensor gradient = allocate(*input, input->sizes());
  target = view(gradient);
  return gradient;
}

Tensor new_sum(const Tensor& query, const OptionalTensor& input, bool wanted, View& target) {
  if (!wanted || !input.has_value()) return new_gradient(query, input, false, target);
  Tensor gradient = new_zeros(*input, input->sizes());
  target = view(gradient);
  return gradient;
}

Tensor new_bias_gradient(const Tensor& query, const OptionalTensor& bias, bool wanted,
                         AttentionGradients& grads) {
  if (!wanted || !bias.has_value()) return new_gradient(query, bias, false, grads.bias);
  Tensor gradient = new_zeros(*bias, bias->sizes(), compute_dtype(query.scalar_type()));
  grads.bias = view(gradient);
  grads.bias_size = gradient.numel();
  grads.sum_over_batch = bias->size(0) == 1;
  grads.sum_over_heads = bias->size(1) == 1;
  grads.sum_over_queries = bias->size(2) == 1;
  return gradient;
}

}  // namespace attn

// attn::_cosine_sim_fwd and attn::_cosine_sim_bwd on the CPU: shapes in, kernels of this machine.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/checks.h"
#include "common/isa.h"
#include "cosine_sim/problem.h"
#include "cosine_sim/sdpa.h"

namespace attn::cosine_sim {
namespace {

constexpr const char* kOp = "cosine_sim";

using torch::stable::new_empty;
using torch::stable::new_zeros;

struct Arguments {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const OptionalTensor& mask;
  const OptionalTensor& bias;
  const OptionalTensor& relative_bias;
  const OptionalTensor& head_scale;
  const OptionalTensor& query_gain;
  const OptionalTensor& key_gain;
  const OptionalTensor& sink;
  const OptionalTensor& start;
  const OptionalTensor& stop;
  int64_t left, right;
  double scale;
  int64_t groups;
};

void check_options(const Arguments& a) {
  const ScalarType dtype = a.query.scalar_type();
  const int64_t B = a.query.size(0), H = a.query.size(1), M = a.query.size(2), N = a.key.size(2);
  if (a.mask.has_value()) {
    check_dtype(kOp, "mask", *a.mask, ScalarType::Bool);
    check_shape(kOp, "mask", *a.mask, {B, H, M, N}, /*or_one=*/true);
  }
  if (a.bias.has_value()) {
    if (a.bias->scalar_type() != dtype) check_dtype(kOp, "bias", *a.bias, compute_dtype(dtype));
    check_shape(kOp, "bias", *a.bias, {B, H, M, N}, /*or_one=*/true);
  }
  if (M + N > 0) check_parameter(kOp, "relative_bias", a.relative_bias, dtype, {H, M + N - 1});
  check_parameter(kOp, "head_scale", a.head_scale, dtype, {H});
  check_parameter(kOp, "query_gain", a.query_gain, dtype, {H, a.query.size(3)});
  check_parameter(kOp, "key_gain", a.key_gain, dtype, {a.key.size(1), a.query.size(3)});
  check_parameter(kOp, "sink", a.sink, dtype, {H});
  STD_TORCH_CHECK(a.start.has_value() == a.stop.has_value(),
                  "cosine_sim: start and stop must be given together");
  if (!a.start.has_value()) return;
  for (const auto& [name, tensor] : {std::pair("start", &*a.start), std::pair("stop", &*a.stop)}) {
    check_dtype(kOp, name, *tensor, ScalarType::Int);
    check_shape(kOp, name, *tensor, {tensor->dim() == 2 && tensor->size(0) == 1 ? 1 : B, M});
  }
}

Problem make_problem(const Arguments& a) {
  check_query_key_value(kOp, a.query, a.key, a.value);
  STD_TORCH_CHECK(a.groups >= 0 && (a.groups == 0 || a.query.size(3) % a.groups == 0),
                  "cosine_sim: groups must divide D=", a.query.size(3), ", got ", a.groups);
  check_options(a);
  Problem p{};
  p.B = a.query.size(0);
  p.H = a.query.size(1);
  p.Hk = a.key.size(1);
  p.M = a.query.size(2);
  p.N = a.key.size(2);
  p.D = a.query.size(3);
  p.E = a.value.size(3);
  p.groups = a.groups;
  p.scale = a.scale;
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
  p.head_scale = view(a.head_scale);
  p.sink = view(a.sink);
  p.query_gain = view(a.query_gain);
  p.key_gain = view(a.key_gain);
  return p;
}

const Kernels& kernels() {
#if defined(__x86_64__)
  if (best_isa() == Isa::avx512) return avx512_kernels();
  if (best_isa() == Isa::avx2) return avx2_kernels();
#endif
  return baseline_kernels();
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& mask, const OptionalTensor& bias,
                                   const OptionalTensor& relative_bias,
                                   const OptionalTensor& head_scale,
                                   const OptionalTensor& query_gain, const OptionalTensor& key_gain,
                                   const OptionalTensor& sink, const OptionalTensor& start,
                                   const OptionalTensor& stop, int64_t left, int64_t right,
                                   double scale, int64_t groups) {
  Problem p = make_problem({query, key, value, mask, bias, relative_bias, head_scale, query_gain,
                            key_gain, sink, start, stop, left, right, scale, groups});
  const ScalarType dtype = query.scalar_type();
  if (prefers_sdpa(p)) {
    Tensor out, lse;
    sdpa_forward(p, kernels(), query, key, value, out, lse);
    return {out, lse};
  }
  Tensor out = new_empty(query, {p.B, p.H, p.M, p.E});
  Tensor lse = new_empty(query, {p.B, p.H, p.M}, compute_dtype(dtype));
  p.out = view(out);
  p.lse = view(lse);
  (dtype == ScalarType::Double ? kernels().forward_double : kernels().forward_float)(p);
  return {out, lse};
}

// The gradient of an input if it is wanted, else an empty tensor.
Tensor new_gradient(const Tensor& query, const OptionalTensor& input, bool wanted, View& target) {
  if (!wanted || !input.has_value()) {
    return new_empty(query, {0}, input.has_value() ? input->scalar_type() : query.scalar_type());
  }
  Tensor gradient = new_empty(*input, input->sizes());
  target = view(gradient);
  return gradient;
}

// The gradient of bias is summed in the compute dtype.
Tensor new_bias_gradient(const Tensor& query, const OptionalTensor& bias, bool wanted,
                         Gradients& grads) {
  if (!wanted || !bias.has_value()) {
    return new_gradient(query, bias, false, grads.bias);
  }
  Tensor gradient = new_zeros(*bias, bias->sizes(), compute_dtype(query.scalar_type()));
  grads.bias = view(gradient);
  grads.bias_size = gradient.numel();
  grads.sum_over_batch = bias->size(0) == 1;
  grads.sum_over_heads = bias->size(1) == 1;
  grads.sum_over_queries = bias->size(2) == 1;
  return gradient;
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Nine backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
              const Tensor& key, const Tensor& value, const OptionalTensor& mask,
              const OptionalTensor& bias, const OptionalTensor& relative_bias,
              const OptionalTensor& head_scale, const OptionalTensor& query_gain,
              const OptionalTensor& key_gain, const OptionalTensor& sink,
              const OptionalTensor& start, const OptionalTensor& stop, const Tensor& out,
              const Tensor& lse, int64_t left, int64_t right, double scale, int64_t groups,
              std::vector<bool> output_mask) {
  Problem p = make_problem({query, key, value, mask, bias, relative_bias, head_scale, query_gain,
                            key_gain, sink, start, stop, left, right, scale, groups});
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(output_mask.size() == 9, "cosine_sim: output_mask must have 9 elements, got ",
                  output_mask.size());
  check_dtype(kOp, "grad_out", grad_out, dtype);
  check_shape(kOp, "grad_out", grad_out, {p.B, p.H, p.M, p.E});
  check_parameter(kOp, "grad_lse", grad_lse, dtype, {p.B, p.H, p.M});
  check_dtype(kOp, "out", out, dtype);
  check_shape(kOp, "out", out, {p.B, p.H, p.M, p.E});
  check_parameter(kOp, "lse", lse, dtype, {p.B, p.H, p.M});
  // Saved by the forward, contiguous unless something in between changed their layout.
  const Tensor dense_out = torch::stable::contiguous(out);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  p.out = view(dense_out);
  p.lse = view(dense_lse);
  Gradients g{};
  g.grad_out = view(grad_out);
  g.grad_lse = view(grad_lse);
  Nine result{new_gradient(query, query, output_mask[0], g.query),
              new_gradient(query, key, output_mask[1], g.key),
              new_gradient(query, value, output_mask[2], g.value),
              new_bias_gradient(query, bias, output_mask[3], g),
              new_gradient(query, relative_bias, output_mask[4], g.relative_bias),
              new_gradient(query, head_scale, output_mask[5], g.head_scale),
              new_gradient(query, query_gain, output_mask[6], g.query_gain),
              new_gradient(query, key_gain, output_mask[7], g.key_gain),
              new_gradient(query, sink, output_mask[8], g.sink)};
  if (prefers_sdpa(p) && !grad_lse.has_value()) {
    sdpa_backward(p, g, kernels(), grad_out, query, key, value, dense_out, dense_lse);
    return result;
  }
  (dtype == ScalarType::Double ? kernels().backward_double : kernels().backward_float)(p, g);
  if (g.bias && bias->scalar_type() != std::get<3>(result).scalar_type()) {
    std::get<3>(result) = torch::stable::to(std::get<3>(result), bias->scalar_type());
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(attn, CPU, m) {
  m.impl("_cosine_sim_fwd", TORCH_BOX(&forward));
  m.impl("_cosine_sim_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace attn::cosine_sim

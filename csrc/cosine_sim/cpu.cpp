// attn::_cosine_sim_fwd and attn::_cosine_sim_bwd on the CPU: shapes in, kernels of this machine.
//
// The Python composite has validated its arguments; here only what would read or write out of
// bounds is checked, in the same words.
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>
#include <tuple>

#include "cosine_sim/problem.h"
#include "cosine_sim/sdpa.h"

namespace attn::cosine_sim {
namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::stable::new_empty;
using torch::stable::new_zeros;

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  const auto sizes = tensor.sizes();
  for (size_t i = 0; i < sizes.size(); ++i) text << (i > 0 ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

// -1 stands for any size, `or_one` allows a size of 1 in place of any other.
void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected,
                 bool or_one = false) {
  const auto sizes = tensor.sizes();
  bool fits = sizes.size() == expected.size();
  std::ostringstream text;
  size_t dim = 0;
  for (const int64_t size : expected) {
    fits = fits && (size < 0 || sizes[dim] == size || (or_one && sizes[dim] == 1));
    text << (dim++ > 0 ? ", " : "");
    if (size < 0) {
      text << "any";
    } else {
      text << size;
    }
  }
  STD_TORCH_CHECK(fits, "cosine_sim: ", name, " must have shape (", text.str(),
                  or_one ? "), 1 where broadcast, got " : "), got ", shape_text(tensor));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, "cosine_sim: ", name, " must have dtype ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A parameter of the compute dtype.
void check_parameter(const char* name, const OptionalTensor& tensor, ScalarType dtype,
                     std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return;
  check_dtype(name, *tensor, compute_dtype(dtype));
  check_shape(name, *tensor, shape);
}

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

void check_query_key_value(const Arguments& a) {
  const ScalarType dtype = a.query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "cosine_sim: query must be float64, float32, bfloat16 or float16, got ",
                  torch::headeronly::toString(dtype));
  check_dtype("key", a.key, dtype);
  check_dtype("value", a.value, dtype);
  check_shape("query", a.query, {-1, -1, -1, -1});
  check_shape("key", a.key, {a.query.size(0), -1, -1, a.query.size(3)});
  check_shape("value", a.value, {a.query.size(0), a.key.size(1), a.key.size(2), -1});
  const int64_t heads = a.query.size(1);
  STD_TORCH_CHECK(a.key.size(1) > 0 ? heads % a.key.size(1) == 0 : heads == 0,
                  "cosine_sim: key must have a number of heads that divides H=", heads, ", got ",
                  shape_text(a.key));
  for (const Tensor* tensor : {&a.query, &a.value}) {
    const int64_t width = tensor->size(3);
    STD_TORCH_CHECK(width >= 1 && width <= 256,
                    "cosine_sim: ", tensor == &a.query ? "query" : "value",
                    " must have a width of 1 to 256, got ", shape_text(*tensor));
  }
  STD_TORCH_CHECK(a.groups >= 0 && (a.groups == 0 || a.query.size(3) % a.groups == 0),
                  "cosine_sim: groups must divide D=", a.query.size(3), ", got ", a.groups);
}

void check_options(const Arguments& a) {
  const ScalarType dtype = a.query.scalar_type();
  const int64_t B = a.query.size(0), H = a.query.size(1), M = a.query.size(2), N = a.key.size(2);
  if (a.mask.has_value()) {
    check_dtype("mask", *a.mask, ScalarType::Bool);
    check_shape("mask", *a.mask, {B, H, M, N}, /*or_one=*/true);
  }
  if (a.bias.has_value()) {
    if (a.bias->scalar_type() != dtype) check_dtype("bias", *a.bias, compute_dtype(dtype));
    check_shape("bias", *a.bias, {B, H, M, N}, /*or_one=*/true);
  }
  if (M + N > 0) check_parameter("relative_bias", a.relative_bias, dtype, {H, M + N - 1});
  check_parameter("head_scale", a.head_scale, dtype, {H});
  check_parameter("query_gain", a.query_gain, dtype, {H, a.query.size(3)});
  check_parameter("key_gain", a.key_gain, dtype, {a.key.size(1), a.query.size(3)});
  check_parameter("sink", a.sink, dtype, {H});
  STD_TORCH_CHECK(a.start.has_value() == a.stop.has_value(),
                  "cosine_sim: start and stop must be given together");
  if (!a.start.has_value()) return;
  for (const auto& [name, tensor] : {std::pair("start", &*a.start), std::pair("stop", &*a.stop)}) {
    check_dtype(name, *tensor, ScalarType::Int);
    check_shape(name, *tensor, {tensor->dim() == 2 && tensor->size(0) == 1 ? 1 : B, M});
  }
}

Problem make_problem(const Arguments& a) {
  check_query_key_value(a);
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
  static const Kernels& chosen =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
          ? avx512_kernels()
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2_kernels()
                                                                        : baseline_kernels();
  return chosen;
#else
  return baseline_kernels();
#endif
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
  check_dtype("grad_out", grad_out, dtype);
  check_shape("grad_out", grad_out, {p.B, p.H, p.M, p.E});
  check_parameter("grad_lse", grad_lse, dtype, {p.B, p.H, p.M});
  check_dtype("out", out, dtype);
  check_shape("out", out, {p.B, p.H, p.M, p.E});
  check_parameter("lse", lse, dtype, {p.B, p.H, p.M});
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

// attn::_cosine_sim_fwd and attn::_cosine_sim_bwd on the CPU: shapes in, kernels of this machine.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cosine_sim/problem.h"
#include "cosine_sim/sdpa.h"

namespace attn::cosine_sim {
namespace {

constexpr const char* kOp = "cosine_sim";

struct Options {
  const OptionalTensor& head_scale;
  const OptionalTensor& query_gain;
  const OptionalTensor& key_gain;
  double scale;
  int64_t groups;
};

Problem make_problem(const AttentionArguments& a, const Options& o) {
  Problem p{};
  read_arguments(kOp, a, p);
  const ScalarType dtype = a.query.scalar_type();
  STD_TORCH_CHECK(o.groups >= 0 && (o.groups == 0 || p.D % o.groups == 0),
                  "cosine_sim: groups must divide D=", p.D, ", got ", o.groups);
  check_parameter(kOp, "head_scale", o.head_scale, dtype, {p.H});
  check_parameter(kOp, "query_gain", o.query_gain, dtype, {p.H, p.D});
  check_parameter(kOp, "key_gain", o.key_gain, dtype, {p.Hk, p.D});
  p.groups = o.groups;
  p.scale = o.scale;
  p.head_scale = view(o.head_scale);
  p.query_gain = view(o.query_gain);
  p.key_gain = view(o.key_gain);
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
  Problem p =
      make_problem({query, key, value, mask, bias, relative_bias, sink, start, stop, left, right},
                   {head_scale, query_gain, key_gain, scale, groups});
  const ScalarType dtype = query.scalar_type();
  if (prefers_sdpa(p)) {
    Tensor out, lse;
    sdpa_forward(p, kernels(), query, key, value, out, lse);
    return {out, lse};
  }
  Tensor out = allocate(query, {p.B, p.H, p.M, p.E});
  Tensor lse = allocate(query, {p.B, p.H, p.M}, compute_dtype(dtype));
  p.out = view(out);
  p.lse = view(lse);
  const ThreadLimit limit(p.multiplications());
  (dtype == ScalarType::Double ? kernels().forward_double : kernels().forward_float)(p);
  return {out, lse};
}

// The forward without its optional tensors: five arguments in place of 14.
std::tuple<Tensor, Tensor> plain(const Tensor& query, const Tensor& key, const Tensor& value,
                                 int64_t left, int64_t right, double scale, int64_t groups) {
  const OptionalTensor none;
  return forward(query, key, value, none, none, none, none, none, none, none, none, none, left,
                 right, scale, groups);
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
  Problem p =
      make_problem({query, key, value, mask, bias, relative_bias, sink, start, stop, left, right},
                   {head_scale, query_gain, key_gain, scale, groups});
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(output_mask.size() == 9, "cosine_sim: output_mask must have 9 elements, got ",
                  output_mask.size());
  // Saved by the forward, contiguous unless something in between changed their layout.
  const Tensor dense_out = torch::stable::contiguous(out);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  Gradients g{};
  read_outputs(kOp, {grad_out, grad_lse, dense_out, dense_lse}, p, g);
  Nine result{new_gradient(query, query, output_mask[0], g.query),
              new_gradient(query, key, output_mask[1], g.key),
              new_gradient(query, value, output_mask[2], g.value),
              new_bias_gradient(query, bias, output_mask[3], g),
              new_sum(query, relative_bias, output_mask[4], g.relative_bias),
              new_sum(query, head_scale, output_mask[5], g.head_scale),
              new_sum(query, query_gain, output_mask[6], g.query_gain),
              new_sum(query, key_gain, output_mask[7], g.key_gain),
              new_sum(query, sink, output_mask[8], g.sink)};
  if (prefers_sdpa(p) && !grad_lse.has_value()) {
    sdpa_backward(p, g, kernels(), grad_out, query, key, value, dense_out, dense_lse);
    return result;
  }
  const ThreadLimit limit(p.multiplications());
  (dtype == ScalarType::Double ? kernels().backward_double : kernels().backward_float)(p, g);
  if (g.bias && bias->scalar_type() != std::get<3>(result).scalar_type()) {
    std::get<3>(result) = torch::stable::to(std::get<3>(result), bias->scalar_type());
  }
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(attn, m) {
  m.def(
      "_cosine_sim_plain(Tensor query, Tensor key, Tensor value, int left, int right, float scale, "
      "int groups) -> (Tensor out, Tensor lse)");
}
STABLE_TORCH_LIBRARY_IMPL(attn, CPU, m) {
  m.impl("_cosine_sim_fwd", TORCH_BOX(&forward));
  m.impl("_cosine_sim_plain", TORCH_BOX(&plain));
  m.impl("_cosine_sim_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace attn::cosine_sim

// attn::_l1_fwd, _l1_bwd, _l1_scores_fwd and _l1_scores_bwd on the CPU: shapes in, kernels of this
// machine.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "l1/problem.h"

namespace attn::l1 {
namespace {

constexpr const char* kOp = "l1";
constexpr const char* kScores = "l1_scores";

const Kernels& kernels() {
#if defined(__x86_64__)
  if (best_isa() == Isa::avx512) return avx512_kernels();
  if (best_isa() == Isa::avx2) return avx2_kernels();
#endif
  return baseline_kernels();
}

Problem make_problem(double scale, std::optional<double> eps) {
  Problem p{};
  p.scale = scale;
  p.inverse = eps.has_value();
  p.eps = eps.value_or(0);
  return p;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& mask, const OptionalTensor& bias,
                                   const OptionalTensor& relative_bias, const OptionalTensor& sink,
                                   const OptionalTensor& start, const OptionalTensor& stop,
                                   int64_t left, int64_t right, double scale,
                                   std::optional<double> eps) {
  Problem p = make_problem(scale, eps);
  read_arguments(kOp,
                 {query, key, value, mask, bias, relative_bias, sink, start, stop, left, right}, p);
  const ScalarType dtype = query.scalar_type();
  Tensor out = allocate(query, {p.B, p.H, p.M, p.E});
  Tensor lse = allocate(query, {p.B, p.H, p.M}, compute_dtype(dtype));
  p.out = view(out);
  p.lse = view(lse);
  const ThreadLimit limit(p.multiplications());
  (dtype == ScalarType::Double ? kernels().forward_double : kernels().forward_float)(p);
  return {out, lse};
}

// The forward without its optional tensors.
std::tuple<Tensor, Tensor> plain(const Tensor& query, const Tensor& key, const Tensor& value,
                                 int64_t left, int64_t right, double scale,
                                 std::optional<double> eps) {
  const OptionalTensor none;
  return forward(query, key, value, none, none, none, none, none, none, left, right, scale, eps);
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
             const Tensor& key, const Tensor& value, const OptionalTensor& mask,
             const OptionalTensor& bias, const OptionalTensor& relative_bias,
             const OptionalTensor& sink, const OptionalTensor& start, const OptionalTensor& stop,
             const Tensor& out, const Tensor& lse, int64_t left, int64_t right, double scale,
             std::optional<double> eps, std::vector<bool> output_mask) {
  Problem p = make_problem(scale, eps);
  read_arguments(kOp,
                 {query, key, value, mask, bias, relative_bias, sink, start, stop, left, right}, p);
  STD_TORCH_CHECK(output_mask.size() == 6, "l1: output_mask must have 6 elements, got ",
                  output_mask.size());
  // Saved by the forward, contiguous unless something in between changed their layout.
  const Tensor dense_out = torch::stable::contiguous(out);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  Gradients g{};
  read_outputs(kOp, {grad_out, grad_lse, dense_out, dense_lse}, p, g);
  Six result{new_gradient(query, query, output_mask[0], g.query),
             new_gradient(query, key, output_mask[1], g.key),
             new_gradient(query, value, output_mask[2], g.value),
             new_bias_gradient(query, bias, output_mask[3], g),
             new_sum(query, relative_bias, output_mask[4], g.relative_bias),
             new_sum(query, sink, output_mask[5], g.sink)};
  const bool is_double = query.scalar_type() == ScalarType::Double;
  const ThreadLimit limit(p.multiplications());
  (is_double ? kernels().backward_double : kernels().backward_float)(p, g);
  if (g.bias && bias->scalar_type() != std::get<3>(result).scalar_type()) {
    std::get<3>(result) = torch::stable::to(std::get<3>(result), bias->scalar_type());
  }
  return result;
}

// Scores have no values: the keys stand in their place, and are not read.
Problem make_scores_problem(const Tensor& query, const Tensor& key, double scale,
                            std::optional<double> eps) {
  Problem p = make_problem(scale, eps);
  const OptionalTensor none;
  constexpr int64_t all = Visibility::kUnbounded;
  read_arguments(kScores, {query, key, key, none, none, none, none, none, none, all, all}, p);
  return p;
}

Tensor scores_forward(const Tensor& query, const Tensor& key, double scale,
                      std::optional<double> eps) {
  Problem p = make_scores_problem(query, key, scale, eps);
  Tensor scores = allocate(query, {p.B, p.H, p.M, p.N});
  p.out = view(scores);
  const bool is_double = query.scalar_type() == ScalarType::Double;
  const ThreadLimit limit(p.multiplications());
  (is_double ? kernels().scores_double : kernels().scores_float)(p);
  return scores;
}

std::tuple<Tensor, Tensor> scores_backward(const Tensor& grad, const Tensor& query,
                                           const Tensor& key, double scale,
                                           std::vector<bool> output_mask) {
  const Problem p = make_scores_problem(query, key, scale, std::nullopt);
  STD_TORCH_CHECK(output_mask.size() == 2, "l1_scores: output_mask must have 2 elements, got ",
                  output_mask.size());
  const ScalarType dtype = query.scalar_type();
  // 16 bits cannot hold the gradient of the distances of inverse scores.
  if (grad.scalar_type() != dtype) check_dtype(kScores, "grad", grad, compute_dtype(dtype));
  check_shape(kScores, "grad", grad, {p.B, p.H, p.M, p.N});
  Gradients g{};
  g.grad_out = view(grad);
  std::tuple<Tensor, Tensor> result{new_gradient(query, query, output_mask[0], g.query),
                                    new_gradient(query, key, output_mask[1], g.key)};
  const bool is_double = dtype == ScalarType::Double;
  const ThreadLimit limit(p.multiplications());
  (is_double ? kernels().scores_backward_double : kernels().scores_backward_float)(p, g);
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(attn, m) {
  m.def(
      "_l1_plain(Tensor query, Tensor key, Tensor value, int left, int right, float scale, float? "
      "eps) -> (Tensor out, Tensor lse)");
}
STABLE_TORCH_LIBRARY_IMPL(attn, CPU, m) {
  m.impl("_l1_plain", TORCH_BOX(&plain));
  m.impl("_l1_fwd", TORCH_BOX(&forward));
  m.impl("_l1_bwd", TORCH_BOX(&backward));
  m.impl("_l1_scores_fwd", TORCH_BOX(&scores_forward));
  m.impl("_l1_scores_bwd", TORCH_BOX(&scores_backward));
}

}  // namespace
}  // namespace attn::l1

// attn::_l1_sparse_fwd and _l1_sparse_bwd on the CPU: shapes in, kernels of this machine.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/attention.h"
#include "common/isa.h"
#include "l1/sparse_problem.h"

namespace attn::l1::sparse {
namespace {

constexpr const char* kOp = "l1_sparse";

struct Arguments {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const OptionalTensor& value_reverse;
  const Tensor& row_start;
  const Tensor& row_keys;
  const Tensor& col_start;
  const Tensor& col_queries;
  const Tensor& col_edges;
  bool softmax, sink;
  double scale;
};

const Kernels& kernels() {
#if defined(__x86_64__)
  if (best_isa() == Isa::avx512) return avx512_kernels();
  if (best_isa() == Isa::avx2) return avx2_kernels();
#endif
  return baseline_kernels();
}

// Indices, contiguous for as long as `kept` lives.
const int64_t* read_list(const char* name, const Tensor& list, int64_t length,
                         std::vector<Tensor>& kept) {
  check_dtype(kOp, name, list, ScalarType::Long);
  check_shape(kOp, name, list, {length});
  kept.push_back(torch::stable::contiguous(list));
  return static_cast<const int64_t*>(kept.back().data_ptr());
}

Problem make_problem(const Arguments& a, std::vector<Tensor>& kept) {
  check_query_key_value(kOp, a.query, a.key, a.value);
  Problem p{};
  p.B = a.query.size(0);
  p.H = a.query.size(1);
  p.Hk = a.key.size(1);
  p.M = a.query.size(2);
  p.N = a.key.size(2);
  p.D = a.query.size(3);
  p.E = a.value.size(3);
  p.softmax = a.softmax;
  p.sink = a.softmax && a.sink;
  p.scale = a.scale;
  p.query = view(a.query);
  p.key = view(a.key);
  p.value = view(a.value);
  if (a.value_reverse.has_value()) {
    check_dtype(kOp, "value_reverse", *a.value_reverse, a.query.scalar_type());
    check_shape(kOp, "value_reverse", *a.value_reverse, {p.B, p.Hk, p.M, p.E});
    STD_TORCH_CHECK(p.M == p.N, "l1_sparse: value_reverse must come with M = N, got M=", p.M,
                    ", N=", p.N);
    p.reverse = view(a.value_reverse);
  }
  p.edges.count = a.row_keys.size(0);
  p.edges.row_start = read_list("row_start", a.row_start, p.M + 1, kept);
  p.edges.row_keys = read_list("row_keys", a.row_keys, p.edges.count, kept);
  p.edges.col_start = read_list("col_start", a.col_start, p.N + 1, kept);
  p.edges.col_queries = read_list("col_queries", a.col_queries, p.edges.count, kept);
  p.edges.col_edges = read_list("col_edges", a.col_edges, p.edges.count, kept);
  return p;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& value_reverse, const Tensor& row_start,
                                   const Tensor& row_keys, const Tensor& col_start,
                                   const Tensor& col_queries, const Tensor& col_edges, bool softmax,
                                   bool sink, double scale) {
  std::vector<Tensor> kept;
  Problem p = make_problem({query, key, value, value_reverse, row_start, row_keys, col_start,
                            col_queries, col_edges, softmax, sink, scale},
                           kept);
  const ScalarType dtype = query.scalar_type();
  Tensor out = allocate(query, {p.B, p.H, p.M, p.E});
  Tensor weight = allocate(query, {p.B, p.H, p.edges.count}, compute_dtype(dtype));
  p.out = view(out);
  p.weight = view(weight);
  (dtype == ScalarType::Double ? kernels().forward_double : kernels().forward_float)(p);
  return {out, weight};
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four backward(const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
              const OptionalTensor& value_reverse, const Tensor& row_start, const Tensor& row_keys,
              const Tensor& col_start, const Tensor& col_queries, const Tensor& col_edges,
              const Tensor& weight, bool softmax, bool sink, double scale,
              std::vector<bool> output_mask) {
  std::vector<Tensor> kept;
  Problem p = make_problem({query, key, value, value_reverse, row_start, row_keys, col_start,
                            col_queries, col_edges, softmax, sink, scale},
                           kept);
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(output_mask.size() == 4, "l1_sparse: output_mask must have 4 elements, got ",
                  output_mask.size());
  check_dtype(kOp, "grad_out", grad_out, dtype);
  check_shape(kOp, "grad_out", grad_out, {p.B, p.H, p.M, p.E});
  check_dtype(kOp, "weight", weight, compute_dtype(dtype));
  check_shape(kOp, "weight", weight, {p.B, p.H, p.edges.count});
  // Saved by the forward, contiguous unless something in between changed its layout.
  const Tensor dense_weight = torch::stable::contiguous(weight);
  p.weight = view(dense_weight);
  Gradients g{};
  g.grad_out = view(grad_out);
  Four result{new_gradient(query, query, output_mask[0], g.query),
              new_gradient(query, key, output_mask[1], g.key),
              new_gradient(query, value, output_mask[2], g.value),
              new_gradient(query, value_reverse, output_mask[3], g.reverse)};
  if (g.query || g.key) {
    kept.push_back(allocate(dense_weight, dense_weight.sizes()));
    g.grad_score = view(kept.back());
  }
  (dtype == ScalarType::Double ? kernels().backward_double : kernels().backward_float)(p, g);
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(attn, CPU, m) {
  m.impl("_l1_sparse_fwd", TORCH_BOX(&forward));
  m.impl("_l1_sparse_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace attn::l1::sparse

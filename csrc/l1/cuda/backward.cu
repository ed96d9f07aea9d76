// attn::_l1_bwd_cuda and attn::_l1_scores_bwd_cuda: shapes in, the kernels of backward*.cuh.
// `ordered`: the same result every time (torch.use_deterministic_algorithms).
#include "l1/cuda/backward.cuh"

#include <tuple>
#include <vector>

#include "l1/cuda/backward_host.cuh"
#include "l1/cuda/backward_rows.cuh"

namespace attn::cuda::l1 {
namespace {

using torch::stable::new_zeros;

// float32 sums of the gradients of 16-bit queries exist for as many heads at a time.
constexpr int64_t kScratchBytes = int64_t{48} << 20;
// Rows start at multiples of 16 bytes and end there.
bool in_sixteens(const Tensor& tensor) {
  const int64_t each = tensor.scalar_type() == ScalarType::Float ? 4 : 8;
  bool aligned = tensor.size(3) % each == 0 && tensor.stride(3) == 1 &&
                 reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) {
    aligned = aligned && (tensor.size(dim) == 1 || tensor.stride(dim) % each == 0);
  }
  return aligned;
}

// Gradients of query, key and value; zeros where no tile is visited.
template <class T, class P>
void launch_backward(const Device& device, const Tensor& query, const Problem& p, Gradients g) {
  const int64_t heads = int64_t{p.B} * p.Hk, group = p.H / p.Hk;
  const int64_t query_tiles = tiles_of(p.M, P::kQueries);
  int64_t chunk = heads;
  OptionalTensor sums;
  g.query_sums = static_cast<float*>(g.query);
  if (sizeof(T) == 2 && g.query) {
    const int64_t floats_of_head = group * p.M * p.D;
    const int64_t most = std::clamp<int64_t>(kScratchBytes / 4 / floats_of_head, 1, heads);
    chunk = tiles_of(heads, tiles_of(heads, most));
    sums = new_zeros(query, {chunk * floats_of_head}, ScalarType::Float);
    g.query_sums = floats(*sums);
  }
  const int64_t launches = tiles_of(heads, chunk);
  const Tensor counters =
      new_zeros(query, {heads * group * query_tiles + launches}, ScalarType::Int);
  g.flags = static_cast<int*>(counters.data_ptr());
  g.ticket = g.flags + heads * group * query_tiles;
  g.key_tiles = static_cast<int>(tiles_of(p.N, P::kKeys));
  const bool general = p.has_extras() || g.grad_scores.data || !g.aligned;
  const auto kernel =
      general ? &backward_kernel<T, P::kWidth, true> : &backward_kernel<T, P::kWidth, false>;
  for (int64_t first = 0; first < heads; first += chunk) {
    g.first_head = static_cast<int>(first);
    const int64_t blocks = std::min(chunk, heads - first) * g.key_tiles;
    launch(device, "l1: backward", kernel, dim3(grid_size(blocks)), P::kThreads,
           BackwardMemory<T, P>::kBytes, p, g);
    ++g.ticket;
    if (!sums.has_value() || g.ordered) continue;
    const int64_t rows = group * p.M * p.D, count = std::min(chunk, heads - first) * rows;
    launch(device, "l1: rounding", &round_kernel<T>, dim3(grid_size(tiles_of(count, kRowThreads))),
           kRowThreads, 0, g.query_sums, count, static_cast<T*>(g.query) + first * rows);
  }
}

// The gradient of an input, or an empty tensor if it is not wanted.
Tensor new_gradient(const Tensor& query, const OptionalTensor& input, bool wanted) {
  if (wanted && input.has_value()) return new_zeros(*input, input->sizes());
  return new_empty(query, {0}, input.has_value() ? input->scalar_type() : query.scalar_type());
}
void* data_if(const Tensor& tensor, bool wanted) {
  return wanted ? tensor.data_ptr() : nullptr;
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

void check_results(const Problem& p, const Tensor& query, const Tensor& grad_out,
                   const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse,
                   const std::vector<bool>& output_mask) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(output_mask.size() == 6, "l1: output_mask must have 6 elements, got ",
                  output_mask.size());
  check_dtype(kOp, "grad_out", grad_out, dtype);
  check_shape(kOp, "grad_out", grad_out, {p.B, p.H, p.M, p.E});
  check_parameter(kOp, "grad_lse", grad_lse, dtype, {p.B, p.H, p.M});
  check_dtype(kOp, "out", out, dtype);
  check_shape(kOp, "out", out, {p.B, p.H, p.M, p.E});
  check_parameter(kOp, "lse", lse, dtype, {p.B, p.H, p.M});
  check_device(query, "grad_out", grad_out);
  check_device(query, "grad_lse", grad_lse);
  check_device(query, "out", out);
  check_device(query, "lse", lse);
}

// delta and lse of the rows, [2, B, H, M].
Tensor row_pass(const Device& device, const Tensor& query, const Problem& p, Gradients& g,
                const OptionalTensor& grad_lse) {
  const int64_t rows = int64_t{p.B} * p.H * p.M;
  const Tensor result = new_empty(query, {2, rows}, ScalarType::Float);
  const RowPass pass{array(grad_lse), floats(result), floats(result) + rows};
  g.lse = pass.lse;
  g.delta = pass.delta;
  with_type(query.scalar_type(), [&](auto zero) {
    launch(device, "l1: rows", &rows_kernel<decltype(zero)>,
           dim3(grid_size(tiles_of(rows, kRowThreads / 32))), kRowThreads, 0, p, g.grad_out, pass);
  });
  return result;
}

Six backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
             const Tensor& key, const Tensor& value, const OptionalTensor& mask,
             const OptionalTensor& bias, const OptionalTensor& relative_bias,
             const OptionalTensor& sink, const OptionalTensor& start, const OptionalTensor& stop,
             const Tensor& out, const Tensor& lse, int64_t left, int64_t right, double scale,
             std::optional<double> eps, std::vector<bool> output_mask, bool ordered) {
  Problem p = make_problem(
      {query, key, value, mask, bias, relative_bias, sink, start, stop, left, right, scale, eps});
  check_results(p, query, grad_out, grad_lse, out, lse, output_mask);
  p.out = array(out);
  p.lse = array(lse);
  const OptionalTensor inputs[6] = {query, key, value, bias, relative_bias, sink};
  Tensor grads[6];
  for (int i = 0; i < 6; ++i) grads[i] = new_gradient(query, inputs[i], output_mask[i]);
  const auto result = [&] {
    return Six{grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
  };
  if (query.numel() == 0 || key.numel() == 0) {
    // Without keys there still are sinks, whose gradient is that of lse.
    if (query.numel() == 0 || !sink.has_value() || !output_mask[5]) return result();
  }
  const Device device(query);
  Gradients g{};
  g.ordered = ordered;
  g.grad_out = array(grad_out);
  g.aligned = in_sixteens(query) && in_sixteens(key) && in_sixteens(value) && in_sixteens(grad_out);
  const Tensor rows = row_pass(device, query, p, g, grad_lse);
  if (sink.has_value() && output_mask[5]) {
    launch(device, "l1: gradient of sink", &sink_kernel, dim3(static_cast<unsigned>(p.H)),
           kRowThreads, kRowThreads * sizeof(float), p, g.lse, g.delta, floats(grads[5]));
  }
  if (key.numel() == 0) return result();
  const OptionalTensor largest = find_largest(device, query, p);
  g.query = data_if(grads[0], output_mask[0]);
  g.key = data_if(grads[1], output_mask[1]);
  g.value = data_if(grads[2], output_mask[2]);
  const ScalarType dtype = query.scalar_type();
  with_plan(dtype, p, [&](auto zero, auto plan) {
    if (!g.query && !g.key && !g.value) return;
    launch_backward<decltype(zero), decltype(plan)>(device, query, p, g);
  });
  if (bias.has_value() && output_mask[3]) {
    grads[3] = torch::stable::to(bias_gradient(device, *bias, dtype, p, g), bias->scalar_type());
  }
  if (relative_bias.has_value() && output_mask[4]) {
    relative_bias_gradient(device, grads[4], dtype, p, g);
  }
  return result();
}

std::tuple<Tensor, Tensor> scores_backward(const Tensor& grad, const Tensor& query,
                                           const Tensor& key, double scale,
                                           std::vector<bool> output_mask, bool ordered) {
  check_query_key_value("l1_scores", query, key, key);
  STD_TORCH_CHECK(output_mask.size() == 2, "l1_scores: output_mask must have 2 elements, got ",
                  output_mask.size());
  Problem p = make_problem(query, key, scale, std::nullopt);
  if (grad.scalar_type() != query.scalar_type()) {
    check_dtype("l1_scores", "grad", grad, ScalarType::Float);
  }
  check_shape("l1_scores", "grad", grad, {p.B, p.H, p.M, p.N});
  check_device(query, "grad", grad);
  p.left = p.right = Visibility::kUnbounded;
  const Tensor grad_query = new_gradient(query, query, output_mask[0]);
  const Tensor grad_key = new_gradient(query, key, output_mask[1]);
  if (query.numel() == 0 || key.numel() == 0 || !(output_mask[0] || output_mask[1])) {
    return {grad_query, grad_key};
  }
  const Device device(query);
  const OptionalTensor largest = find_largest(device, query, p);
  Gradients g{};
  g.ordered = ordered;
  g.grad_scores = array(grad);
  g.grad_scores_is_float = grad.scalar_type() == ScalarType::Float;
  g.aligned = in_sixteens(query) && in_sixteens(key);
  g.query = data_if(grad_query, output_mask[0]);
  g.key = data_if(grad_key, output_mask[1]);
  with_plan(query.scalar_type(), p, [&](auto zero, auto plan) {
    launch_backward<decltype(zero), decltype(plan)>(device, query, p, g);
  });
  return {grad_query, grad_key};
}

STABLE_TORCH_LIBRARY_FRAGMENT(attn, m) {
  m.def(
      "_l1_bwd_cuda(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor? mask, Tensor? bias, Tensor? relative_bias, Tensor? sink, Tensor? start, "
      "Tensor? stop, Tensor out, Tensor lse, SymInt left, SymInt right, float scale, float? eps, "
      "bool[] output_mask, bool ordered=False) -> (Tensor grad_query, Tensor grad_key, "
      "Tensor grad_value, "
      "Tensor grad_bias, Tensor grad_relative_bias, Tensor grad_sink)");
  m.def(
      "_l1_scores_bwd_cuda(Tensor grad, Tensor query, Tensor key, float scale, "
      "bool[] output_mask, bool ordered=False) -> (Tensor grad_query, Tensor grad_key)");
}
STABLE_TORCH_LIBRARY_IMPL(attn, ATTN_DISPATCH_KEY, m) {
  m.impl("_l1_bwd_cuda", TORCH_BOX(&backward));
  m.impl("_l1_scores_bwd_cuda", TORCH_BOX(&scores_backward));
}

}  // namespace
}  // namespace attn::cuda::l1

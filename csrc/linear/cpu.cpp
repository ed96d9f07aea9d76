// attn::_linear_fwd, _linear_bwd and _linear_step on the CPU: shapes in, kernels of this machine.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/text.h"
#include "linear/problem.h"

namespace attn::linear {
namespace {

constexpr const char* kOp = "linear";

struct Arguments {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const OptionalTensor& mask;
  const OptionalTensor& decay;
  const OptionalTensor& state;
  const OptionalTensor& key_sum;
  const OptionalTensor& offsets;
  bool causal;
  std::optional<double> eps;
  FeatureMap feature_map;
};

FeatureMap read_feature_map(StringHandle handle) {
  const Text text(handle);
  const std::string_view name = text.view();
  if (name == "identity") return FeatureMap::identity;
  if (name == "elu_plus_one") return FeatureMap::elu_plus_one;
  if (name == "relu") return FeatureMap::relu;
  if (name == "softplus") return FeatureMap::softplus;
  STD_TORCH_CHECK(name == "taylor",
                  "linear: feature_map must be one of identity, elu_plus_one, relu, softplus, "
                  "taylor, got '",
                  name, "'");
  return FeatureMap::taylor;
}

void check_options(const Arguments& a, const Problem& p) {
  const ScalarType dtype = a.query.scalar_type();
  if (a.causal) check_shape(kOp, "key", a.key, {p.B, p.Hk, p.M, p.D});
  if (a.mask.has_value()) {
    check_dtype(kOp, "mask", *a.mask, ScalarType::Bool);
    check_shape(kOp, "mask", *a.mask,
                {p.B, a.mask->dim() == 4 && a.mask->size(1) == 1 ? 1 : p.H, 1, p.N});
  }
  STD_TORCH_CHECK(a.causal || !a.decay.has_value(), "linear: decay must come with causal=True");
  check_parameter(kOp, "decay", a.decay, dtype, {p.H});
  STD_TORCH_CHECK(a.state.has_value() == a.key_sum.has_value(),
                  "linear: state and key_sum must be given together");
  check_parameter(kOp, "state", a.state, dtype, {p.B, p.H, p.F, p.E});
  check_parameter(kOp, "key_sum", a.key_sum, dtype, {p.B, p.H, p.F});
  if (!a.offsets.has_value()) return;
  check_dtype(kOp, "offsets", *a.offsets, ScalarType::Int);
  STD_TORCH_CHECK(a.offsets->dim() == 1 && a.offsets->size(0) > 0,
                  "linear: offsets must have shape (S + 1,), got ", shape_text(*a.offsets));
  STD_TORCH_CHECK(p.B == 1 && p.M == p.N && !a.state.has_value(),
                  "linear: offsets must come with B=1, M=N and no state, got ",
                  shape_text(a.query));
}

Problem make_problem(const Arguments& a) {
  check_query_key_value(kOp, a.query, a.key, a.value);
  Problem p{};
  p.B = a.query.size(0);
  p.H = a.query.size(1);
  p.Hk = a.key.size(1);
  p.M = a.query.size(2);
  p.N = a.key.size(2);
  p.D = a.query.size(3);
  p.E = a.value.size(3);
  p.causal = a.causal;
  p.normalized = a.eps.has_value();
  p.eps = a.eps.value_or(0);
  p.feature_map = a.feature_map;
  p.F = p.feature_map == FeatureMap::taylor ? 1 + p.D + p.D * (p.D + 1) / 2 : p.D;
  check_options(a, p);
  p.query = view(a.query);
  p.key = view(a.key);
  p.value = view(a.value);
  p.mask = view(a.mask);
  p.decay = view(a.decay);
  p.state = view(a.state);
  p.key_sum = view(a.key_sum);
  if (a.offsets.has_value()) {
    p.offsets = view(a.offsets);
    p.num_sequences = a.offsets->size(0) - 1;
  }
  return p;
}

const Kernels& kernels() {
#if defined(__x86_64__)
  if (best_isa() == Isa::avx512) return avx512_kernels();
  if (best_isa() == Isa::avx2) return avx2_kernels();
#endif
  return baseline_kernels();
}

// Causal, and wide enough to fill the tiles. Features that are computed would have to be rounded to
// bfloat16: they go through float32.
bool prefers_amx(const Problem& p) {
  return p.query.dtype == ScalarType::BFloat16 && p.causal &&
         p.feature_map == FeatureMap::identity && p.D >= 16 && p.E >= 16 && p.Hk > 0 && has_amx();
}

int64_t multiplications(const Problem& p) {
  return p.B * p.H * (p.M + p.N) * p.F * p.E;
}

void run_forward(const Problem& p) {
  const ThreadLimit limit(multiplications(p));
#if defined(__x86_64__)
  if (prefers_amx(p)) return amx_kernels().forward(p);
#endif
  const bool is_double = p.query.dtype == ScalarType::Double;
  (is_double ? kernels().forward_double : kernels().forward_float)(p);
}

void run_backward(const Problem& p, const Gradients& grads) {
  const ThreadLimit limit(multiplications(p));
#if defined(__x86_64__)
  if (prefers_amx(p)) return amx_kernels().backward(p, grads);
#endif
  const bool is_double = p.query.dtype == ScalarType::Double;
  (is_double ? kernels().backward_double : kernels().backward_float)(p, grads);
}

void new_outputs(const Tensor& query, Problem& p, Tensor& out, Tensor& denominator) {
  const ScalarType sums = compute_dtype(query.scalar_type());
  out = allocate(query, {p.B, p.H, p.M, p.E});
  denominator = p.normalized ? allocate(query, {p.B, p.H, p.M}, sums) : allocate(query, {0}, sums);
  p.out = view(out);
  if (p.normalized) p.denominator = view(denominator);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
    const OptionalTensor& decay, const OptionalTensor& state, const OptionalTensor& key_sum,
    const OptionalTensor& offsets, bool causal, std::optional<double> eps,
    StringHandle feature_map) {
  Problem p = make_problem({query, key, value, mask, decay, state, key_sum, offsets, causal, eps,
                            read_feature_map(feature_map)});
  const ScalarType sums = compute_dtype(query.scalar_type());
  Tensor out, denominator;
  new_outputs(query, p, out, denominator);
  Tensor final_state =
      p.state ? allocate(query, {p.B, p.H, p.F, p.E}, sums) : allocate(query, {0}, sums);
  Tensor final_key_sum =
      p.state ? allocate(query, {p.B, p.H, p.F}, sums) : allocate(query, {0}, sums);
  if (p.state) {
    p.final_state = view(final_state);
    p.final_key_sum = view(final_key_sum);
  }
  run_forward(p);
  return {out, denominator, final_state, final_key_sum};
}

// The forward without its optional tensors, and without the states: there are none.
std::tuple<Tensor, Tensor> plain(const Tensor& query, const Tensor& key, const Tensor& value,
                                 bool causal, std::optional<double> eps, StringHandle feature_map) {
  const OptionalTensor none;
  Problem p = make_problem({query, key, value, none, none, none, none, none, causal, eps,
                            read_feature_map(feature_map)});
  Tensor out, denominator;
  new_outputs(query, p, out, denominator);
  run_forward(p);
  return {out, denominator};
}

// The gradient of an input if it is wanted, else an empty tensor.
Tensor new_gradient(const Tensor& grad_out, const OptionalTensor& input, bool wanted,
                    View& target) {
  if (!wanted || !input.has_value()) return allocate(grad_out, {0});
  Tensor gradient = allocate(*input, input->sizes());
  if (grad_out.size(1) == 0) torch::stable::zero_(gradient);  // no head walks over the keys
  target = view(gradient);
  return gradient;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five backward(const Tensor& grad_out, const OptionalTensor& grad_final_state,
              const OptionalTensor& grad_final_key_sum, const Tensor& query, const Tensor& key,
              const Tensor& value, const OptionalTensor& mask, const OptionalTensor& decay,
              const OptionalTensor& state, const OptionalTensor& key_sum,
              const OptionalTensor& offsets, const OptionalTensor& out,
              const OptionalTensor& denominator, bool causal, std::optional<double> eps,
              StringHandle feature_map, std::vector<bool> output_mask) {
  Problem p = make_problem({query, key, value, mask, decay, state, key_sum, offsets, causal, eps,
                            read_feature_map(feature_map)});
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(output_mask.size() == 5, "linear: output_mask must have 5 elements, got ",
                  output_mask.size());
  check_dtype(kOp, "grad_out", grad_out, dtype);
  check_shape(kOp, "grad_out", grad_out, {p.B, p.H, p.M, p.E});
  check_parameter(kOp, "grad_final_state", grad_final_state, dtype, {p.B, p.H, p.F, p.E});
  check_parameter(kOp, "grad_final_key_sum", grad_final_key_sum, dtype, {p.B, p.H, p.F});
  if (p.normalized) {
    STD_TORCH_CHECK(out.has_value() && denominator.has_value(),
                    "linear: out and denominator must be given with eps");
    check_dtype(kOp, "out", *out, dtype);
    check_shape(kOp, "out", *out, {p.B, p.H, p.M, p.E});
    check_parameter(kOp, "denominator", denominator, dtype, {p.B, p.H, p.M});
    p.out = view(out);
    p.denominator = view(denominator);
  }
  Gradients g{};
  g.grad_out = view(grad_out);
  if (p.state) {
    g.grad_final_state = view(grad_final_state);
    g.grad_final_key_sum = view(grad_final_key_sum);
  }
  Five result{new_gradient(grad_out, query, output_mask[0], g.query),
              new_gradient(grad_out, key, output_mask[1], g.key),
              new_gradient(grad_out, value, output_mask[2], g.value),
              new_gradient(grad_out, state, output_mask[3], g.state),
              new_gradient(grad_out, key_sum, output_mask[4], g.key_sum)};
  if (p.H > 0) run_backward(p, g);
  return result;
}

// Tells autograd that a tensor was written, which it counts per operator call: an empty view of it
// counts with it.
void mark_written(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  Tensor alias = torch::stable::detail::to<Tensor>(stack[0]);
  Tensor nothing = torch::stable::narrow(alias, 0, 0, 0);
  torch::stable::zero_(nothing);
}

Tensor step(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& state,
            const Tensor& key_sum, const OptionalTensor& decay, std::optional<double> eps,
            StringHandle feature_map) {
  const OptionalTensor some_state(state), some_key_sum(key_sum), none;
  Problem p = make_problem({query, key, value, none, decay, some_state, some_key_sum, none, true,
                            eps, read_feature_map(feature_map)});
  check_shape(kOp, "query", query, {p.B, p.H, 1, p.D});
  Tensor out = allocate(query, {p.B, p.H, 1, p.E});
  p.out = view(out);
  const bool is_double = query.scalar_type() == ScalarType::Double;
  (is_double ? kernels().step_double : kernels().step_float)(p);
  mark_written(state);
  mark_written(key_sum);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(attn, m) {
  m.def(
      "_linear_plain(Tensor query, Tensor key, Tensor value, bool causal, float? eps, str "
      "feature_map) -> (Tensor out, Tensor denominator)");
}
STABLE_TORCH_LIBRARY_IMPL(attn, CPU, m) {
  m.impl("_linear_plain", TORCH_BOX(&plain));
  m.impl("_linear_fwd", TORCH_BOX(&forward));
  m.impl("_linear_bwd", TORCH_BOX(&backward));
  m.impl("_linear_step", TORCH_BOX(&step));
}

}  // namespace
}  // namespace attn::linear

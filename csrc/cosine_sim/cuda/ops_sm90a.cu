// attn::_cosine_sim_fwd_cuda and attn::_cosine_sim_bwd_cuda: cosine-sim attention for Hopper.
// attn_ops/cosine_sim/cuda.py knows what they take.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "cosine_sim/cuda/backward.cuh"
#include "cosine_sim/cuda/forward.cuh"
#include "cosine_sim/cuda/prepared_bias.cuh"
#include "cosine_sim/cuda/seen.cuh"
#include "cosine_sim/cuda/tangents.cuh"

namespace attn::cuda::cosine {

template <>
void forward<BFloat>(const ForwardCall& call);
template <>
void forward<Half>(const ForwardCall& call);
template <>
void backward<BFloat>(const BackwardCall& call);
template <>
void backward<Half>(const BackwardCall& call);
template <>
void tangents<BFloat>(const TangentCall& call);

namespace {

constexpr const char* kOp = "cosine_sim";
constexpr int64_t kMega = 1 << 20;

void check_rows(const char* name, const Tensor& x) {
  bool aligned = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) {
    aligned = aligned && (x.size(dim) == 1 || (x.stride(dim) > 0 && x.stride(dim) % 8 == 0));
  }
  STD_TORCH_CHECK(aligned, kOp, ": rows of ", name, " must be neighbours at multiples of 16 bytes");
}

void check(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  constexpr int64_t kMost = int64_t{1} << 29;
  check_query_key_value(kOp, query, key, value);
  const bool half = query.scalar_type() == ScalarType::Half;
  const int64_t width = query.size(3), N = key.size(2);
  STD_TORCH_CHECK(half || query.scalar_type() == ScalarType::BFloat16, kOp,
                  ": the kernel for Hopper is for 16 bits");
  STD_TORCH_CHECK(0 < width && width <= 256 && width % 8 == 0 && value.size(3) == width, kOp,
                  ": the kernel for Hopper must have D = E, a multiple of 8 up to 256");
  const int64_t heads = query.size(0) * query.size(1);
  STD_TORCH_CHECK(N > 0 && heads * query.size(2) <= kMost && heads * N <= kMost, kOp,
                  ": the kernel for Hopper must have from 1 to 2**29 rows");
  STD_TORCH_CHECK(std::abs(scale) * kBitsPerNat <= (half ? 14 : 60), kOp,
                  ": scale is too large for weights without a running maximum");
  check_rows("query", query);
  check_rows("key", key);
  check_rows("value", value);
}

void check_bias(const Tensor& query, const OptionalTensor& mask, const OptionalTensor& bias) {
  STD_TORCH_CHECK(!bias || (query.scalar_type() == ScalarType::BFloat16 && query.size(3) <= 128),
                  kOp, ": relative_bias is for bfloat16 and D up to 128 in the kernel for Hopper");
  STD_TORCH_CHECK(!bias || !mask, kOp,
                  ": relative_bias is without a mask in the kernel for Hopper");
}

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const OptionalTensor& mask, const OptionalTensor& relative_bias,
                                  int64_t left, int64_t right, double scale) {
  check(query, key, value, scale);
  check_bias(query, mask, relative_bias);
  const Seen seen(kOp, query, key, mask, left, right);
  const int64_t B = query.size(0), H = query.size(1), M = query.size(2);
  Tensor out = allocate(query, {B, H, M, query.size(3)});
  Tensor lse = allocate(query, {B, H, M}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  const PreparedBias bias(kOp, query, key, relative_bias, &seen.keys_seen(), std::nullopt);
  const int64_t group = H / key.size(1);
  // Unit keys, and values in their order.
  const int64_t workspace = key.size(2) * key.size(3) * (mask ? 4 : 2);
  in_parts(B, key.size(1), workspace, 128 * kMega, [&](const Part& part) {
    const Tensor q = part.of(query, group), k = part.of(key), v = part.of(value);
    Tensor o = part.of(out, group), l = part.of(lse, group);
    const ForwardCall call{q,
                           k,
                           v,
                           o,
                           l,
                           part.of(seen.keys_seen()),
                           part.of(seen.order()),
                           scale,
                           bias.of(part, group)};
    if (relative_bias) return forward_with_bias(call);
    query.scalar_type() == ScalarType::Half ? forward<Half>(call) : forward<BFloat>(call);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_out, std::optional<Tensor> grad_lse,
                                             const Tensor& query, const Tensor& key,
                                             const Tensor& value, const Tensor& out,
                                             const Tensor& lse, const OptionalTensor& mask,
                                             const OptionalTensor& relative_bias,
                                             const OptionalTensor& grad_relative_bias, int64_t left,
                                             int64_t right, double scale) {
  check(query, key, value, scale);
  check_bias(query, mask, relative_bias);
  const PreparedBias bias(kOp, query, key, relative_bias, nullptr, grad_relative_bias);
  Seen seen(kOp, query, key, mask, left, right);
  const Reach reach = seen.queries_seeing(query);
  check_rows("grad_out", grad_out);
  check_rows("out", out);
  Tensor grads[3];
  const Tensor* inputs[3] = {&query, &key, &value};
  for (int i = 0; i < 3; ++i) {
    const Tensor& x = *inputs[i];
    grads[i] = allocate(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  }
  const int64_t group = query.size(1) / key.size(1), width = query.size(3);
  // Unit queries and keys, sums of gradients, and values in their order.
  const int64_t sums = tile_width(width) * 4, key_sums = width > 128 ? width * 4 : 0;
  const int64_t of_query = width * 2 + sums, of_key = width * (mask ? 4 : 2) + key_sums;
  const int64_t workspace = group * query.size(2) * of_query + key.size(2) * of_key;
  const int64_t most = (key_sums ? 396 : 264) * kMega;
  in_parts(query.size(0), key.size(1), workspace, most, [&](const Part& part) {
    const Tensor g = part.of(grad_out, group), o = part.of(out, group), l = part.of(lse, group);
    const Tensor q = part.of(query, group), k = part.of(key), v = part.of(value);
    const std::optional<Tensor> of_lse =
        grad_lse ? std::optional<Tensor>(part.of(*grad_lse, group)) : std::nullopt;
    Tensor gq = part.of(grads[0], group), gk = part.of(grads[1]), gv = part.of(grads[2]);
    const Reach to = part.of(reach);
    const Order as = part.of(seen.order());
    const Tensor* l_grad = of_lse ? &*of_lse : nullptr;
    const BackwardCall call{g,  q,  k,  v,  o,  l,     l_grad,
                            gq, gk, gv, to, as, scale, bias.of(part, group)};
    if (relative_bias) return backward_with_bias(call);
    query.scalar_type() == ScalarType::Half ? backward<Half>(call) : backward<BFloat>(call);
  });
  return {grads[0], grads[1], grads[2]};
}

void check_tangent(const char* name, const Tensor& tangent, const Tensor& x) {
  check_dtype(kOp, name, tangent, x.scalar_type());
  check_shape(kOp, name, tangent, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_rows(name, tangent);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> with_tangents(const Tensor& query, const Tensor& key,
                                                         const Tensor& value,
                                                         const Tensor& tangent_query,
                                                         const Tensor& tangent_key,
                                                         const Tensor& tangent_value, int64_t left,
                                                         int64_t right, double scale) {
  check(query, key, value, scale);
  const int64_t B = query.size(0), H = query.size(1), M = query.size(2), D = query.size(3);
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::BFloat16 && (D == 64 || D == 128), kOp,
                  ": the kernel for tangents is for bfloat16 and D = 64 or 128");
  check_tangent("tangent_query", tangent_query, query);
  check_tangent("tangent_key", tangent_key, key);
  check_tangent("tangent_value", tangent_value, value);
  Tensor out = allocate(query, {B, H, M, D}), tangent_out = allocate(query, {B, H, M, D});
  Tensor lse = allocate(query, {B, H, M}, ScalarType::Float);
  Tensor tangent_lse = allocate(query, {B, H, M}, ScalarType::Float);
  if (lse.numel() > 0) {
    const ForwardCall forward{query, key, value, out, lse, Reach{left, right}, Order{}, scale};
    tangents<BFloat>(
        {forward, tangent_query, tangent_key, tangent_value, tangent_out, tangent_lse});
  }
  return {out, lse, tangent_out, tangent_lse};
}

STABLE_TORCH_LIBRARY_FRAGMENT(attn, m) {
  m.def(
      "_cosine_sim_fwd_cuda(Tensor query, Tensor key, Tensor value, Tensor? mask, "
      "Tensor? relative_bias, int left, int right, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "_cosine_sim_bwd_cuda(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor "
      "value, Tensor out, Tensor lse, Tensor? mask, Tensor? relative_bias, Tensor(a!)? "
      "grad_relative_bias, int left, int right, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_cosine_sim_fwd_jvp_cuda(Tensor query, Tensor key, Tensor value, Tensor tangent_query, "
      "Tensor tangent_key, Tensor tangent_value, int left, int right, float scale) -> (Tensor out, "
      "Tensor lse, Tensor tangent_out, Tensor tangent_lse)");
}
STABLE_TORCH_LIBRARY_IMPL(attn, ATTN_DISPATCH_KEY, m) {
  m.impl("_cosine_sim_fwd_cuda", TORCH_BOX(&attend));
  m.impl("_cosine_sim_bwd_cuda", TORCH_BOX(&gradients));
  m.impl("_cosine_sim_fwd_jvp_cuda", TORCH_BOX(&with_tangents));
}

}  // namespace
}  // namespace attn::cuda::cosine

// The host's side of results and their tangents in one pass.
#pragma once

#include "cosine_sim/cuda/forward.cuh"
#include "cosine_sim/cuda/tangents_multiply.cuh"
#include "cosine_sim/cuda/unit_rows.cuh"

namespace attn::cuda::cosine {

struct TangentCall {
  ForwardCall forward;
  const Tensor& query;  // tangents
  const Tensor& key;
  const Tensor& value;
  Tensor& out;
  Tensor& lse;
};

// For each element type in a file of its own.
template <class T>
void tangents(const TangentCall& call);

// x as unit rows, and the tangent of these times a factor.
template <class T, int kWidth>
std::pair<Tensor, Tensor> unit_rows(const Device& device, const Tensor& x, const Tensor& tangent,
                                    double tangent_factor) {
  UnitRows p{rows_of(x), rows_of(tangent)};
  p.heads = static_cast<int>(x.size(1)), p.rows = static_cast<int>(x.size(2));
  p.tangent_factor = static_cast<float>(tangent_factor);
  Tensor unit = allocate(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  Tensor tangent_unit = allocate(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  p.unit = unit.data_ptr(), p.tangent_unit = tangent_unit.data_ptr();
  const int64_t blocks = x.size(0) * x.size(1) * row_blocks<kWidth>(p.rows);
  launch<&unit_rows_kernel<T, kWidth>>(device, "cosine_sim: unit rows and tangents",
                                       dim3(static_cast<unsigned>(blocks)), 256, 0, p);
  return {unit, tangent_unit};
}

template <class P>
void launch_tangents(const TangentCall& call) {
  const ForwardCall& forward = call.forward;
  const Device device(forward.query);
  const int most = multiprocessors(device);
  Tangents p{plan_forward<P>(forward, most)};
  using T = typename P::T;
  const auto [key, tangent_key] =
      unit_rows<T, P::kWidth>(device, forward.key, call.key, 1.0 / kBitsPerNat);
  p.scale = static_cast<float>(forward.scale);
  p.query = map_of(forward.query, 64), p.tangent_query = map_of(call.query, 64);
  p.key = map_of(key, P::kKeys), p.tangent_key = map_of(tangent_key, P::kKeys);
  p.value = map_of(forward.value, P::kKeys), p.tangent_value = map_of(call.value, P::kKeys);
  p.tangent_out = call.out.data_ptr();
  p.tangent_lse = static_cast<float*>(call.lse.data_ptr());
  const int tiles = p.B * p.H * p.query_tiles;
  const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most));
  launch<&tangents_kernel<P>>(device, "cosine_sim: tangents", grid, P::kThreads, P::kSharedBytes,
                              p);
}

// width, warpgroups, stages
template <class T>
void choose_tangents(const TangentCall& call) {
  if (call.forward.query.size(3) <= 64) {
    return launch_tangents<TangentPlan<T, 64, 3, 4>>(call);
  }
  launch_tangents<TangentPlan<T, 128, 2, 2>>(call);
}

}  // namespace attn::cuda::cosine

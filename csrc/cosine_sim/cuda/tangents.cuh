// The host's side of results and their tangents in one pass.
#pragma once

#include <cstdlib>

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

// x and its tangent as unit rows, times these factors.
template <class T, int kWidth>
std::pair<Tensor, Tensor> unit_rows(const Device& device, const Tensor& x, const Tensor& tangent,
                                    double factor, double tangent_factor) {
  UnitRows p{rows_of(x), rows_of(tangent)};
  p.heads = static_cast<int>(x.size(1)), p.rows = static_cast<int>(x.size(2));
  p.D = static_cast<int>(x.size(3));
  p.factor = static_cast<float>(factor), p.tangent_factor = static_cast<float>(tangent_factor);
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
  // Products of queries and keys in bits, tangents of them in nats.
  const auto [query, tangent_query] = unit_rows<T, P::kWidth>(
      device, forward.query, call.query, forward.scale * kBitsPerNat, forward.scale);
  const auto [key, tangent_key] =
      unit_rows<T, P::kWidth>(device, forward.key, call.key, 1.0, 1.0 / kBitsPerNat);
  p.query = map_of(query, P::kQueries), p.tangent_query = map_of(tangent_query, P::kQueries);
  p.key = map_of(key, P::kKeys), p.tangent_key = map_of(tangent_key, P::kKeys);
  p.value = map_of(forward.value, P::kKeys), p.tangent_value = map_of(call.value, P::kKeys);
  p.tangent_out = call.out.data_ptr();
  p.tangent_lse = static_cast<float*>(call.lse.data_ptr());
  const int tiles = p.B * p.H * p.query_tiles;
  const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most));
  launch<&tangents_kernel<P>>(device, "cosine_sim: tangents", grid, P::kThreads, P::kSharedBytes,
                              p);
}

// width, keys, warpgroups, queries held in registers, turns
template <class T>
void choose_tangents(const TangentCall& call) {
#ifdef ATTN_VARIANTS
  const char* chosen = std::getenv("ATTN_VARIANT");
  const int variant = chosen ? std::atoi(chosen) : 0;
  if (call.forward.query.size(3) <= 64) {
    switch (variant) {
      case 0: return launch_tangents<TangentPlan<T, 64, 128, 2, false, false>>(call);
      case 1: return launch_tangents<TangentPlan<T, 64, 128, 2, false, true>>(call);
      case 2: return launch_tangents<TangentPlan<T, 64, 64, 2, true, false>>(call);
      case 3: return launch_tangents<TangentPlan<T, 64, 64, 2, true, true>>(call);
      case 4: return launch_tangents<TangentPlan<T, 64, 64, 3, false, false>>(call);
      case 5: return launch_tangents<TangentPlan<T, 64, 64, 3, false, true>>(call);
      case 6: return launch_tangents<TangentPlan<T, 64, 96, 2, true, false>>(call);
      case 7: return launch_tangents<TangentPlan<T, 64, 96, 2, true, true>>(call);
    }
  }
  if (call.forward.query.size(3) > 64) {
    switch (variant) {
      case 0: return launch_tangents<TangentPlan<T, 128, 64, 2, false, false>>(call);
      case 1: return launch_tangents<TangentPlan<T, 128, 64, 2, false, true>>(call);
      case 2: return launch_tangents<TangentPlan<T, 128, 80, 2, false, false>>(call);
      case 3: return launch_tangents<TangentPlan<T, 128, 80, 2, false, true>>(call);
    }
  }
#endif
  if (call.forward.query.size(3) <= 64) {
    return launch_tangents<TangentPlan<T, 64, 128, 2, false, false>>(call);
  }
  launch_tangents<TangentPlan<T, 128, 64, 2, false, false>>(call);
}

}  // namespace attn::cuda::cosine

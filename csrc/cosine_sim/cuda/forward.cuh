// The host's side of the forward: which kernels, the order of their work, launches.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/tensor_map.cuh"
#include "common/view.h"
#include "cosine_sim/cuda/forward_multiply.cuh"
#include "cosine_sim/cuda/host.cuh"
#include "cosine_sim/cuda/unit_keys.cuh"

namespace attn::cuda::cosine {

struct ForwardCall {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  Tensor& out;
  Tensor& lse;
  bool causal;
  double scale;
};

// For each element type in a file of its own.
template <class T>
void forward(const ForwardCall& call);

template <class T, int kWidth>
Tensor unit_keys(const Device& device, const Tensor& key) {
  Tensor unit = allocate(key, {key.size(0), key.size(1), key.size(2), kWidth});
  const int heads = static_cast<int>(key.size(0) * key.size(1));
  UnitKeys p{};
  p.key = rows_of(key);
  p.Hk = static_cast<int>(key.size(1)), p.N = static_cast<int>(key.size(2));
  p.unit = unit.data_ptr();
  const dim3 grid(static_cast<unsigned>(heads * row_blocks<kWidth>(p.N)));
  launch<&unit_keys_kernel<T, kWidth>>(device, "cosine_sim: unit keys", grid, 256, 0, p);
  return unit;
}

// Sizes, and the order of tiles: see Tiles.
template <class P>
Forward plan_forward(const ForwardCall& call, int multiprocessors) {
  Forward p{};
  p.B = static_cast<int>(call.query.size(0)), p.H = static_cast<int>(call.query.size(1));
  p.M = static_cast<int>(call.query.size(2)), p.N = static_cast<int>(call.key.size(2));
  p.Hk = static_cast<int>(call.key.size(1));
  p.causal = call.causal;
  p.factor = static_cast<float>(call.scale * kBitsPerNat);
  p.out = call.out.data_ptr();
  p.lse = static_cast<float*>(call.lse.data_ptr());
  p.query_tiles = (p.M + P::kQueries - 1) / P::kQueries;
  const int heads = p.B * p.H, pairs_in_head = (p.query_tiles + 1) / 2;
  p.pairs = call.causal && heads * pairs_in_head >= 4 * multiprocessors;
  p.heads_together = call.causal && !p.pairs ? heads : 1;
  p.places_in_part = p.pairs ? pairs_in_head : p.heads_together * p.query_tiles;
  p.places = p.pairs ? heads * pairs_in_head : heads * p.query_tiles;
  return p;
}

template <class P>
void launch_forward(const ForwardCall& call) {
  const Device device(call.query);
  const int most = multiprocessors(device);
  Forward p = plan_forward<P>(call, most);
  Tensor key = call.key;
  if constexpr (P::kUnitKeys) key = unit_keys<typename P::T, P::kWidth>(device, call.key);
  p.query = map_of(call.query, P::kQueries);
  p.key = map_of(key, P::kKeys);
  p.value = map_of(call.value, P::kKeys);
  const int tiles = p.B * p.H * p.query_tiles;
  const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most));
  launch<&forward_kernel<P>>(device, "cosine_sim: forward", grid, P::kThreads, P::kSharedBytes, p);
}

// Measured: writing unit keys first takes the factors out of the loop, and costs as much as it wins
// where about 1024 queries read each key.
inline bool wants_unit_keys(const ForwardCall& call) {
  const int64_t readers = call.query.size(2) * call.query.size(1) / call.key.size(1);
  return (call.causal ? readers / 2 : readers) >= 1024;
}

//                        width, warpgroups, stages of queries, unit keys, turns, held
template <class T>
void choose_forward(const ForwardCall& call) {
  const bool unit = wants_unit_keys(call);
  if (call.query.size(3) == 128) {
    unit ? launch_forward<Plan<T, 128, 2, 1, true, true, true>>(call)
         : launch_forward<Plan<T, 128, 2, 1, false, false, true>>(call);
  } else {
    unit ? launch_forward<Plan<T, 64, 3, 2, true, true, false>>(call)
         : launch_forward<Plan<T, 64, 2, 1, false, true, true>>(call);
  }
}

}  // namespace attn::cuda::cosine

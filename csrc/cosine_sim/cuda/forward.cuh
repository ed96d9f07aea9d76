// The host's side of the forward: which kernels, the order of their work, launches.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/tensor_map.cuh"
#include "common/view.h"
#include "cosine_sim/cuda/forward_multiply.cuh"
#include "cosine_sim/cuda/host.cuh"

namespace attn::cuda::cosine {

struct ForwardCall {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  Tensor& out;
  Tensor& lse;
  Reach reach;
  Order order;  // of keys and values
  double scale;
  RelativeBias bias;
};

// For each element type in a file of its own.
template <class T>
void forward(const ForwardCall& call);
// With relative_bias, of bfloats in rows of up to 128.
void forward_with_bias(const ForwardCall& call);

// Sizes, and the order of tiles: see Tiles.
template <class P>
Forward plan_forward(const ForwardCall& call, int multiprocessors) {
  Forward p{};
  p.B = static_cast<int>(call.query.size(0)), p.H = static_cast<int>(call.query.size(1));
  p.M = static_cast<int>(call.query.size(2)), p.Hk = static_cast<int>(call.key.size(1));
  p.D = static_cast<int>(call.query.size(3));
  p.band = call.reach.keys_seen(call.query.size(2), call.key.size(2), p.H);
  p.factor = static_cast<float>(call.scale * kBitsPerNat);
  p.out = call.out.data_ptr();
  p.lse = static_cast<float*>(call.lse.data_ptr());
  p.bias = call.bias;
  p.query_tiles = (p.M + P::kQueries - 1) / P::kQueries;
  const int heads = p.B * p.H, pairs_in_head = (p.query_tiles + 1) / 2;
  const bool uneven = 4 * length(p.band, p.M / 4) < 3 * length(p.band, 3 * (p.M / 4));
  p.pairs = uneven && heads * pairs_in_head >= 4 * multiprocessors;
  p.heads_together = uneven && !p.pairs ? heads : 1;
  p.places_in_part = p.pairs ? pairs_in_head : p.heads_together * p.query_tiles;
  p.places = p.pairs ? heads * pairs_in_head : heads * p.query_tiles;
  return p;
}

template <class P>
void launch_forward(const ForwardCall& call) {
  const Device device(call.query);
  const int most = multiprocessors(device);
  Forward p = plan_forward<P>(call, most);
  Tensor key = call.key, value = call.value;
  if constexpr (P::kUnitKeys) {
    constexpr int kLanes = kLanesWidth<P::kWidth>;
    key = in_order<typename P::T, kLanes, true>(device, call.key, call.order);
    if (call.order.rows) {
      value = in_order<typename P::T, kLanes, false>(device, call.value, call.order);
    }
  }
  p.query = map_of(call.query, P::kQueries);
  p.key = map_of(key, P::kKeys);
  p.value = map_of(value, P::kKeys);
  const int tiles = p.B * p.H * p.query_tiles;
  const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most));
  launch<&forward_kernel<P>>(device, "cosine_sim: forward", grid, P::kThreads, P::kSharedBytes, p);
}

// Measured: writing unit keys first takes the factors out of the loop, and costs as much as it wins
// where about 1024 queries read each key. An order needs a pass of its own in any case.
inline bool wants_unit_keys(const ForwardCall& call) {
  if (call.order.rows) return true;
  const int64_t M = call.query.size(2), N = call.key.size(2);
  const int64_t seen = length(call.reach.keys_seen(M, N, 1), M / 2);
  return M * (call.query.size(1) / call.key.size(1)) * seen >= 1024 * N;
}

// width, warpgroups, stages of queries, unit keys, turns, held
template <class T>
void choose_forward(const ForwardCall& call) {
  const bool unit = wants_unit_keys(call);
  switch (tile_width(call.query.size(3))) {
    case 32:
      return launch_forward<Plan<T, 32, 3, 2, true, true, true>>(call);
    case 64:
      return unit ? launch_forward<Plan<T, 64, 3, 2, true, true, false>>(call)
                  : launch_forward<Plan<T, 64, 2, 1, false, false, true>>(call);
    case 80:
      return launch_forward<Plan<T, 80, 3, 1, true, true, false>>(call);
    case 96:
      return launch_forward<Plan<T, 96, 3, 1, true, true, false>>(call);
    case 128:
      return unit ? launch_forward<Plan<T, 128, 2, 1, true, true, true>>(call)
                  : launch_forward<Plan<T, 128, 2, 1, false, false, true>>(call);
    case 192:
      return launch_forward<Plan<T, 192, 2, 1, true, true, false>>(call);
    default:
      return launch_forward<Plan<T, 256, 2, 1, true, false, false>>(call);
  }
}

}  // namespace attn::cuda::cosine

// The host's side of the backward: workspaces, the order of work, launches.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/cuda/launch.cuh"
#include "common/cuda/tensor_map.cuh"
#include "cosine_sim/cuda/backward_kernel.cuh"
#include "cosine_sim/cuda/backward_rows.cuh"
#include "cosine_sim/cuda/host.cuh"

namespace attn::cuda::cosine {

struct BackwardCall {
  const Tensor &grad_out, &query, &key, &value, &out, &lse;
  const Tensor* grad_lse;
  Tensor &grad_query, &grad_key, &grad_value;
  Reach reach;  // of keys in their order
  Order order;  // of keys and values
  double scale;
  RelativeBias bias;
};

// For each element type in a file of its own.
template <class T>
void backward(const BackwardCall& call);
// With relative_bias, of bfloats in rows of up to 128.
void backward_with_bias(const BackwardCall& call);

// Whether multiprocessors take heads, where that keeps as many of them busy, and what those heads
// read and add up stays in the L2 cache.
template <class P>
bool whole_heads(const Backward& p, int multiprocessors) {
  const auto rounds = [&](int64_t places) {
    return (places + multiprocessors - 1) / multiprocessors;
  };
  const int64_t heads = int64_t{p.B} * p.Hk;
  const int64_t bytes =
      std::min<int64_t>(heads, multiprocessors) * (p.H / p.Hk) * p.M * P::kWidth * 8;
  return P::kNarrow && bytes <= int64_t{72} << 20 &&
         rounds(heads) * p.key_blocks <= rounds(heads * p.key_blocks);
}

// Sizes, and the order of blocks: see Blocks.
template <class P>
Backward plan_backward(const BackwardCall& call, int multiprocessors) {
  Backward p{};
  p.B = static_cast<int>(call.query.size(0)), p.H = static_cast<int>(call.query.size(1));
  p.M = static_cast<int>(call.query.size(2)), p.N = static_cast<int>(call.key.size(2));
  p.Hk = static_cast<int>(call.key.size(1)), p.D = static_cast<int>(call.query.size(3));
  p.query_tiles = (p.M + P::kQueries - 1) / P::kQueries;
  p.key_blocks = (p.N + P::kKeys - 1) / P::kKeys;
  p.band = call.reach.queries_seeing(p.M, p.N, p.Hk);
  p.whole_heads = whole_heads<P>(p, multiprocessors);
  p.pairs = !p.whole_heads && 4 * length(p.band, 3 * (p.N / 4)) < 3 * length(p.band, p.N / 4);
  // Queries past the end have weights of 0.
  p.band.columns = p.query_tiles * P::kQueries;
  if (p.whole_heads) {
    p.places_in_head = 1;
  } else {
    p.places_in_head = p.pairs ? (p.key_blocks + 1) / 2 : p.key_blocks;
  }
  p.places = p.B * p.Hk * p.places_in_head * P::kHalves;
  p.bias = call.bias;
  return p;
}

template <class P>
void launch_query_gradients(const Device& device, const BackwardCall& call, const Backward& p) {
  QueryGradients g{};
  g.query = rows_of(call.query), g.sum = p.query_sums, g.grad = call.grad_query.data_ptr();
  g.H = p.H, g.M = p.M, g.D = p.D, g.tiles = p.query_tiles;
  g.scale = static_cast<float>(call.scale);
  launch_after<&query_gradients_kernel<typename P::T, P::kWidth, P::kQueries>>(
      device, "cosine_sim: gradients of queries",
      dim3(static_cast<unsigned>(p.B * p.H * p.query_tiles)), 2 * P::kQueries, 0, g);
}

template <class P>
void launch_key_gradients(const Device& device, const BackwardCall& call, const Backward& p) {
  constexpr int kWidth = kLanesWidth<P::kWidth>, kRows = 2048 / kWidth;
  KeyGradients g{};
  g.key = rows_of(call.key), g.sum = p.key_sums, g.grad = call.grad_key.data_ptr();
  g.Hk = p.Hk, g.N = p.N, g.D = p.D;
  const dim3 grid(static_cast<unsigned>(p.B * p.Hk * ((p.N + kRows - 1) / kRows)));
  launch_after<&key_gradients_kernel<typename P::T, kWidth>>(
      device, "cosine_sim: gradients of keys", grid, 256, 0, g);
}

// Keys and values as blocks read them: in their order, and keys as unit vectors where blocks do not
// make them.
template <class P>
struct KeyTensors {
  using T = typename P::T;
  static constexpr int kLanes = kLanesWidth<P::kWidth>;

  Tensor key, value, inverse;
  UnitKeys rows{};

  KeyTensors(const Device& device, const BackwardCall& call, const Backward& p)
      : key(call.key), value(call.value), inverse(call.key) {
    if (call.order.rows) value = in_order<T, kLanes, false>(device, call.value, call.order);
    if constexpr (P::kNarrow) {
      if (call.order.rows) key = in_order<T, kLanes, false>(device, call.key, call.order);
    } else {
      key = allocate(call.key, {p.B, p.Hk, p.N, p.D});
      inverse = allocate(call.key, {p.B, p.Hk, p.N}, ScalarType::Float);
      rows.key = rows_of(call.key), rows.order = call.order;
      rows.Hk = p.Hk, rows.N = p.N, rows.D = p.D;
      rows.inverse = static_cast<float*>(inverse.data_ptr());
      rows.unit = key.data_ptr();
    }
  }
};

template <class P>
void launch_rows(const Device& device, const QueryRows& queries, const UnitKeys& keys,
                 const Backward& p) {
  constexpr int kLanes = kLanesWidth<P::kWidth>;
  const int query_blocks = p.B * p.H * row_blocks<kLanes>(queries.padded);
  const int key_blocks = P::kNarrow ? 0 : p.B * p.Hk * row_blocks<kLanes>(p.N);
  launch<&rows_kernel<typename P::T, kLanes, P::kQueries, P::kRowParts>>(
      device, "cosine_sim: rows", dim3(static_cast<unsigned>(query_blocks + key_blocks)), 256, 0,
      queries, keys, query_blocks);
}

template <class P>
void launch_backward(const BackwardCall& call) {
  const Device device(call.query);
  const int most = multiprocessors(device);
  Backward p = plan_backward<P>(call, most);
  const int padded = p.query_tiles * P::kQueries, heads = p.B * p.H;
  Tensor query = allocate(call.query, {p.B, p.H, p.M, p.D});
  Tensor rows =
      allocate(call.query, {heads, p.query_tiles, P::kRowParts * P::kQueries}, ScalarType::Float);
  const int summed = p.whole_heads ? std::min(p.places, most) * (p.H / p.Hk) : heads;
  Tensor sums = allocate(call.query, {summed, padded, P::kWidth}, ScalarType::Float);
  const int summed_keys = P::kHalves == 2 ? p.N : 0;
  Tensor key_sums = allocate(call.key, {p.B, p.Hk, summed_keys, p.D}, ScalarType::Float);

  QueryRows q{};
  q.query = rows_of(call.query), q.out = rows_of(call.out), q.grad_out = rows_of(call.grad_out);
  q.lse = static_cast<const float*>(call.lse.data_ptr());
  q.grad_lse = call.grad_lse ? static_cast<const float*>(call.grad_lse->data_ptr()) : nullptr;
  q.unit = query.data_ptr();
  q.rows = static_cast<float*>(rows.data_ptr());
  q.zeros = p.whole_heads ? nullptr : static_cast<float*>(sums.data_ptr());
  q.H = p.H, q.M = p.M, q.D = p.D, q.padded = padded, q.columns = P::kWidth;
  q.factor = static_cast<float>(call.scale * kBitsPerNat);
  const KeyTensors<P> keys(device, call, p);
  launch_rows<P>(device, q, keys.rows, p);

  p.query = map_of(query, P::kQueries), p.grad_out = map_of(call.grad_out, P::kQueries);
  p.key = map_of(keys.key, P::kKeys), p.value = map_of(keys.value, P::kKeys);
  p.rows = q.rows, p.key_inverse = keys.rows.inverse, p.order = call.order;
  p.query_sums = static_cast<float*>(sums.data_ptr());
  p.grad_query = call.grad_query.data_ptr(), p.floor_factor = std::abs(q.factor) * 1e12f;
  p.key_sums = static_cast<float*>(key_sums.data_ptr());
  p.grad_key = call.grad_key.data_ptr(), p.grad_value = call.grad_value.data_ptr();
  launch_after<&backward_kernel<P>>(device, "cosine_sim: backward",
                                    dim3(static_cast<unsigned>(p.places < most ? p.places : most)),
                                    P::kThreads, P::kSharedBytes, p);

  if (!p.whole_heads) launch_query_gradients<P>(device, call, p);
  if constexpr (P::kHalves == 2) launch_key_gradients<P>(device, call, p);
}

template <class T>
void choose_backward(const BackwardCall& call) {
  switch (tile_width(call.query.size(3))) {
    case 32:
      return launch_backward<BackwardPlan<T, 32>>(call);
    case 64:
      return launch_backward<BackwardPlan<T, 64>>(call);
    case 80:
      return launch_backward<BackwardPlan<T, 80>>(call);
    case 96:
      return launch_backward<BackwardPlan<T, 96>>(call);
    case 128:
      return launch_backward<BackwardPlan<T, 128>>(call);
    case 192:
      return launch_backward<BackwardPlan<T, 192>>(call);
    default:
      return launch_backward<BackwardPlan<T, 256>>(call);
  }
}

}  // namespace attn::cuda::cosine

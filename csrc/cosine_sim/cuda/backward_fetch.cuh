// The warp that fetches, keys and values of a block and rings of queries and of grad_out, and the
// three beside it, which make keys unit vectors while those of the block before are multiplied.
#pragma once

#include "cosine_sim/cuda/backward_plan.cuh"

namespace attn::cuda::cosine {

// Own columns of 128 keys, then the others.
template <class P>
ATTN_DEVICE void load_keys(unsigned char* to, const TensorMap* map, uint64_t* arrived,
                           const Block& block, int head, int batch) {
  barrier_arrive_expect(arrived, P::kHalves * P::kKeyBytes);
  ATTN_UNROLL
  for (int i = 0; i < P::kHalves; ++i) {
    load_tile<P::kPanels, P::kKeys>(to + i * P::kKeyBytes, map, arrived, block.first_key, head,
                                    batch, (block.half ^ i) * P::kColumns);
  }
}

// Columns of the other half of a tile of queries or of grad_out.
template <class P>
ATTN_DEVICE void load_others(unsigned char* to, const TensorMap* map, uint64_t* arrived,
                             uint64_t* free, uint32_t parity, const Block& block, int row, int head,
                             int batch) {
  barrier_wait(free, parity ^ 1);
  if (one_lane()) {
    barrier_arrive_expect(arrived, P::kQueryBytes);
    load_tile<P::kPanels, P::kQueries>(to, map, arrived, row, head, batch,
                                       (block.half ^ 1) * P::kColumns);
  }
}

template <class P>
ATTN_DEVICE void fetch_backward(const Backward& p, BackwardShared<P> shared) {
  wait_for_kernel_before();
  Ring<P::kQueryStages> queries;
  Ring<P::kGradStages> grads;
  Ring<P::kKeyStages> keys;
  uint32_t others_parity = 0;
  Block block;
  for (Blocks<P> blocks{p}; blocks.next(block);) {
    const int batch = block.head / p.Hk, key_head = block.head - batch * p.Hk;
    barrier_wait(shared.keys_free(keys.index), keys.parity ^ 1);
    if (one_lane()) {
      load_keys<P>(shared.key(keys.index), &p.key, shared.keys_arrived(keys.index), block, key_head,
                   batch);
    }
    bool values_due = true;
    Cursor<P> at(p, block);
    for (int i = 0; i < block.tiles; ++i) {
      const int head = at.head - batch * p.H, row = at.tile * P::kQueries;
      barrier_wait(shared.query_free(queries.index), queries.parity ^ 1);
      uint64_t* arrived = shared.query_arrived(queries.index);
      if (one_lane()) {
        const int64_t tile = int64_t{at.head} * p.query_tiles + at.tile;
        barrier_arrive_expect(arrived, P::kQueryBytes + P::kRowBytes + P::kBiasBytes);
        load_tile<P::kPanels, P::kQueries>(shared.query(queries.index), &p.query, arrived, row,
                                           head, batch, block.half * P::kColumns);
        load_bytes(shared.rows(queries.index), p.rows + tile * (P::kRowParts * P::kQueries),
                   P::kRowBytes, arrived);
        if constexpr (P::kBias) {
          const int diagonal = block.first_key - row - (P::kQueries - 1);
          load_bytes(shared.bias(queries.index), p.bias.from(head, diagonal), P::kBiasBytes,
                     arrived);
        }
      }
      queries.advance();
      if constexpr (P::kHalves == 2) {
        load_others<P>(shared.other_query(), &p.query, shared.other_query_arrived(),
                       shared.other_query_free(), others_parity, block, row, head, batch);
      }
      if (values_due) {
        values_due = false;
        // Its parity turns with every block, as the one of two buffers of keys does.
        barrier_wait(shared.values_free(), (P::kNarrow ? keys.index : keys.parity) ^ 1);
        if (one_lane()) {
          load_keys<P>(shared.value(), &p.value, shared.values_arrived(), block, key_head, batch);
        }
      }
      if constexpr (P::kHalves == 2) {
        load_others<P>(shared.other_grad_out(), &p.grad_out, shared.other_grad_arrived(),
                       shared.other_grad_free(), others_parity, block, row, head, batch);
        others_parity ^= 1;
      }
      barrier_wait(shared.grad_free(grads.index), grads.parity ^ 1);
      arrived = shared.grad_arrived(grads.index);
      if (one_lane()) {
        barrier_arrive_expect(arrived, P::kQueryBytes);
        load_tile<P::kPanels, P::kQueries>(shared.grad_out(grads.index), &p.grad_out, arrived, row,
                                           head, batch, block.half * P::kColumns);
      }
      grads.advance();
      at.advance(block);
    }
    keys.advance();
  }
}

// 128 keys become unit vectors where they are. `index` of kUnitThreads.
template <class P>
ATTN_DEVICE void make_unit_keys(unsigned char* keys, float* inverses, int index) {
  using T = typename P::T;
  constexpr int kLanes = 8;  // a row's
  static_assert(P::kNarrow);
  const int part = index % kLanes;
  for (int first = 0; first < P::kKeys; first += P::kUnitThreads / kLanes) {
    const int row = first + index / kLanes;
    uint32_t* at = piece<P::kKeys>(keys, row % P::kKeys, part);
    const uint4 x = load4(at);
    const float squared = sum_of_lanes<kLanes>(squares<T>(x, 0.0f));
    const float inverse = inverse_length(squared);
    if (row >= P::kKeys) continue;
    store4(at, make_uint4(scaled<T>(x.x, inverse), scaled<T>(x.y, inverse), scaled<T>(x.z, inverse),
                          scaled<T>(x.w, inverse)));
    if (part == 0) inverses[row] = inverse;
  }
  fence_async();
}

template <class P>
ATTN_DEVICE void make_all_unit_keys(const Backward& p, BackwardShared<P> shared, int index) {
  Ring<P::kKeyStages> keys;
  Block block;
  for (Blocks<P> blocks{p}; blocks.next(block);) {
    barrier_wait(shared.keys_arrived(keys.index), keys.parity);
    make_unit_keys<P>(shared.key(keys.index), shared.key_inverse(keys.index), index);
    barrier_arrive(shared.keys_ready(keys.index));
    keys.advance();
  }
}

}  // namespace attn::cuda::cosine

// The warp that fetches: keys and values of a block, and rings of queries and of grad_out.
#pragma once

#include "cosine_sim/cuda/backward_plan.cuh"

namespace attn::cuda::cosine {

template <class P>
ATTN_DEVICE void fetch_backward(const Backward& p, BackwardShared<P> shared) {
  wait_for_kernel_before();
  Ring<P::kStages> queries, grads;
  uint32_t keys_parity = 0;
  Block block;
  for (Blocks<P> blocks{p}; blocks.next(block);) {
    const int batch = block.head / p.Hk, key_head = block.head - batch * p.Hk;
    barrier_wait(shared.keys_free(), keys_parity ^ 1);
    if (one_lane()) {
      barrier_arrive_expect(shared.keys_arrived(), P::kKeyBytes);
      load_tile(shared.key(), &p.key, shared.keys_arrived(), block.first_key, key_head, batch);
    }
    bool values_due = true;
    Cursor at(p, block);
    for (int i = 0; i < block.tiles; ++i) {
      const int head = at.head - batch * p.H, row = at.tile * P::kQueries;
      barrier_wait(shared.query_free(queries.index), queries.parity ^ 1);
      uint64_t* arrived = shared.query_arrived(queries.index);
      if (one_lane()) {
        const int64_t tile = int64_t{at.head} * p.query_tiles + at.tile;
        barrier_arrive_expect(arrived, P::kQueryBytes + P::kRowBytes);
        load_tile(shared.query(queries.index), &p.query, arrived, row, head, batch);
        load_bytes(shared.rows(queries.index), p.rows + tile * (2 * P::kQueries), P::kRowBytes,
                   arrived);
      }
      queries.advance();
      if (values_due) {
        values_due = false;
        barrier_wait(shared.values_free(), keys_parity ^ 1);
        if (one_lane()) {
          barrier_arrive_expect(shared.values_arrived(), P::kKeyBytes);
          load_tile(shared.value(), &p.value, shared.values_arrived(), block.first_key, key_head,
                    batch);
        }
      }
      barrier_wait(shared.grad_free(grads.index), grads.parity ^ 1);
      arrived = shared.grad_arrived(grads.index);
      if (one_lane()) {
        barrier_arrive_expect(arrived, P::kQueryBytes);
        load_tile(shared.grad_out(grads.index), &p.grad_out, arrived, row, head, batch);
      }
      grads.advance();
      at.advance(block);
    }
    keys_parity ^= 1;
  }
}

}  // namespace attn::cuda::cosine

// The gradient of relative_bias: sums of dS along diagonals, of tiles that lie in shared memory for
// dQ, by warps that have nothing else to do.
#pragma once

#include "cosine_sim/cuda/backward_plan.cuh"

namespace attn::cuda::cosine {

// Of blocks of 8 keys x 8 queries, a lane walks down a diagonal along one row, whose eight columns
// are eight diagonals of scores; lanes of a warp have 32 rows one below the other. What lies above
// and below the tile are zeros.
template <class P>
struct SumDiagonals {
  static constexpr int kKeyBlocks = P::kKeys / 8, kQueryBlocks = P::kQueries / 8;
  static constexpr int kRow = P::kDiagonalRow;

  const Backward& p;
  BackwardShared<P> shared;
  int warp, lane;

  ATTN_DEVICE void run() const {
    clear();
    int buffer = 0;
    Block block;
    for (Blocks<P> blocks{p}; blocks.next(block);) {
      Cursor<P> at(p, block);
      const int heads_before = block.head / p.Hk * p.H;
      for (int i = 0; i < block.tiles; ++i, at.advance(block)) {
        if constexpr (P::kScoreBuffers == 2) buffer ^= 1;
        // Both warpgroups have written it, and write it again only after the next time.
        named_sync(1, 256 + 32 * P::kSumWarps);
        if (p.bias.grad == nullptr) continue;
        const int first = block.first_key - at.tile * P::kQueries + p.bias.queries - 1;
        add_tile(shared.score(buffer), at.head - heads_before, first);
      }
    }
  }

 private:
  // Zeros around tiles, and what of a warp's memory is never written.
  ATTN_DEVICE void clear() const {
    constexpr int kFloats = P::kMarginRows * 32, kStep = P::kScoreRows * 32;
    float* margin = reinterpret_cast<float*>(shared.score(0)) - kFloats;
    const int first = (warp * 32 + lane) * 4;
    for (int i = 0; i <= P::kScoreBuffers * (P::kQueries / 64); ++i) {
      for (int j = first; j < kFloats; j += P::kSumWarps * 128) {
        store4(margin + i * kStep + j, make_float4(0, 0, 0, 0));
      }
    }
    for (int i = 0; i < P::kDiagonalFloats; i += 32) shared.diagonals(warp)[i + lane] = 0.0f;
  }

  // `first`: the entry of the tile's first key and query.
  ATTN_DEVICE void add_tile(unsigned char* tile, int head, int first) const {
    const int place = lane * 128 + lane % 8 * 16;
#pragma unroll 1
    for (int ahead = -kQueryBlocks + 4 * warp; ahead < kKeyBlocks; ahead += 4 * P::kSumWarps) {
      float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      const int from = opaque(place + ahead * 1024);
      ATTN_UNROLL
      for (int part = 0; part < kQueryBlocks; part += 2) {
        if (part + 4 + ahead < 0 || part + ahead >= kKeyBlocks) continue;  // for all lanes
        const uint4 x = load(tile, from, part), y = load(tile, from, part + 1);
        add(sum, x);
        add(sum, y);
      }
      add_sums(sum, head, first + 8 * ahead);
    }
  }

  // 8 queries of this lane's key, from block i of queries on.
  ATTN_DEVICE static uint4 load(unsigned char* tile, int from, int i) {
    const int at = (from ^ i % 8 * 16) + i * 1024 + i / 8 * (P::kScoreRows * 128);
    return load4(reinterpret_cast<const uint32_t*>(tile + at));
  }

  ATTN_DEVICE static void add(float (&sum)[8], uint4 x) {
    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack(pairs[i], typename P::T{});
      sum[2 * i] += pair.x, sum[2 * i + 1] += pair.y;
    }
  }

  // Of key k and query q, the diagonal k - q: in a warp's memory diagonals lie below each other.
  ATTN_DEVICE void add_sums(const float (&sum)[8], int head, int first) const {
    float* memory = shared.diagonals(warp) + lane;
    sync_warp();
    ATTN_UNROLL
    for (int query = 0; query < 8; ++query) memory[query * kRow + 7 - query] = sum[query];
    sync_warp();
    ATTN_UNROLL
    for (int i = 0; i < 64; i += 32) {
      const int at = first - 7 + i + lane;
      if (i + lane >= 39 || at < 0 || at >= p.bias.span) continue;
      float total = 0.0f;
      ATTN_UNROLL
      for (int query = 0; query < 8; ++query) total += memory[query * kRow + i];
      atomic_add(p.bias.grad + (int64_t{head} * p.bias.span + at), total);
    }
  }
};

}  // namespace attn::cuda::cosine

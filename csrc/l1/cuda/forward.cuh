// attn::_l1_fwd: a block owns 128 queries of one head and walks over the keys that any of them
// sees, with a running maximum. Tiles: distance.cuh; the product with values: values.cuh.
#pragma once

#include "l1/cuda/grid.cuh"
#include "l1/cuda/softmax.cuh"
#include "l1/cuda/values.cuh"

namespace attn::cuda::l1 {

// Shared memory of a block.
struct ForwardMemory {
  uint32_t *queries, *keys, *values;
  float* added;       // to the scores of every query and key of a tile
  Interval* visible;  // of every query
  Span* spans;        // of every warp
  size_t bytes;

  template <class T, int kKeys, int kWidth, bool kExtras>
  static ATTN_HOST_DEVICE ForwardMemory at(uint32_t* start, int D) {
    const int words = slice_words<T>(D);
    const int value_words = kKeys * kWidth / kWordElements<T>;
    const int added_words = kExtras ? kQueries * kAddedPitch<kKeys> : 0;
    ForwardMemory memory;
    memory.queries = start;
    memory.keys = memory.queries + words * kQueryPitch;
    memory.values = memory.keys + words * kKeyPitch<kKeys>;
    memory.added = reinterpret_cast<float*>(memory.values + value_words);
    memory.visible = reinterpret_cast<Interval*>(memory.added + added_words);
    memory.spans = reinterpret_cast<Span*>(memory.visible + kQueries);
    memory.bytes = sizeof(uint32_t) * (words * (kQueryPitch + kKeyPitch<kKeys>)+value_words +
                                       added_words + 2 * kQueries + 4 * kWarps);
    return memory;
  }
};

// Notes every query's keys in shared memory; leaves the spans of this warp and of the block.
ATTN_DEVICE void find_spans(const Problem& p, const BlockIndex& block, const ForwardMemory& memory,
                            Span& of_warp, Span& of_block) {
  const int m = block.first_query + threadIdx.x;
  const bool exists = m < p.M;
  const Interval keys = exists ? visible_keys(p, block.b, m) : Interval{0, 0};
  memory.visible[threadIdx.x] = keys;
  of_warp = Span::of_query(keys, p.N, exists);
  of_warp.join_warp();
  if (threadIdx.x % 32 == 0) memory.spans[threadIdx.x / 32] = of_warp;
  __syncthreads();
  of_block = memory.spans[0];
  ATTN_UNROLL
  for (int i = 1; i < kWarps; ++i) of_block.join(memory.spans[i]);
}

// Columns whose sums over a tile stand in registers beside all of `out`.
template <int kWidth>
constexpr int kColumns = kWidth <= 64 ? kWidth : 32;

template <class T>
ATTN_DEVICE void store_pair(T* row, int e, int size, float first, float second) {
  if (size % 2 == 0 && e < size) {
    if constexpr (sizeof(T) == 4) {
      store2(reinterpret_cast<uint32_t*>(row + e), float_bits(first), float_bits(second));
    } else {
      *reinterpret_cast<uint32_t*>(row + e) = pack<T>(first, second);
    }
  } else {
    if (e < size) row[e] = from_float<T>(first);
    if (e + 1 < size) row[e + 1] = from_float<T>(second);
  }
}

// Rows of the result, and their lse once per row.
template <class T, int kWidth>
ATTN_DEVICE void write_rows(const Problem& p, const BlockIndex& block, const RowSums (&rows)[4],
                            const float (&out)[2][kWidth / 8][4]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t head = static_cast<int64_t>(block.b) * p.H + block.h;
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int m = block.first_query + warp * kWarpQueries + g + 8 * i;
    if (m >= p.M) continue;
    const int64_t row = head * p.M + m;
    if (block.first_column == 0 && t == 0) static_cast<float*>(p.lse.data)[row] = rows[i].lse;
    T* target = static_cast<T*>(p.out.data) + row * p.E + block.first_column;
    ATTN_UNROLL
    for (int n = 0; n < kWidth / 8; ++n) {
      const float* x = out[i / 2][n] + 2 * (i % 2);
      store_pair(target, 8 * n + 2 * t, p.E - block.first_column, x[0] * rows[i].factor,
                 x[1] * rows[i].factor);
    }
  }
}

// Queries and keys of a block: halves times a factor, or float32 on a grid.
template <class T, int kKeys>
struct Operands {
  Factor factor;
  Rows<T> queries, keys;
  KeyStage<T, kKeys> stage;

  ATTN_DEVICE Operands(const Problem& p, const BlockIndex& block, int first_key)
      : factor(common_factor<T>(p, block.b, block.hk)),
        queries(rows_of<T>(p.query, p.query_in_pairs, block.b, block.h, block.first_query, p.M, p.D,
                           factor.up)),
        keys(rows_of<T>(p.key, p.key_in_pairs, block.b, block.hk, first_key, p.N, p.D, factor.up)) {
  }
  ATTN_DEVICE float down() const { return factor.down; }
};
template <int kKeys>
struct Operands<float, kKeys> {
  GridRows queries, keys;
  GridKeyStage<kKeys> stage;

  ATTN_DEVICE Operands(const Problem& p, const BlockIndex& block, int first_key)
      : queries(rows_of<float>(p.query, false, block.b, block.h, block.first_query, p.M, p.D, 1.0f),
                range_of(p, block.b, block.hk)),
        keys(rows_of<float>(p.key, false, block.b, block.hk, first_key, p.N, p.D, 1.0f),
             queries.range) {}
  ATTN_DEVICE float down() const { return keys.range.down; }
};

// Grid: one dimension, blocks of queries x parts of E x heads x batch. Barriers: values of a tile
// are written and its keys no longer read; keys of the next are written and values no longer read.
template <class T, int kKeys, int kWidth, bool kExtras>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ Problem p) {
  const BlockIndex block(p, kWidth);
  const auto memory = ForwardMemory::at<T, kKeys, kWidth, kExtras>(shared_memory<uint32_t>(), p.D);
  Span of_warp, of_block;
  find_spans(p, block, memory, of_warp, of_block);
  Operands<T, kKeys> operands(p, block, of_block.begin);
  const auto& queries = operands.queries;
  auto& keys = operands.keys;
  auto& key_stage = operands.stage;
  const Values<T> values{p.value.at<T>(block.b, block.hk),
                         p.value.stride[2],
                         p.value.stride[3],
                         p.N,
                         block.first_column,
                         p.E,
                         p.value_in_pairs};
  ValueStage<T, kKeys, kWidth> value_stage;
  Softmax<T, kExtras> softmax(p, block, memory.visible, memory.added, operands.down());
  float out[2][kWidth / 8][4] = {};
  stage_queries(queries, memory.queries);
  key_stage.fetch(keys, memory.keys);
  key_stage.commit(keys, memory.keys);
  __syncthreads();
  const bool sliced = padded_words<T>(p.D) > kSliceWords;
#pragma unroll 1
  for (int first = of_block.begin; first < of_block.end; first += kKeys) {
    const bool seen = first < of_warp.end && first + kKeys > of_warp.begin;
    const bool full = first >= of_warp.full_begin && first + kKeys <= of_warp.full_end;
    value_stage.fetch(values, first, memory.values);
    Tile<kKeys> tile = {};
    add_all_distances(queries, keys, memory.queries, memory.keys, seen, tile);
    value_stage.commit(values, first, memory.values);
    __syncthreads();
    keys.first_row = first + kKeys;
    if (sliced) stage_queries(queries, memory.queries);
    key_stage.fetch(keys, memory.keys);
    if (seen) {
      float keep[4];
      softmax.weigh(tile, first, full, keep);
      multiply_values<T, kKeys, kWidth, kColumns<kWidth>>(tile, memory.values, keep, out);
    }
    key_stage.commit(keys, memory.keys);
    __syncthreads();
  }
  RowSums rows[4];
  softmax.finish(rows);
  write_rows<T, kWidth>(p, block, rows, out);
}

}  // namespace attn::cuda::l1

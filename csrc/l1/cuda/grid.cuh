// float32 in the forward: queries and keys in shared memory on a grid (range.cuh) in the places of
// distance.cuh, and their distances.
//
// Numbers on a grid are subtracted as integers by one instruction that takes the absolute value
// and adds it, at half the rate of an addition of floats, of which two are needed. The two go to
// different units. So 3 of 4 columns of a tile are sums of integers and 1 is one of floats: 1.25
// instructions per element, in 1.5 cycles, where floats alone are 2 and 2.
#pragma once

#include "l1/cuda/range.cuh"
#include "l1/cuda/stage.cuh"

namespace attn::cuda::l1 {

struct GridRows : Rows<float> {
  Range range;

  ATTN_DEVICE GridRows(const Rows<float>& rows, const Range& range)
      : Rows<float>(rows), range(range) {}
};

// The words of one row that this thread has copied.
template <int kPitch>
ATTN_DEVICE void place_on_grid(const GridRows& from, uint32_t* to) {
  if (!from.range.grid) return;
  to += threadIdx.x % kGroupWords * kPitch;
#pragma unroll 4
  for (int word = 0; word < from.words; word += kGroupWords) {
    *to = float_bits(fmaf(bits_float(*to), from.range.up, from.range.origin));
    to += kGroupWords * kPitch;
  }
}

ATTN_DEVICE void stage_queries(const GridRows& from, uint32_t* to) {
  stage_queries(static_cast<const Rows<float>&>(from), to);
  copies_commit();
  copies_wait<0>();
#pragma unroll 1
  for (int group = threadIdx.x / 32; group < kQueries / kGroupRows; group += kWarps) {
    place_on_grid<kQueryPitch>(from, to + query_place(group).column);
  }
}

// A tile of keys, fetched while something else is computed.
template <int kKeys>
class GridKeyStage {
 public:
  ATTN_DEVICE void fetch(const GridRows& from, uint32_t* to) { copies_.fetch(from, to); }

  ATTN_DEVICE void commit(const GridRows& from, uint32_t* to) {
    copies_.commit(from, to);
    ATTN_UNROLL
    for (int group = 0; group < kKeys / kGroupRows; group += kWarps) {
      place_on_grid<kKeyPitch<kKeys>>(from, to + key_place(threadIdx.x / 32 + group).column);
    }
  }

 private:
  KeyStage<float, kKeys> copies_;
};

// Every fourth column is one of floats.
constexpr bool is_integer(int column) {
  return column % 4 != 3;
}

ATTN_DEVICE float add_difference(float query, float key, float sum, bool integer) {
  if (!integer) return sum + fabsf(query - key);
  return bits_float(add_absolute_difference(float_bits(query), float_bits(key), float_bits(sum)));
}

// Like add_distances of floats. Sums of integers are the bits of floats until `to_floats`.
template <int kKeys>
ATTN_DEVICE void add_grid_distances(const uint32_t* queries, const uint32_t* keys, int words,
                                    Tile<kKeys>& sums) {
#pragma unroll 1
  for (int w = 0; w < words; w += kWordStep) {
    ATTN_UNROLL
    for (int step = 0; step < kWordStep; ++step) {
      float query[4];
      load_four(query, queries + step * kQueryPitch);
      ATTN_UNROLL
      for (int j = 0; j < kKeys / 16; ++j) {
        float key[4];
        load_four(key, keys + step * kKeyPitch<kKeys> + 16 * j);
        ATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
          ATTN_UNROLL
          for (int c = 0; c < 4; ++c) {
            float& sum = sums.at[i / 2][2 * j + c / 2][2 * (i % 2) + c % 2];
            sum = add_difference(query[i], key[c], sum, is_integer(c));
          }
        }
      }
    }
    queries += kWordStep * kQueryPitch;
    keys += kWordStep * kKeyPitch<kKeys>;
  }
}

template <int kKeys>
ATTN_DEVICE void to_floats(Tile<kKeys>& sums) {
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    ATTN_UNROLL
    for (int column = 0; column < kKeys / 4; ++column) {
      if (!is_integer(column)) continue;
      float& x = sums.at[i / 2][column / 2][2 * (i % 2) + column % 2];
      x = static_cast<float>(float_bits(x));
    }
  }
}

// All of D, like add_all_distances of Rows.
template <int kKeys>
ATTN_DEVICE void add_all_distances(GridRows queries, GridRows keys, uint32_t* query_words,
                                   uint32_t* key_words, bool seen, Tile<kKeys>& sums) {
  const int words = padded_words<float>(keys.D);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t* own_queries = query_words + warp * kWarpQueries + 4 * g;
  const uint32_t* own_keys = key_words + 4 * t;
  const bool grid = keys.range.grid;
#pragma unroll 1
  for (int first = kSliceWords;; first += kSliceWords) {
    if (seen && grid) add_grid_distances<kKeys>(own_queries, own_keys, keys.words, sums);
    if (seen && !grid) add_distances<kKeys>(own_queries, own_keys, keys.words, sums, float{});
    if (first >= words) break;
    queries.first_word = keys.first_word = first;
    queries.words = keys.words = words - first < kSliceWords ? words - first : kSliceWords;
    GridKeyStage<kKeys> stage;
    __syncthreads();
    stage_queries(queries, query_words);
    stage.fetch(keys, key_words);
    stage.commit(keys, key_words);
    __syncthreads();
  }
  if (grid) to_floats(sums);
}

}  // namespace attn::cuda::l1

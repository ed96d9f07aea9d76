// Distances of a tile of 128 queries and kKeys keys, in registers.
//
// A block has 4 warps, a warp 32 queries. In shared memory a tile lies by words of D: word w of
// row r is a float (float32) or two halves, elements 2w and 2w + 1 (16 bits), at [w][place of r].
// With g = lane / 4, t = lane % 4 a thread owns queries g + 8i and keys 16j + 4t + 0..3, each of
// which it loads as 16 bytes. Its results stand as accumulators of the matrix units do:
//   at[m][h][c] is query 16m + g + 8(c / 2), key key_of(t, h, c),
// so that weights become fragments of the product with values without leaving their thread.
#pragma once

#include <type_traits>

#include "l1/cuda/prepass.cuh"

namespace attn::cuda::l1 {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kQueries = 128;
constexpr int kWarpQueries = 32;
constexpr int kQueryPitch = kQueries + 4;  // words; + 4 spreads a column over the banks
constexpr int kSliceWords = 128;           // words of D in shared memory at a time
constexpr int kWordStep = 8;               // words of D are padded to this with zeros

template <int kKeys>
constexpr int kKeyPitch = kKeys + 4;

template <class T>
constexpr int kWordElements = sizeof(uint32_t) / sizeof(T);

template <class T>
ATTN_HOST_DEVICE int padded_words(int D) {
  const int words = (D + kWordElements<T> - 1) / kWordElements<T>;
  return (words + kWordStep - 1) / kWordStep * kWordStep;
}

template <class T>
ATTN_HOST_DEVICE int slice_words(int D) {
  const int words = padded_words<T>(D);
  return words < kSliceWords ? words : kSliceWords;
}

ATTN_DEVICE int key_of(int t, int h, int c) {
  return 16 * (h / 2) + 4 * t + 2 * (h % 2) + c % 2;
}
ATTN_DEVICE int query_of(int g, int m, int c) {
  return 16 * m + g + 8 * (c / 2);
}

template <int kKeys>
struct Tile {
  float at[2][kKeys / 8][4];
};

// --- float32: two additions per element. Eight words are summed as a tree, which costs nothing and
// keeps the rounding of long sums near that of a pairwise sum.

template <int kCount>
ATTN_DEVICE float tree_sum(const float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    float halves[kCount / 2];
    ATTN_UNROLL
    for (int i = 0; i < kCount / 2; ++i) halves[i] = x[2 * i] + x[2 * i + 1];
    return tree_sum(halves);
  }
}

ATTN_DEVICE void load_four(float (&to)[4], const uint32_t* from) {
  const float4 x = load4(reinterpret_cast<const float*>(from));
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
ATTN_DEVICE void load_four(uint32_t (&to)[4], const uint32_t* from) {
  const uint4 x = load4(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

#ifndef L1_TREE
#define L1_TREE 4
#endif
#ifndef L1_FLUSH
#define L1_FLUSH 1
#endif

template <int kKeys, int kRowPitch = kQueryPitch, int kColumnPitch = kKeyPitch<kKeys>>
ATTN_DEVICE void add_distances(const uint32_t* queries, const uint32_t* keys, int words,
                               Tile<kKeys>& sums, float) {
  constexpr int kTree = L1_TREE;
#pragma unroll 1
  for (int w = 0; w < words; w += kWordStep) {
    ATTN_UNROLL
    for (int step = 0; step < kWordStep; step += kTree) {
      float query[kTree][4];
      ATTN_UNROLL
      for (int d = 0; d < kTree; ++d) load_four(query[d], queries + (step + d) * kRowPitch);
      ATTN_UNROLL
      for (int j = 0; j < kKeys / 16; ++j) {
        float key[kTree][4];
        ATTN_UNROLL
        for (int d = 0; d < kTree; ++d) {
          load_four(key[d], keys + (step + d) * kColumnPitch + 16 * j);
        }
        ATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
          ATTN_UNROLL
          for (int c = 0; c < 4; ++c) {
            float parts[kTree];
            ATTN_UNROLL
            for (int d = 0; d < kTree; ++d) parts[d] = fabsf(query[d][i] - key[d][c]);
            sums.at[i / 2][2 * j + c / 2][2 * (i % 2) + c % 2] += tree_sum(parts);
          }
        }
      }
    }
    queries += kWordStep * kRowPitch;
    keys += kWordStep * kColumnPitch;
  }
}

// --- 16 bits: three packed additions per four elements. The matrix units add the two halves of a
// sum of two differences to the float32 distances: a product with a matrix of ones and zeros.

// Column 2t + i of the product is the sum of what lane t of a quad has in registers i (row g) of
// the left operand.
struct Selector {
  uint32_t b[2];
};
ATTN_DEVICE Selector own_columns() {
  constexpr uint32_t kOnes = 0x3c003c00;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  return {{g == 2 * t ? kOnes : 0, g == 2 * t + 1 ? kOnes : 0}};
}

// |q - k| of two words, of eight words.
ATTN_DEVICE uint32_t two_differences(uint32_t q0, uint32_t k0, uint32_t q1, uint32_t k1) {
  return add_both_abs_half2(sub_half2(q0, k0), sub_half2(q1, k1));
}
ATTN_DEVICE uint32_t eight_differences(const uint32_t (&query)[kWordStep][4], int row,
                                       const uint32_t (&key)[kWordStep][4], int column) {
  uint32_t sums[kWordStep / 2];
  ATTN_UNROLL
  for (int d = 0; d < kWordStep; d += 2) {
    sums[d / 2] =
        two_differences(query[d][row], key[d][column], query[d + 1][row], key[d + 1][column]);
  }
  return add_half2(add_half2(sums[0], sums[1]), add_half2(sums[2], sums[3]));
}

template <int kKeys, int kRowPitch = kQueryPitch, int kColumnPitch = kKeyPitch<kKeys>>
ATTN_DEVICE void add_distances(const uint32_t* queries, const uint32_t* keys, int words,
                               Tile<kKeys>& sums, Half) {
  [[maybe_unused]] const Selector own = own_columns();
#pragma unroll 1
  for (int w = 0; w < words; w += kWordStep) {
    uint32_t query[kWordStep][4];
    ATTN_UNROLL
    for (int d = 0; d < kWordStep; ++d) load_four(query[d], queries + d * kRowPitch);
    ATTN_UNROLL
    for (int j = 0; j < kKeys / 16; ++j) {
      uint32_t key[kWordStep][4];
      ATTN_UNROLL
      for (int d = 0; d < kWordStep; ++d) load_four(key[d], keys + d * kColumnPitch + 16 * j);
      ATTN_UNROLL
      for (int m = 0; m < 2; ++m) {
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          uint32_t parts[4];
          ATTN_UNROLL
          for (int i = 0; i < 4; ++i) {
            parts[i] = eight_differences(query, 2 * m + i % 2, key, 2 * e + i / 2);
          }
#if L1_FLUSH == 0
          mma_half(sums.at[m][2 * j + e], parts, own.b);
#else
          ATTN_UNROLL
          for (int i = 0; i < 4; ++i) {
            sums.at[m][2 * j + e][2 * (i % 2) + i / 2] += low_half(parts[i]) + high_half(parts[i]);
          }
#endif
        }
      }
    }
    queries += kWordStep * kRowPitch;
    keys += kWordStep * kColumnPitch;
  }
}

// Adds the distances over the `words` words of D that stand in shared memory.
template <class T, int kKeys>
ATTN_DEVICE void add_distances(const uint32_t* queries, const uint32_t* keys, int words,
                               Tile<kKeys>& sums) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  queries += warp * kWarpQueries + 4 * g;
  keys += 4 * t;
  using Kind = std::conditional_t<sizeof(T) == 4, float, Half>;
  add_distances<kKeys>(queries, keys, words, sums, Kind{});
}

}  // namespace attn::cuda::l1

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

ATTN_DEVICE void load_four(float (&to)[4], const uint32_t* from) {
  const float4 x = load4(reinterpret_cast<const float*>(from));
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
ATTN_DEVICE void load_four(uint32_t (&to)[4], const uint32_t* from) {
  const uint4 x = load4(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// --- float32: two additions per element. Sums in the order of D: a tree holds more operands in
// registers, whose banks then meet, and was 5 % slower.

template <int kKeys, int kRowPitch = kQueryPitch, int kColumnPitch = kKeyPitch<kKeys>>
ATTN_DEVICE void add_distances(const uint32_t* queries, const uint32_t* keys, int words,
                               Tile<kKeys>& sums, float) {
#pragma unroll 1
  for (int w = 0; w < words; w += kWordStep) {
    ATTN_UNROLL
    for (int step = 0; step < kWordStep; ++step) {
      float query[4];
      load_four(query, queries + step * kRowPitch);
      ATTN_UNROLL
      for (int j = 0; j < kKeys / 16; ++j) {
        float key[4];
        load_four(key, keys + step * kColumnPitch + 16 * j);
        ATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
          ATTN_UNROLL
          for (int c = 0; c < 4; ++c) {
            sums.at[i / 2][2 * j + c / 2][2 * (i % 2) + c % 2] += fabsf(query[i] - key[c]);
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

ATTN_DEVICE uint32_t two_differences(uint32_t q0, uint32_t k0, uint32_t q1, uint32_t k1) {
  return add_both_abs_half2(sub_half2(q0, k0), sub_half2(q1, k1));
}

template <int kKeys, int kRowPitch = kQueryPitch, int kColumnPitch = kKeyPitch<kKeys>>
ATTN_DEVICE void add_distances(const uint32_t* queries, const uint32_t* keys, int words,
                               Tile<kKeys>& sums, Half) {
  const Selector own = own_columns();
#pragma unroll 1
  for (int w = 0; w < words; w += kWordStep) {
    ATTN_UNROLL
    for (int step = 0; step < kWordStep; step += 2) {
      uint32_t query[2][4];
      load_four(query[0], queries + step * kRowPitch);
      load_four(query[1], queries + (step + 1) * kRowPitch);
      ATTN_UNROLL
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t key[2][4];
        load_four(key[0], keys + step * kColumnPitch + 16 * j);
        load_four(key[1], keys + (step + 1) * kColumnPitch + 16 * j);
        ATTN_UNROLL
        for (int m = 0; m < 2; ++m) {
          ATTN_UNROLL
          for (int e = 0; e < 2; ++e) {
            uint32_t parts[4];
            ATTN_UNROLL
            for (int i = 0; i < 4; ++i) {
              const int row = 2 * m + i % 2, column = 2 * e + i / 2;
              parts[i] =
                  two_differences(query[0][row], key[0][column], query[1][row], key[1][column]);
            }
            mma_half(sums.at[m][2 * j + e], parts, own.b);
          }
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

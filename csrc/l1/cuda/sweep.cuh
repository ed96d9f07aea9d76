// The sign products of a tile: from coefficients G [queries, keys] in shared memory
//   dq[m, :] += sum_n G[m, n] sign(q[m, :] - k[n, :]),   dk[n, :] += sum_m G[m, n] sign(q - k)
// on the matrix units, which sum in float32. Signs are exact in 16 bits, so nothing is lost but
// bits of G: float32 enters as two numbers of 11 bits, 16-bit types as halves with a common factor.
//
// Signs are left operands (rows: words of D, depth: pairs (m, n)), coefficients right operands. A
// lane (g, t) makes the signs of its own key n0 + t and of two queries: the operand holds 2 queries
// x 4 keys. The same registers then meet
//   - for dk, a right operand whose columns are the 4 keys: zero outside of a lane's own key;
//   - for dq, one whose columns are 4 queries: zero but for the two queries that are there.
// A column exists twice ("plane" j): the two parts of G (float32), or the first and the second of
// a pair of widths (16 bits: an operand of a pair has zero in the place of the other one).
//
// Instructions per element (a pair of query and key in one width), counted in the machine code for
// D = 64: four queries x 16 keys x 64 widths are 128 elements of a lane.
//   float32: t = saturate((q - k) * 2^127 + 1/2), which is 0, 1/2 or 1, so that sign = 2 t - 1: 128
//     FADD, 128 FFMA.SAT, 80 HMMA, about 110 for loads and sums: 445 = 3.5 per element.
//   16 bits: 128 HSET2 (q > k, k > q), 64 HADD2, 32 HMMA, about 85: 310 = 2.4 per element.
// A sweep by FADD, FFMA.SAT, FFMA, FFMA is 4 and its reductions across lanes; two one-sided
// products from a slab of G 8. sum G (for 2 t - 1) is made by the same units in the same order, so
// that a row of ties gives exactly zero.
#pragma once

#include "l1/cuda/stage.cuh"

namespace attn::cuda::l1 {

// The shape of the backward's tiles for D and E up to kWidth_.
template <class T, int kWidth_>
struct Plan {
  static constexpr int kWidth = kWidth_;
  static constexpr int kKeys = kWidth == 256 ? 32 : 64;
  static constexpr int kQueries = kWidth == 128 ? 64 : 32;
  static constexpr int kSlice = kWidth < 64 ? kWidth : 64;  // widths of a warp in the sweep
  static constexpr int kKeySlices = kKeys / 16;             // a warp has 16 keys there
  static constexpr int kWarps = kKeySlices * (kWidth / kSlice);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksOfSM = kWidth > 64 ? 1 : sizeof(T) == 4 ? 2 : 3;
  static constexpr int kPart = sizeof(uint32_t) / sizeof(T);  // elements in a word
  static constexpr int kWords = kWidth / kPart;
  static constexpr int kBlocks = kSlice / kPart / 16;  // left operands of a slice
  static constexpr int kSums = kBlocks + (sizeof(T) == 4 ? 1 : 0);
  static constexpr int kKeyPitch = kKeys + 4;
  static constexpr int kQueryPitch = kQueries + 4;
  // Planes of G: 16 words more keep the banks of both apart.
  static constexpr int kPlane = kKeys * kQueryPitch + 16;

  // Gradients of queries and keys lie as [row_of(d)][query or key].
  static ATTN_DEVICE int row_of(int d) { return d % kPart * kWords + d / kPart; }
};

// 0, 1/2 or 1 for q < k, q = k, q > k.
ATTN_DEVICE uint32_t signs_of(uint32_t q, uint32_t k, float) {
  constexpr float kHuge = 1.7014118e38f;  // 2^127
  return float_bits(fma_saturate(bits_float(q) - bits_float(k), kHuge, 0.5f));
}
// Two signs, as halves.
ATTN_DEVICE uint32_t signs_of(uint32_t q, uint32_t k, Half) {
  return sub_half2(greater_half2(q, k), greater_half2(k, q));
}

template <class T>
using SignKind = std::conditional_t<sizeof(T) == 4, float, Half>;

ATTN_DEVICE void multiply_signs(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                float) {
  mma_tf32(c, a, b);
}
ATTN_DEVICE void multiply_signs(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                Half) {
  mma_half(c, a, b);
}

// The right operands of 4 queries and 4 keys: for the first two queries and for the others.
struct Coefficients {
  uint32_t for_keys[2][2];
  uint32_t for_queries[2][2];
};

// `planes` points at G[n0][m0].
template <class P>
ATTN_DEVICE Coefficients load_coefficients(const uint32_t* planes) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t* own = planes + g % 2 * P::kPlane + t * P::kQueryPitch;
  uint4 x{0, 0, 0, 0};
  if (g / 2 == t) x = load4(own);
  const uint32_t y = own[g / 2];
  return {{{x.x, x.y}, {x.z, x.w}},
          {{g / 2 == 0 ? y : 0, g / 2 == 1 ? y : 0}, {g / 2 == 2 ? y : 0, g / 2 == 3 ? y : 0}}};
}

// 16 keys and a slice of widths of one warp.
template <class T, class P>
class Sweep {
 public:
  // `keys`: [word of the slice][key of the 16] in shared memory.
  ATTN_DEVICE explicit Sweep(const uint32_t* keys) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    ATTN_UNROLL
    for (int quad = 0; quad < 4; ++quad) {
      ATTN_UNROLL
      for (int i = 0; i < 2 * P::kBlocks; ++i) {
        key_[quad][i] = keys[(8 * i + g) * P::kKeyPitch + 4 * quad + t];
      }
    }
  }

  // Four queries: adds to the sums of the keys and gives those of the queries. `queries` and
  // `planes` point at the first query.
  ATTN_DEVICE void four_queries(const uint32_t* queries, const uint32_t* planes,
                                float (&of_queries)[P::kSums][4]) {
    const int g = threadIdx.x % 32 / 4;
    uint32_t query[2 * P::kBlocks][4];
    ATTN_UNROLL
    for (int i = 0; i < 2 * P::kBlocks; ++i) {
      const uint4 q = load4(queries + (8 * i + g) * P::kQueryPitch);
      query[i][0] = q.x, query[i][1] = q.y, query[i][2] = q.z, query[i][3] = q.w;
    }
    ATTN_UNROLL
    for (int quad = 0; quad < 4; ++quad) {
      const Coefficients b = load_coefficients<P>(planes + 4 * quad * P::kQueryPitch);
      // Pairs outside: a product waits long for the one before it into the same sum.
      ATTN_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        ATTN_UNROLL
        for (int block = 0; block < P::kSums; ++block) {
          uint32_t a[4];
          ATTN_UNROLL
          for (int i = 0; i < 4; ++i) {
            a[i] = block < P::kBlocks ? signs_of(query[2 * block + i % 2][2 * pair + i / 2],
                                                 key_[quad][2 * block + i % 2], SignKind<T>{})
                                      : float_bits(1.0f);
          }
          multiply_signs(of_keys_[quad][block], a, b.for_keys[pair], SignKind<T>{});
          multiply_signs(of_queries[block], a, b.for_queries[pair], SignKind<T>{});
        }
      }
    }
  }

  // Adds sums of 4 queries or keys, times `down`, to [row_of(d)][query or key] (or puts them
  // there).
  static ATTN_DEVICE void flush(const float (&sums)[P::kSums][4], float down, bool put, float* to,
                                int pitch) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    to += g * pitch + t;
    ATTN_UNROLL
    for (int block = 0; block < P::kBlocks; ++block) {
      ATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        float* row = to + (16 * block + 8 * i) * pitch;
        const float x = sums[block][2 * i], y = sums[block][2 * i + 1];
        if constexpr (sizeof(T) == 4) {
          const float (&total)[4] = sums[P::kBlocks];
          const float sum = fmaf(2.0f, x + y, -(total[2 * i] + total[2 * i + 1]));
          row[0] = put ? sum : row[0] + sum;
        } else {
          row[0] = fmaf(x, down, put ? 0.0f : row[0]);
          float* second = row + P::kWords * pitch;
          second[0] = fmaf(y, down, put ? 0.0f : second[0]);
        }
      }
    }
  }

  // Adds the sums of the 16 keys.
  ATTN_DEVICE void flush_keys(float down, float* to) const {
    ATTN_UNROLL
    for (int quad = 0; quad < 4; ++quad) {
      flush(of_keys_[quad], down, false, to + 4 * quad, P::kKeyPitch);
    }
  }

 private:
  uint32_t key_[4][2 * P::kBlocks];
  float of_keys_[4][P::kSums][4] = {};
};

}  // namespace attn::cuda::l1

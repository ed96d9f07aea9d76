// One tile of the backward: 32 or 64 keys that stay, and 32 or 64 queries that change. From
// distances and from grad_out * value the weights P and the gradients Z = P (grad_out value -
// delta) of the scores, and P^T grad_out.
//
// Rows of a tile are keys, columns queries: a warp has 32 x 16 of them, a thread keys 4g + 0..3 and
// queries 4t + 0..3 (distance.cuh; row 16m + g + 8i of the matrix units is key 4g + 2m + i here).
#pragma once

#include "l1/cuda/backward_stage.cuh"
#include "l1/cuda/sweep.cuh"
#include "l1/cuda/values.cuh"

namespace attn::cuda::l1 {

// What the backward reads and writes besides the problem.
struct Gradients {
  Array grad_out;     // [B,H,M,E]
  bool aligned;       // rows of query, key, value and grad_out start at multiples of 16 bytes
  Array grad_scores;  // [B,H,M,N]: given instead of value and grad_out, T or float
  bool grad_scores_is_float;
  const float* lse;    // [B,H,M], +inf in place of -inf
  const float* delta;  // [B,H,M]
  // Contiguous, of the inputs' dtype; null where it is not wanted.
  void *query, *key, *value;
  // [heads of this launch, M, D]; with T = float the gradient itself. Zero unless ordered.
  float* query_sums;
  bool ordered;  // the same sum of the same inputs every time
  int* flags;    // if ordered: [B, H, tiles of queries], zero: how many key tiles are in the sums
  int* ticket;   // zero
  int first_head, heads;  // b * Hk + hk of this launch
  int key_tiles;
};

// Shared memory, in words.
template <class T, class P>
struct BackwardMemory {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kRowPitch = P::kWords + 4;                  // grad_out: [query][word of E]
  static constexpr int kWeightPitch = P::kQueries / P::kPart + 4;  // [key][word of queries]
  static constexpr int kValuePitch = P::kWidth + 4;                // [key][e]

  static constexpr int kQuery = P::kWords * P::kKeyPitch;
  static constexpr int kRows = kQuery + P::kWords * P::kQueryPitch;
  // grad_out, and after it is used up the tile's gradient of the queries.
  static constexpr int kRowWords = P::kQueries * kRowPitch > P::kWidth* P::kQueryPitch
                                       ? P::kQueries * kRowPitch
                                       : P::kWidth * P::kQueryPitch;
  static constexpr int kPlanes = kRows + kRowWords;
  // float32: weights stand where the coefficients will.
  static constexpr int kWeights = kFloat ? kPlanes : kPlanes + 2 * P::kPlane;
  static constexpr int kKeySums = kPlanes + 2 * P::kPlane + (kFloat ? 0 : P::kKeys * kWeightPitch);
  static constexpr int kValueSums = kKeySums + P::kWidth * P::kKeyPitch;
  // 16 bits: the sums of values stay in registers.
  static constexpr int kColumns = kValueSums + (kFloat ? P::kKeys * kValuePitch : 0);
  static constexpr int kLargest = kColumns + 4 * P::kQueries;
  static constexpr int kTicket = kLargest + P::kWarps;
  static constexpr int kValues = kTicket + 4;
  static constexpr int kMost = (P::kBlocksOfSM == 1 ? 227 : 228 / P::kBlocksOfSM - 1) * 256;
  static constexpr bool kHoldsValues = kValues + P::kKeys * kRowPitch <= kMost;
  static constexpr int kTotal = kValues + (kHoldsValues ? P::kKeys * kRowPitch : 0);
  static constexpr size_t kBytes = sizeof(uint32_t) * kTotal;
  static_assert(kTotal <= kMost);
};

// What a tile knows of its queries: [kQueries] each in shared memory.
template <class P>
struct Columns {
  uint32_t *lse, *delta, *begin, *end;

  ATTN_DEVICE explicit Columns(uint32_t* at)
      : lse(at), delta(at + P::kQueries), begin(at + 2 * P::kQueries), end(at + 3 * P::kQueries) {}
};

// --- products of words as they are: 3 products of 11-bit parts for float32. A product waits long
// for the one before it into the same sum, hence several sums at once.

// c[i] += a[i / kB] b[i % kB].
template <class T, int kA, int kB>
ATTN_DEVICE void multiply_words(float (&c)[kA * kB][4], const uint32_t (&a)[kA][4],
                                const uint32_t (&b)[kB][2]) {
  if constexpr (sizeof(T) == 4) {
    uint32_t a_parts[2][kA][4], b_parts[2][kB][2];
    ATTN_UNROLL
    for (int i = 0; i < 4 * kA; ++i) {
      a_parts[0][i / 4][i % 4] = large_part(bits_float(a[i / 4][i % 4]));
      a_parts[1][i / 4][i % 4] = small_part(bits_float(a[i / 4][i % 4]));
    }
    ATTN_UNROLL
    for (int i = 0; i < 2 * kB; ++i) {
      b_parts[0][i / 2][i % 2] = large_part(bits_float(b[i / 2][i % 2]));
      b_parts[1][i / 2][i % 2] = small_part(bits_float(b[i / 2][i % 2]));
    }
    ATTN_UNROLL
    for (int part = 2; part >= 0; --part) {
      ATTN_UNROLL
      for (int i = 0; i < kA * kB; ++i) {
        mma_tf32(c[i], a_parts[part / 2][i / kB], b_parts[part % 2][i % kB]);
      }
    }
  } else {
    ATTN_UNROLL
    for (int i = 0; i < kA * kB; ++i) {
      if constexpr (std::is_same_v<T, Half>) {
        mma_half(c[i], a[i / kB], b[i % kB]);
      } else {
        mma_bfloat(c[i], a[i / kB], b[i % kB]);
      }
    }
  }
}

// Where key n of a tile is among the rows of values: the keys of a matrix unit's rows are
// neighbours.
ATTN_DEVICE int value_place(int n) {
  return n / 32 * 32 + n % 4 * 8 + n % 32 / 4;
}

// Left operands of values: rows g, g + 8 are keys 4g + 2m, 4g + 2m + 1 of the warp's 32.
template <class T, class P>
class ValueRows {
 public:
  // `shared`: the warp's rows, if values are held there; else they are read from `global`.
  ATTN_DEVICE ValueRows(const uint32_t* shared, const Source<T>& global) : global_(global) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, i = threadIdx.x % 32 / 8;
    if constexpr (kShared) {
      shared_ = shared + (threadIdx.x % 8 + 8 * (i % 2)) * kPitch + 4 * (i / 2);
    } else if (global.aligned) {
      ATTN_UNROLL
      for (int row = 0; row < 4; ++row) {
        // A row beyond the last gives a product that nobody looks at.
        const int r = global.exists(4 * g + row) ? 4 * g + row : 0;
        rows_[row] = reinterpret_cast<const uint32_t*>(global.row(r)) + t;
      }
    }
  }

  ATTN_DEVICE bool aligned() const { return kShared || global_.aligned; }

  template <bool kAligned>
  ATTN_DEVICE void load(int word, uint32_t (&a)[2][4]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    ATTN_UNROLL
    for (int m = 0; m < 2; ++m) {
      if constexpr (kShared) {
        load_matrices(a[m], shared_ + 16 * m * kPitch + word);
      } else {
        ATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = 2 * m + i % 2, at = word + 4 * (i / 2);
          if constexpr (kAligned) {
            a[m][i] = (at + t) * kWordElements<T> < global_.width ? rows_[row][at] : 0;
          } else {
            a[m][i] = global_.word(4 * g + row, at + t);
          }
        }
      }
    }
  }

 private:
  static constexpr bool kShared = BackwardMemory<T, P>::kHoldsValues;
  static constexpr int kPitch = BackwardMemory<T, P>::kRowPitch;
  const uint32_t* shared_;
  const uint32_t* rows_[4];
  Source<T> global_;
};

template <class T, class P, bool kAligned>
ATTN_DEVICE void multiply_rows(const ValueRows<T, P>& values, const uint32_t* rows, int words,
                               float (&sums)[4][4]) {
#pragma unroll 2
  for (int word = 0; word < words; word += 8) {
    uint32_t a[2][4], b[4];
    load_matrices(b, rows + word);
    values.template load<kAligned>(word, a);
    const uint32_t columns[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
    multiply_words<T>(sums, a, columns);
  }
}

// grad_out value^T of a warp's 32 keys and 16 queries. `rows`: grad_out in shared memory from the
// warp's first query; `words` of E, padded to 8.
template <class T, class P>
ATTN_DEVICE void multiply_grad_out(const ValueRows<T, P>& values, const uint32_t* rows, int words,
                                   Tile<16>& products) {
  const int i = threadIdx.x % 32 / 8, x = threadIdx.x % 8;
  rows += (4 * (x / 2) + x % 2 + i / 2 * 2) * BackwardMemory<T, P>::kRowPitch + i % 2 * 4;
  float sums[4][4] = {};
  if (values.aligned()) {
    multiply_rows<T, P, true>(values, rows, words, sums);
  } else {
    multiply_rows<T, P, false>(values, rows, words, sums);
  }
  ATTN_UNROLL
  for (int e = 0; e < 16; ++e) products.at[e / 8][e / 4 % 2][e % 4] = sums[e / 4][e % 4];
}

// --- weights

// Of one pair: the weight and the gradient of the score, and what d is multiplied with.
struct Pair {
  float weight, grad, slope;
};

template <bool kGeneral>
ATTN_DEVICE Pair pair_of(const Problem& p, float distance, float added, float product, float lse,
                         float delta) {
  constexpr float kLog2e = 1.4426950408889634f;
  float score = -multiply_rounded(p.scale, distance), slope = -p.scale;
  if constexpr (kGeneral) {
    score = score_of(p, distance);
    if (p.inverse) slope *= score * score;
    score += added;
  }
  const float weight = fast_exp2((score - lse) * kLog2e);
  return {weight, weight * (product - delta), slope};
}

// grad_scores * scale.
template <class T>
ATTN_DEVICE float given_coefficient(const Problem& p, const Gradients& g, int b, int h, int m,
                                    int n) {
  const float grad = g.grad_scores_is_float ? *g.grad_scores.at<float>(b, h, m, n)
                                            : to_float(*g.grad_scores.at<T>(b, h, m, n));
  return p.scale * grad;
}

// Weights of a thread, as the left operand of P^T grad_out: [key][word of queries].
template <class T, class P>
ATTN_DEVICE void store_weights(const Tile<16>& weights, uint32_t* to) {
  constexpr int kPitch = BackwardMemory<T, P>::kWeightPitch;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float (&first)[4] = weights.at[i / 2][0], (&second)[4] = weights.at[i / 2][1];
    const int c = i % 2 * 2;
    uint32_t* row = to + (4 * g + i) * kPitch + 4 / P::kPart * t;
    if constexpr (sizeof(T) == 4) {
      store4(row, uint4{float_bits(first[c]), float_bits(first[c + 1]), float_bits(second[c]),
                        float_bits(second[c + 1])});
    } else {
      store2(row, pack<T>(first[c], first[c + 1]), pack<T>(second[c], second[c + 1]));
    }
  }
}

// Coefficients of a thread times `up` as two planes [key][query].
template <class T, class P>
ATTN_DEVICE void store_coefficients(const Tile<16>& coefficients, float up, uint32_t* to) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    uint32_t first[4], second[4];
    ATTN_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float x = coefficients.at[i / 2][j / 2][i % 2 * 2 + j % 2];
      if constexpr (sizeof(T) == 4) {
        first[j] = large_part(x);
        second[j] = small_part(x);
      } else {
        first[j] = pack_half(x * up, 0.0f);
        second[j] = first[j] << 16;
      }
    }
    uint32_t* row = to + (4 * g + i) * P::kQueryPitch + 4 * t;
    store4(row, uint4{first[0], first[1], first[2], first[3]});
    store4(row + P::kPlane, uint4{second[0], second[1], second[2], second[3]});
  }
}

// --- P^T grad_out

// Right operands of four half steps (8 words of 8 queries... of 16 bits: pairs of queries) and 8
// columns from e on; `rows`: grad_out [query][word of E].
template <class T, class P>
ATTN_DEVICE void load_grad_out(const uint32_t* rows, int e, uint32_t (&b)[4]) {
  constexpr int kPitch = BackwardMemory<T, P>::kRowPitch;
  if constexpr (sizeof(T) == 4) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) b[i] = rows[(4 * i + t) * kPitch + e + g];
  } else {
    load_matrices_transposed(b, rows + threadIdx.x % 32 * kPitch + e / 2);
  }
}

// P^T grad_out of 16 keys and the 32 columns from e on.
template <class T, class P>
ATTN_DEVICE void multiply_weights(const uint32_t (&a)[P::kQueries / P::kPart / 8][4],
                                  const uint32_t* rows, int e, float (&c)[4][4]) {
  ATTN_UNROLL
  for (int step = 0; step < P::kQueries / P::kPart / 8; step += 2) {
    uint32_t b[4][4];
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      load_grad_out<T, P>(rows + step * 8 * P::kPart * BackwardMemory<T, P>::kRowPitch, e + 8 * i,
                          b[i]);
    }
    ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t left[1][4], right[4][2];
      ATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        left[0][i] = a[step + half][i];
        right[i][0] = b[i][2 * half];
        right[i][1] = b[i][2 * half + 1];
      }
      multiply_words<T>(c, left, right);
    }
  }
}

// The warp's 16 keys as left operands of P^T grad_out.
template <class T, class P>
ATTN_DEVICE void load_weights(const uint32_t* weights,
                              uint32_t (&a)[P::kQueries / P::kPart / 8][4]) {
  const int first_key = 16 * (threadIdx.x / 32 % P::kKeySlices), i = threadIdx.x % 32 / 8;
  weights +=
      (first_key + threadIdx.x % 8 + i % 2 * 8) * BackwardMemory<T, P>::kWeightPitch + i / 2 * 4;
  ATTN_UNROLL
  for (int step = 0; step < P::kQueries / P::kPart / 8; ++step) {
    load_matrices(a[step], weights + 8 * step);
  }
}

// sum over queries of P^T grad_out: 16 keys and up to 64 columns of a warp. float32 sums lie in
// shared memory, [key][e], and take a tile's sum at a time: the matrix units round towards zero.
template <class T, class P>
class ValueSums {
  using Memory = BackwardMemory<T, P>;
  static constexpr bool kFloat = Memory::kFloat;

 public:
  ATTN_DEVICE void add(const uint32_t* weights, const uint32_t* rows, int E, float* shared) {
    uint32_t a[P::kQueries / P::kPart / 8][4];
    load_weights<T, P>(weights, a);
    shared += row() * Memory::kValuePitch + 2 * (threadIdx.x % 4);
    ATTN_UNROLL
    for (int k = 0; k < P::kSlice / 32; ++k) {
      const int e = column() + 32 * k;
      if (e >= E) break;
      if constexpr (kFloat) {
        float c[4][4] = {};
        multiply_weights<T, P>(a, rows, e, c);
        ATTN_UNROLL
        for (int i = 0; i < 8; ++i) {
          float* at = shared + i / 4 * 8 * Memory::kValuePitch + e + i % 4 * 8;
          float2* sum = reinterpret_cast<float2*>(at);
          const float2 before = *sum;
          *sum = make_float2(before.x + c[i % 4][i / 4 * 2], before.y + c[i % 4][i / 4 * 2 + 1]);
        }
      } else {
        multiply_weights<T, P>(a, rows, e, at_[k]);
      }
    }
  }

  // To out [keys, E] of this tile.
  ATTN_DEVICE void store(const float* shared, int keys, int E, T* out) const {
    shared += row() * Memory::kValuePitch;
    ATTN_UNROLL
    for (int i = 0; i < P::kSlice / 32 * 16; ++i) {
      const int key = row() + i / 2 % 2 * 8;
      const int e = column() + i / 4 * 8 + 2 * (threadIdx.x % 4) + i % 2;
      if (key >= keys || e >= E) continue;
      float sum = at_[kFloat ? 0 : i / 16][i / 4 % 4][i % 4];
      if (kFloat) sum = shared[i / 2 % 2 * 8 * Memory::kValuePitch + e];
      out[static_cast<int64_t>(key) * E + e] = from_float<T>(sum);
    }
  }

 private:
  static ATTN_DEVICE int row() {
    return 16 * (threadIdx.x / 32 % P::kKeySlices) + threadIdx.x % 32 / 4;
  }
  static ATTN_DEVICE int column() { return threadIdx.x / 32 / P::kKeySlices * P::kSlice; }

  float at_[kFloat ? 1 : P::kSlice / 32][4][4] = {};
};

}  // namespace attn::cuda::l1

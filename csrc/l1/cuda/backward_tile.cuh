// One tile of the backward: 32 or 64 keys that stay, and 32 or 64 queries that change. From
// distances and from grad_out * value the weights P and the gradients Z = P (grad_out value -
// delta) of the scores, and P^T grad_out.
//
// Rows of a tile are keys, columns queries: a warp has 32 x 16 of them, a thread keys 4g + 0..3 and
// queries 4t + 0..3 (distance.cuh; row 16m + g + 8i of the matrix units is key 4g + 2m + i here).
#pragma once

#include "l1/cuda/sweep.cuh"
#include "l1/cuda/values.cuh"

namespace attn::cuda::l1 {

// What the backward reads and writes besides the problem.
struct Gradients {
  Array grad_out;  // [B,H,M,E]
  bool grad_out_in_pairs;
  Array grad_scores;  // [B,H,M,N]: given instead of value and grad_out, T or float
  bool grad_scores_is_float;
  const float* lse;    // [B,H,M], +inf in place of -inf
  const float* delta;  // [B,H,M]
  // Contiguous, of the inputs' dtype; null where it is not wanted.
  void *query, *key, *value;
  float* query_sums;      // [heads of this launch, M, D]; with T = float the gradient itself
  int* flags;             // [B, H, tiles of queries], zero: how many key tiles are in query_sums
  int* ticket;            // zero
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
  static constexpr int kColumns = kValueSums + P::kKeys * kValuePitch;
  static constexpr int kLargest = kColumns + 4 * P::kQueries;
  static constexpr int kTicket = kLargest + P::kWarps;
  static constexpr int kTotal = kTicket + 4;
  static constexpr size_t kBytes = sizeof(uint32_t) * kTotal;
  static_assert(kBytes <= 227 * 1024);
};

// What a tile knows of its queries: [kQueries] each in shared memory.
template <class P>
struct Columns {
  float* lse;
  float* delta;
  int *begin, *end;

  ATTN_DEVICE explicit Columns(float* at)
      : lse(at),
        delta(at + P::kQueries),
        begin(reinterpret_cast<int*>(at + 2 * P::kQueries)),
        end(reinterpret_cast<int*>(at + 3 * P::kQueries)) {}
};

// --- staging

// A word of a row as it is; zeros beyond its elements.
template <class T>
ATTN_DEVICE uint32_t row_word(const Rows<T>& from, int r, int word) {
  const int size = from.size(r), element = word * kWordElements<T>;
  if (element >= size) return 0;
  const T* row = from.row(r) + element * from.stride;
  if constexpr (sizeof(T) == 4) {
    return float_bits(*row);
  } else {
    if (from.in_pairs) return *reinterpret_cast<const uint32_t*>(row);
    return load_pair(row, from.stride, 0, size - element);
  }
}

// [word][row], 16 bits as halves times the factor: a warp copies 8 words of 4 rows at once.
template <class T, int kPitch>
ATTN_DEVICE void stage_words(const Rows<T>& from, int rows, int warps, uint32_t* to) {
#pragma unroll 1
  for (int group = threadIdx.x / 32; group < rows / kGroupRows; group += warps) {
    const int r = kGroupRows * group + threadIdx.x % 32 / kGroupWords;
#pragma unroll 4
    for (int word = threadIdx.x % kGroupWords; word < from.words; word += kGroupWords) {
      uint32_t* target = to + word * kPitch + r;
      if constexpr (sizeof(T) == 4) {
        const bool valid = word < from.size(r);
        copy4_async(target, valid ? from.row(r) + word * from.stride : from.data, valid);
      } else {
        *target = scaled_pair(row_word(from, r, word), from.factor, T{});
      }
    }
  }
}

// Row by row: [row][word].
template <class T>
ATTN_DEVICE void stage_rows(const Rows<T>& from, int rows, int warps, int pitch, uint32_t* to) {
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < rows; r += warps) {
    for (int word = threadIdx.x % 32; word < from.words; word += 32) {
      if constexpr (sizeof(T) == 4) {
        const bool valid = word < from.size(r);
        copy4_async(to + r * pitch + word, valid ? from.row(r) + word * from.stride : from.data,
                    valid);
      } else {
        to[r * pitch + word] = row_word(from, r, word);
      }
    }
  }
}

// --- products of words as they are: 3 products of 11-bit parts for float32.

template <class T>
ATTN_DEVICE void multiply_words(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4) {
    uint32_t large[4], small[4];
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      large[i] = large_part(bits_float(a[i]));
      small[i] = small_part(bits_float(a[i]));
    }
    const uint32_t large_b[2] = {large_part(bits_float(b[0])), large_part(bits_float(b[1]))};
    const uint32_t small_b[2] = {small_part(bits_float(b[0])), small_part(bits_float(b[1]))};
    mma_tf32(c, small, large_b);
    mma_tf32(c, large, small_b);
    mma_tf32(c, large, large_b);
  } else if constexpr (std::is_same_v<T, Half>) {
    mma_half(c, a, b);
  } else {
    mma_bfloat(c, a, b);
  }
}

// grad_out value^T of a warp's 32 keys and 16 queries. `value`: rows from the warp's first key,
// words padded to 8; `rows`: grad_out in shared memory from the warp's first query.
template <class T, class P>
ATTN_DEVICE void multiply_grad_out(const Rows<T>& value, const uint32_t* rows, Tile<16>& products) {
  constexpr int kPitch = BackwardMemory<T, P>::kRowPitch;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  rows += (4 * (g / 2) + g % 2) * kPitch + t;
#pragma unroll 2
  for (int word = 0; word < value.words; word += 8) {
    uint32_t b[2][2], a[2][4];
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      b[i / 2][i % 2] = rows[i / 2 * 2 * kPitch + word + 4 * (i % 2)];
      ATTN_UNROLL
      for (int m = 0; m < 2; ++m) {
        a[m][i] = row_word(value, 4 * g + 2 * m + i % 2, word + t + 4 * (i / 2));
      }
    }
    ATTN_UNROLL
    for (int m = 0; m < 2; ++m) {
      ATTN_UNROLL
      for (int h = 0; h < 2; ++h) multiply_words<T>(products.at[m][h], a[m], b[h]);
    }
  }
}

// --- weights

// Of one pair: the weight and the gradient of the score, and what d is multiplied with.
struct Pair {
  float weight, grad, slope;
};

template <class T, bool kExtras>
ATTN_DEVICE Pair pair_of(const Problem& p, float distance, float product, float lse, float delta,
                         int b, int h, int m, int n) {
  constexpr float kLog2e = 1.4426950408889634f;
  const float score = score_of(p, distance);
  float sum = score, slope = -p.scale;
  if constexpr (kExtras) {
    if (p.inverse) slope *= score * score;
    sum += added_to_score<T>(p, b, h, m, n);
  }
  const float weight = fast_exp2((sum - lse) * kLog2e);
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

// The word of queries m.. (2 of them in 16 bits) and column e, from grad_out [query][word of E].
template <class T, class P>
ATTN_DEVICE uint32_t column_word(const uint32_t* rows, int word, int e) {
  constexpr int kPitch = BackwardMemory<T, P>::kRowPitch;
  if constexpr (sizeof(T) == 4) {
    return rows[word * kPitch + e];
  } else {
    const uint32_t low = rows[2 * word * kPitch + e / 2],
                   high = rows[(2 * word + 1) * kPitch + e / 2];
    return e % 2 == 0 ? (low & 0xffff) | high << 16 : low >> 16 | (high & 0xffff0000u);
  }
}

// Adds to sums [key][e]: 16 keys and every `step`-th 8 columns of a warp. A tile is summed on its
// own: the matrix units round towards zero.
template <class T, class P>
ATTN_DEVICE void add_values(const uint32_t* weights, const uint32_t* rows, int E, float* sums) {
  using Memory = BackwardMemory<T, P>;
  constexpr int kSteps = P::kQueries / P::kPart / 8;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int first_key = 16 * (warp % P::kKeySlices);
  uint32_t a[kSteps][4];
  ATTN_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      a[step][i] = weights[(first_key + g + 8 * (i % 2)) * Memory::kWeightPitch + 8 * step + t +
                           4 * (i / 2)];
    }
  }
#pragma unroll 1
  for (int e = warp / P::kKeySlices * 8; e < E; e += P::kWarps / P::kKeySlices * 8) {
    float c[4] = {};
    ATTN_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t b[2] = {column_word<T, P>(rows, 8 * step + t, e + g),
                             column_word<T, P>(rows, 8 * step + t + 4, e + g)};
      multiply_words<T>(c, a[step], b);
    }
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      sums[(first_key + g + 8 * (i / 2)) * Memory::kValuePitch + e + 2 * t + i % 2] += c[i];
    }
  }
}

}  // namespace attn::cuda::l1

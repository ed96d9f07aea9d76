// The product of a tile's weights with its values, on the matrix units.
//
// In shared memory values lie as fragments (right operands, device.cuh), those of two neighbouring
// 8 columns together: unit [step][column / 16][place of lane] of 16 bytes, of which columns 0..7
// have the first 8. The order of keys in a step is that of the weights (distance.cuh): register i
// of lane (g, t) holds key 8 step + ... of column g as key_of says.
#pragma once

#include "l1/cuda/stage.cuh"

namespace attn::cuda::l1 {

// Keys of one step of the matrix units.
template <class T>
constexpr int kStepKeys = sizeof(T) == 4 ? 8 : 16;

// Where lane (g, t) has its unit: both columns of lanes written, and lanes read, meet all banks.
ATTN_DEVICE int unit_place(int g, int t) {
  return 8 * t + (g ^ (2 * t));
}

// The word of shared memory of register i, lane t, of column e in a step.
template <int kWidth>
ATTN_DEVICE int value_word(int step, int t, int e, int i) {
  const int unit = (step * (kWidth / 16) + e / 16) * 32 + unit_place(e % 8, t);
  return 4 * unit + 2 * (e / 8 % 2) + i;
}

// Columns [first_column, ...) of values of one batch and head.
template <class T>
struct Values {
  const T* data;
  int64_t row_stride, stride;
  int rows;
  int first_column, E;
  bool in_pairs;

  // Row r from `first_column` on; it may be asked for in any case.
  ATTN_DEVICE const T* row(int r) const {
    return data + static_cast<int64_t>(r) * row_stride + first_column * stride;
  }
};

// A tile of values, fetched while something else is computed.
template <class T, int kKeys, int kWidth>
class ValueStage {
 public:
  ATTN_DEVICE void fetch(const Values<T>& from, int first_row, uint32_t* to) {
    if constexpr (sizeof(T) == 4) {
      copy(from, first_row, to);
      copies_commit();
    } else if (from.in_pairs) {
      ATTN_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) {
        const int row = first_row + 4 * quad(unit);
        const T* source = from.row(row) + column(unit);
        const int left = from.first_column + column(unit) < from.E ? from.rows - row : 0;
        ATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
          held_[unit][i] =
              i < left ? *reinterpret_cast<const uint32_t*>(source + i * from.row_stride) : 0;
        }
      }
    }
  }

  ATTN_DEVICE void commit(const Values<T>& from, int first_row, uint32_t* to) {
    if constexpr (sizeof(T) == 4) {
      copies_wait<0>();
    } else if (from.in_pairs) {
      ATTN_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) store(held_[unit], unit, to);
    } else {
#pragma unroll 1
      for (int unit = 0; unit < kUnits; ++unit) {
        uint32_t pairs[4];
        for (int i = 0; i < 4; ++i) {
          const int row = first_row + 4 * quad(unit) + i;
          const int size = row < from.rows ? from.E - from.first_column : 0;
          pairs[i] = load_pair(from.row(row), from.stride, column(unit), size);
        }
        store(pairs, unit, to);
      }
    }
  }

 private:
  // 16 bits: a unit is two columns of the four keys that a lane has in a step.
  static constexpr int kUnits = sizeof(T) == 4 ? 1 : kKeys / 4 * (kWidth / 2) / kThreads;
  static constexpr int kPairs = kWidth / 2;

  static ATTN_DEVICE int quad(int unit) {
    return unit * (kThreads / kPairs) + threadIdx.x / kPairs;
  }
  static ATTN_DEVICE int column(int) { return 2 * (threadIdx.x % kPairs); }

  static ATTN_DEVICE void store(const uint32_t (&row)[4], int unit, uint32_t* to) {
    const int step = quad(unit) / 4, t = quad(unit) % 4, e = column(unit);
    store2(to + value_word<kWidth>(step, t, e, 0), lower(row[0], row[1]), lower(row[2], row[3]));
    store2(to + value_word<kWidth>(step, t, e + 1, 0), upper(row[0], row[1]),
           upper(row[2], row[3]));
  }
  static ATTN_DEVICE uint32_t lower(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
  static ATTN_DEVICE uint32_t upper(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

  // float32: a thread copies one column of every key, or of every other.
  static ATTN_DEVICE void copy(const Values<T>& from, int first_row, uint32_t* to) {
    constexpr int kStride = kThreads / kWidth;
    const int e = threadIdx.x % kWidth, first_key = threadIdx.x / kWidth;
    const T* source = from.row(first_row + first_key) + e * from.stride;
    const int left = from.first_column + e < from.E ? from.rows - first_row - first_key : 0;
    ATTN_UNROLL
    for (int key = 0; key < kKeys; key += kStride) {
      // key_of: step, lane and register of a key. A stride of 2 leaves the register to first_key.
      const int step = key / 16 * 2 + key / 2 % 2, t = key / 4 % 4;
      copy4_async(to + value_word<kWidth>(step, t, e, key % 2 + first_key), source, key < left);
      source += kStride * from.row_stride;
    }
  }

  uint32_t held_[kUnits][4];
};

// --- float32 as sums of two numbers of 11 bits; the product of the two small parts is left out.

ATTN_DEVICE uint32_t large_part(float x) {
  return float_bits(x) & 0xffffe000u;
}
ATTN_DEVICE uint32_t small_part(float x) {
  return float_bits(x - bits_float(large_part(x)));
}

// One step: products of weights of 32 queries with 16 columns.
template <int kKeys, int kColumns>
ATTN_DEVICE void multiply_floats(const Tile<kKeys>& weights, int step, const uint32_t* values,
                                 float (&sums)[2][kColumns / 8][4]) {
  uint32_t large[2][4], small[2][4];
  ATTN_UNROLL
  for (int m = 0; m < 2; ++m) {
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float weight = weights.at[m][step][i / 2 + 2 * (i % 2)];
      large[m][i] = large_part(weight);
      small[m][i] = small_part(weight);
    }
  }
  // Four groups of columns at once: sums that follow each other do not wait for each other.
  ATTN_UNROLL
  for (int n = 0; n < kColumns / 8; n += 4) {
    uint32_t large_value[4][2], small_value[4][2];
    ATTN_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const uint4 v = load4(values + (n + i) / 2 * 128);
      const float words[4] = {bits_float(v.x), bits_float(v.y), bits_float(v.z), bits_float(v.w)};
      ATTN_UNROLL
      for (int c = 0; c < 4; ++c) {
        large_value[i + c / 2][c % 2] = large_part(words[c]);
        small_value[i + c / 2][c % 2] = small_part(words[c]);
      }
    }
    ATTN_UNROLL
    for (int i = 0; i < 8; ++i) mma_tf32(sums[i % 2][n + i / 2], small[i % 2], large_value[i / 2]);
    ATTN_UNROLL
    for (int i = 0; i < 8; ++i) mma_tf32(sums[i % 2][n + i / 2], large[i % 2], small_value[i / 2]);
    ATTN_UNROLL
    for (int i = 0; i < 8; ++i) mma_tf32(sums[i % 2][n + i / 2], large[i % 2], large_value[i / 2]);
  }
}

// --- 16 bits: weights are rounded to the dtype of the values.

template <class T, int kKeys, int kColumns>
ATTN_DEVICE void multiply_halves(const Tile<kKeys>& weights, int step, const uint32_t* values,
                                 float (&sums)[2][kColumns / 8][4]) {
  uint32_t a[2][4];
  ATTN_UNROLL
  for (int m = 0; m < 2; ++m) {
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&of)[4] = weights.at[m][2 * step + i / 2];
      a[m][i] = pack<T>(of[i % 2 * 2], of[i % 2 * 2 + 1]);
    }
  }
  ATTN_UNROLL
  for (int n = 0; n < kColumns / 8; n += 2) {
    const uint4 v = load4(values + n / 2 * 128);
    const uint32_t words[2][2] = {{v.x, v.y}, {v.z, v.w}};
    ATTN_UNROLL
    for (int i = 0; i < 2; ++i) {
      ATTN_UNROLL
      for (int m = 0; m < 2; ++m) {
        if constexpr (std::is_same_v<T, Half>) {
          mma_half(sums[m][n + i], a[m], words[i]);
        } else {
          mma_bfloat(sums[m][n + i], a[m], words[i]);
        }
      }
    }
  }
}

// out = out * keep + weights * values. A tile's product is summed on its own: the matrix units
// round towards zero, which over thousands of steps into one sum would show in float32.
template <class T, int kKeys, int kWidth, int kColumns>
ATTN_DEVICE void multiply_values(const Tile<kKeys>& weights, const uint32_t* values,
                                 const float (&keep)[4], float (&out)[2][kWidth / 8][4]) {
  constexpr int kSteps = kKeys / kStepKeys<T>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  values += 4 * unit_place(g, t);
  ATTN_UNROLL
  for (int first = 0; first < kWidth / 8; first += kColumns / 8) {
    float sums[2][kColumns / 8][4] = {};
    ATTN_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t* fragments = values + (step * (kWidth / 16) + first / 2) * 128;
      if constexpr (sizeof(T) == 4) {
        multiply_floats<kKeys, kColumns>(weights, step, fragments, sums);
      } else {
        multiply_halves<T, kKeys, kColumns>(weights, step, fragments, sums);
      }
    }
    ATTN_UNROLL
    for (int m = 0; m < 2; ++m) {
      ATTN_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        ATTN_UNROLL
        for (int c = 0; c < 4; ++c) {
          float& x = out[m][first + n][c];
          x = fmaf(x, keep[2 * m + c / 2], sums[m][n][c]);
        }
      }
    }
  }
}

}  // namespace attn::cuda::l1

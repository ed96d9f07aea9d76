// Products on the tile registers of AMX, 32 x 32 results at a time.
//
// Left operands are rows of bfloat16 at a pitch. Right operands are panels of 32 columns,
// [columns / 32][depth / 2][32], whose elements are pairs of bfloat16: the lower half belongs to an
// even k, the upper half to the k after it. Depths are multiples of 32, padded with zeros.
#pragma once

namespace attn::linear::ATTN_ISA {

using Pair = uint32_t;
constexpr int kBlock = 32;
constexpr int kHalfPitch = 288;               // of rows of bfloat16: an odd number of cache lines
constexpr int kTokenPitch = kChunk + kBlock;  // of rows over the tokens of a chunk
static_assert(kPanel<float> == kBlock && kChunk % kBlock == 0);

// The tile registers belong to this thread as long as this object lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

struct HalfProduct {
  const uint16_t* left;
  int64_t pitch;
  const Pair* panel;
  int64_t depth;
};

ATTN_INLINE void multiply_tiles(const HalfProduct& product) {
  const uint16_t* left = product.left;
  const Pair* panel = product.panel;
  const int64_t row_bytes = product.pitch * 2;
  for (int64_t k = 0; k < product.depth; k += 32, left += 32, panel += 16 * kBlock) {
    _tile_loadd(4, left, row_bytes);
    _tile_loadd(5, left + 16 * product.pitch, row_bytes);
    _tile_loadd(6, panel, kBlock * 4);
    _tile_loadd(7, panel + 16, kBlock * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

ATTN_INLINE void store_tiles(float* target, int64_t pitch) {
  _tile_stored(0, target, pitch * 4);
  _tile_stored(1, target + 16, pitch * 4);
  _tile_stored(2, target + 16 * pitch, pitch * 4);
  _tile_stored(3, target + 16 * pitch + 16, pitch * 4);
}

// target = first + second, 32 x 32 elements at a pitch
inline void multiply_half(float* target, int64_t pitch, const HalfProduct& first,
                          const HalfProduct& second = {nullptr, 0, nullptr, 0}) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  multiply_tiles(first);
  multiply_tiles(second);
  store_tiles(target, pitch);
}

// target += product
inline void accumulate_half(float* target, int64_t pitch, const HalfProduct& product) {
  _tile_loadd(0, target, pitch * 4);
  _tile_loadd(1, target + 16, pitch * 4);
  _tile_loadd(2, target + 16 * pitch, pitch * 4);
  _tile_loadd(3, target + 16 * pitch + 16, pitch * 4);
  multiply_tiles(product);
  store_tiles(target, pitch);
}

using Words = Simd<float>::Bits;
typedef uint16_t HalfWords __attribute__((vector_size(ATTN_VECTOR_BYTES / 2)));

ATTN_INLINE Words widen_words(const uint16_t* words) {
  HalfWords half;
  __builtin_memcpy(&half, words, sizeof(half));
  return __builtin_convertvector(half, Words);
}

ATTN_INLINE Vec<float> widen_half(const uint16_t* words) {
  return (Vec<float>)(widen_words(words) << 16);
}

ATTN_INLINE HalfWords round_half(Vec<float> x) {
  return (HalfWords)_mm512_cvtneps_pbh((__m512)x);
}

ATTN_INLINE void store_half(uint16_t* target, Vec<float> x) {
  const HalfWords half = round_half(x);
  __builtin_memcpy(target, &half, sizeof(half));
}

ATTN_INLINE void store_pairs(Pair* target, Words even, Words odd) {
  const Words pairs = even | (odd << 16);
  __builtin_memcpy(target, &pairs, sizeof(pairs));
}

// Rows [count, width] as they are stored, zeros behind them up to whole blocks.
inline void load_half_rows(uint16_t* rows, const View& v, int64_t batch, int64_t head,
                           int64_t first, int64_t count, int64_t width) {
  const int64_t end = round_up(width, kBlock);
  const auto* source = static_cast<const uint16_t*>(v.data) + batch * v.stride[0] +
                       head * v.stride[1] + first * v.stride[2];
  for (int64_t r = 0; r < count; ++r, rows += kHalfPitch, source += v.stride[2]) {
    if (v.stride[3] == 1) {
      std::memcpy(rows, source, width * sizeof(uint16_t));
    } else {
      for (int64_t d = 0; d < width; ++d) rows[d] = source[d * v.stride[3]];
    }
    std::fill(rows + width, rows + end, uint16_t{0});
  }
  for (int64_t r = count; r < round_up(count, kBlock); ++r, rows += kHalfPitch) {
    std::fill(rows, rows + end, uint16_t{0});
  }
}

// Right operand of products over the width, from rows of tokens.
inline void pack_half_columns(Pair* panels, const uint16_t* rows, int64_t count, int64_t width) {
  const int64_t pairs = round_up(width, kBlock) / 2;
  const auto* source = reinterpret_cast<const float*>(rows);  // pairs are moved as they are
  for (int64_t n = 0; n < count; n += kBlock) {
    auto* panel = reinterpret_cast<float*>(panels + n * pairs);
    for (int64_t k = 0; k < pairs; k += 16) {
      for (int64_t half = 0; half < kBlock; half += 16) {
        transpose_square<float>(panel + k * kBlock + half,
                                source + (n + half) * (kHalfPitch / 2) + k, kHalfPitch / 2);
      }
    }
  }
}

// Right operand of products over tokens, from rows of tokens.
inline void pack_half_rows(Pair* panels, const uint16_t* rows, int64_t count, int64_t width) {
  constexpr int64_t panel_size = kChunk / 2 * kBlock;
  for (int64_t n = 0; n < round_up(count, kBlock); n += 2) {
    const uint16_t* row = rows + n * kHalfPitch;
    for (int64_t d = 0; d < round_up(width, kBlock); d += 16) {
      store_pairs(panels + d / kBlock * panel_size + n / 2 * kBlock + d % kBlock,
                  widen_words(row + d), widen_words(row + kHalfPitch + d));
    }
  }
}

// Right operand of products over the rows of a matrix in float32.
inline void pack_half_matrix(Pair* panels, const Panels<float>& shape, const float* data,
                             int64_t rows) {
  const int64_t pairs = round_up(rows, kBlock) / 2;
  for (int64_t column = 0; column < shape.columns; column += kBlock) {
    const float* source = data + shape.at(0, column);
    for (int64_t k = 0; k < pairs; ++k, source += 2 * kBlock, panels += kBlock) {
      for (int half = 0; half < kBlock; half += 16) {
        const HalfWords even = round_half(load(source + half));
        const HalfWords odd = round_half(load(source + kBlock + half));
        store_pairs(panels + half, __builtin_convertvector(even, Words),
                    __builtin_convertvector(odd, Words));
      }
    }
  }
}

// body(target, products) for the rows [width][tokens] that are the left operand of products over
// tokens, from what pack_half_columns made, times a factor per token.
template <class Body>
ATTN_INLINE void for_each_split(uint16_t* rows, const Pair* panels, const float* factors,
                                int64_t count, int64_t width, const Body& body) {
  const int64_t pairs = round_up(width, kBlock) / 2;
  for (int64_t n = 0; n < round_up(count, kBlock); n += 16) {
    const Vec<float> factor = load(factors + n);
    const Pair* panel = panels + n / kBlock * pairs * kBlock + n % kBlock;
    for (int64_t k = 0; k < pairs; ++k, panel += kBlock) {
      Words both;
      __builtin_memcpy(&both, panel, sizeof(both));
      uint16_t* row = rows + 2 * k * kTokenPitch + n;
      body(row, (Vec<float>)(both << 16) * factor);
      body(row + kTokenPitch, (Vec<float>)(both & 0xFFFF0000u) * factor);
    }
  }
}

inline void split_columns(uint16_t* rows, const Pair* panels, const float* factors, int64_t count,
                          int64_t width) {
  for_each_split(rows, panels, factors, count, width,
                 [](uint16_t* target, Vec<float> x) ATTN_INLINE_LAMBDA { store_half(target, x); });
}

// The same of what split_columns loses in rounding.
inline void split_rests(uint16_t* rows, const Pair* panels, const float* factors, int64_t count,
                        int64_t width) {
  for_each_split(rows, panels, factors, count, width,
                 [](uint16_t* target, Vec<float> x) ATTN_INLINE_LAMBDA {
                   const Words rounded = __builtin_convertvector(round_half(x), Words);
                   store_half(target, x - (Vec<float>)(rounded << 16));
                 });
}

// sum = factor * sum + sum over tokens of weight * row
inline void update_half_sum(float* sum, float factor, const uint16_t* rows, const float* weights,
                            int64_t count, int64_t width) {
  for (int64_t d = 0; d < round_up(width, kBlock); d += kBlock) {
    Vec<float> low{}, high{};
    for (int64_t r = 0; r < count; ++r) {
      const Vec<float> weight = splat(weights[r]);
      low += widen_half(rows + r * kHalfPitch + d) * weight;
      high += widen_half(rows + r * kHalfPitch + d + 16) * weight;
    }
    store(sum + d, load(sum + d) * splat(factor) + low);
    store(sum + d + 16, load(sum + d + 16) * splat(factor) + high);
  }
}

// panels += leftᵀ-like products over tokens: [rows of left] x [columns of right]
inline void update_half_matrix(const Panels<float>& shape, float* data, int64_t rows, float factor,
                               const uint16_t* left, const Pair* right, int64_t count,
                               Prefetch& ahead) {
  for (int64_t column = 0; column < shape.columns; column += kBlock) {
    for (int64_t row = 0; row < rows; row += kBlock) {
      ahead.step();
      ahead.step();
      float* target = data + shape.at(row, column);
      for (int64_t i = 0; i < kBlock * kBlock && factor != 1; i += 16) {
        store(target + i, load(target + i) * splat(factor));
      }
      accumulate_half(target, kBlock,
                      {left + row * kTokenPitch, kTokenPitch, right + column * (kChunk / 2),
                       round_up(count, kBlock)});
    }
  }
}

}  // namespace attn::linear::ATTN_ISA

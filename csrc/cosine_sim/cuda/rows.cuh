// Rows of 16-bit numbers, in registers and in tiles that the copy engine has brought; rings of
// tiles.
#pragma once

#include "common/cuda/hopper.cuh"

namespace attn::cuda::cosine {

constexpr double kBitsPerNat = 1.4426950408889634;

// Two neighbours as a word, the first in its low half.
ATTN_DEVICE float2 unpack(uint32_t x, BFloat) {
  return make_float2(bits_float(x << 16), bits_float(x & 0xffff0000u));
}
ATTN_DEVICE float2 unpack(uint32_t x, Half) {
  return make_float2(low_half(x), high_half(x));
}
ATTN_DEVICE uint32_t pack(float low, float high, BFloat) {
  return pack_bfloat(low, high);
}
ATTN_DEVICE uint32_t pack(float low, float high, Half) {
  return pack_half(low, high);
}

// 1 / max(|x|, 1e-12), and 0 of zero.
ATTN_DEVICE float inverse_length(float squared) {
  return squared > 0.0f ? fminf(rsqrtf(squared), 1e12f) : 0.0f;
}

// A tile [kPanels][kRows][64] of rows, from column `first` on: zeros for what is past the end.
template <int kPanels, int kRows>
ATTN_DEVICE void load_tile(unsigned char* to, const TensorMap* map, uint64_t* arrived, int row,
                           int head, int batch, int first = 0) {
  ATTN_UNROLL
  for (int i = 0; i < kPanels; ++i) {
    load_panel(to + i * kRows * 128, map, arrived, first + 64 * i, row, head, batch);
  }
}

// 16 bytes of a row of a tile.
template <int kRows>
ATTN_DEVICE uint32_t* piece(unsigned char* tile, int row, int i) {
  return reinterpret_cast<uint32_t*>(tile + (i / 8 * kRows + row) * 128 + ((i % 8 ^ row % 8) * 16));
}

// sum + |x|^2 of 8 elements.
template <class T>
ATTN_DEVICE float squares(uint4 x, float sum) {
  const float2 a = unpack(x.x, T{}), b = unpack(x.y, T{}), c = unpack(x.z, T{}),
               d = unpack(x.w, T{});
  sum += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
  return sum + (c.x * c.x + c.y * c.y + d.x * d.x + d.y * d.y);
}

// Of 8 elements.
template <class T>
ATTN_DEVICE float dot(uint4 x, uint4 y) {
  const float2 a = unpack(x.x, T{}), b = unpack(x.y, T{}), c = unpack(x.z, T{}),
               d = unpack(x.w, T{});
  const float2 e = unpack(y.x, T{}), f = unpack(y.y, T{}), g = unpack(y.z, T{}),
               h = unpack(y.w, T{});
  return a.x * e.x + a.y * e.y + b.x * f.x + b.y * f.y +
         (c.x * g.x + c.y * g.y + d.x * h.x + d.y * h.y);
}

template <class T>
ATTN_DEVICE uint32_t scaled(uint32_t x, float factor) {
  const float2 pair = unpack(x, T{});
  return pack(pair.x * factor, pair.y * factor, T{});
}

// Word j of lane i, of four neighbours, becomes word i of lane j.
ATTN_DEVICE void swap_lanes(uint32_t& x, uint32_t& y, bool bit, int mask) {
  const uint32_t other = shuffle_xor(bit ? x : y, mask);
  (bit ? x : y) = other;
}
ATTN_DEVICE void transpose_lanes(uint32_t (&x)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  swap_lanes(x[0], x[1], odd, 1);
  swap_lanes(x[2], x[3], odd, 1);
  swap_lanes(x[0], x[2], upper, 2);
  swap_lanes(x[1], x[3], upper, 2);
}

// A place in a ring of kSize buffers, and the parity of its barriers' current phase.
template <int kSize>
struct Ring {
  int index = 0;
  uint32_t parity = 0;

  ATTN_DEVICE void advance() {
    if (++index == kSize) {
      index = 0;
      parity ^= 1;
    }
  }
};

}  // namespace attn::cuda::cosine

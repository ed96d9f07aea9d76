// How the forward holds float32: on a grid, or as it is, the same for a whole head.
//
// On a grid: x becomes kOrigin + x * up, a float between 2^23 and 2^24, whose last bit is 1. So
// differences are those of the floats and of their bits as well, and a distance is summed either
// by two additions per element or by one instruction on integers (grid.cuh).
//
// The price: x is rounded to a multiple of `down`, which is 2^-21 of the power of two below the
// largest |x|. A difference is off by less than `down`, by 0.41 of it on average (the root of the
// mean square), and a score by 0.41 * |scale| * down * sqrt(D): with kGridError at most 8e-7, and
// 4e-6 at five deviations. Rounding may do 16 eps (1 + |score|) = 1.9e-6 (1 + |score|) to it in
// the tests. Equal numbers stay equal.
//
// As it is: where the grid would be coarser, or numbers are not finite.
#pragma once

#include "l1/cuda/prepass.cuh"

namespace attn::cuda::l1 {

constexpr float kOrigin = 12582912.0f;  // 1.5 * 2^23
// Normal numbers (largest 4 to 8) with the default scale are just within it.
constexpr float kGridError = 0x1p-19f;
// Narrower rows have small scores, in which the same error shows more, and little to gain.
constexpr int kGridWidth = 64;

struct Range {
  float up, origin;  // a number is held as x * up + origin
  float down;        // distances are multiplied by it
  bool grid;
};

// Near 0 an inverse distance shows any error. Integers hold a sum of 2^9 differences; D is at most
// 2^8.
ATTN_HOST_DEVICE bool may_use_grid(const Problem& p) {
  return !p.inverse && p.D >= kGridWidth;
}

// All 32 lanes take part.
ATTN_DEVICE Range range_of(const Problem& p, int b, int hk) {
  constexpr Range kAsItIs = {1.0f, 0.0f, 1.0f, false};
  if (!may_use_grid(p)) return kAsItIs;
  const float largest = largest_of(p, b, hk);
  const int exponent = static_cast<int>(float_bits(largest) >> 23) - 127;
  int shift = 21 - exponent;  // |x| * up < 2^22
  shift = shift < 126 ? shift : 126;
  const float up = bits_float(static_cast<uint32_t>(127 + shift) << 23);
  const float down = bits_float(static_cast<uint32_t>(127 - shift) << 23);
  const float error = fabsf(p.scale) * down * sqrtf(static_cast<float>(p.D));
  if (largest < INFINITY && error <= kGridError) {
    return {up, kOrigin, down, true};
  }
  return kAsItIs;
}

}  // namespace attn::cuda::l1

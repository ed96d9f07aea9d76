// The names of csrc/common/cuda/device.cuh on a CPU: the threads of a block are fibers.
//
// Blocks run one after the other, in order. A thread runs until it waits for others. What a GPU
// would leave undefined is made visible: shared memory starts as NaN, asynchronous copies arrive
// only when they are waited for, misaligned vectors and barriers that not all threads reach abort.
#pragma once

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define ATTN_DEVICE inline
#define ATTN_HOST_DEVICE inline
#define ATTN_UNROLL

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

namespace attn::cuda {

#define threadIdx (::attn::cuda::emulator::block()->current->index)
#define blockIdx (::attn::cuda::emulator::block()->index)
#define blockDim (::attn::cuda::emulator::block()->size)
#define gridDim (::attn::cuda::emulator::block()->grid)

// --- the block

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::block()->shared.data());
}

template <class T>
T shuffle(T x, int lane) {
  T all[emulator::kWarp];
  emulator::exchange(x, all);
  return all[lane % emulator::kWarp];
}
template <class T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, static_cast<int>(threadIdx.x % emulator::kWarp) ^ mask);
}
inline void sync_warp() {
  emulator::wait(emulator::block()->warps[threadIdx.x / emulator::kWarp].barrier);
}
inline bool any(bool x) {
  bool all[emulator::kWarp];
  emulator::exchange(x, all);
  for (bool one : all) {
    if (one) return true;
  }
  return false;
}

// --- numbers

struct Half {
  _Float16 value;
};
struct BFloat {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline float bits_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

inline float to_float(float x) {
  return x;
}
inline float to_float(Half x) {
  return static_cast<float>(x.value);
}
inline float to_float(BFloat x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Half from_float<Half>(float x) {
  return {static_cast<_Float16>(x)};
}
template <>
inline BFloat from_float<BFloat>(float x) {
  const uint32_t y = float_bits(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((y + 0x7fff + ((y >> 16) & 1)) >> 16)};
}

inline float fast_exp2(float x) {
  return std::exp2(x);
}
inline float multiply_rounded(float a, float b) {
  return a * b;
}
inline float add_rounded(float a, float b) {
  return a + b;
}
inline float fma_saturate(float a, float b, float c) {
  const float x = std::fma(a, b, c);
  return x > 0 ? std::fmin(x, 1.0f) : 0.0f;  // NaN gives 0, as on the GPU
}
inline uint32_t add_absolute_difference(uint32_t a, uint32_t b, uint32_t sum) {
  return sum + (a > b ? a - b : b - a);
}

// --- packed halves

inline uint16_t half_bits(_Float16 x) {
  uint16_t y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline _Float16 half_of(uint32_t x) {
  const uint16_t low = static_cast<uint16_t>(x);
  _Float16 y;
  std::memcpy(&y, &low, sizeof(y));
  return y;
}
template <class F>
uint32_t pairwise(uint32_t a, uint32_t b, F f) {
  const uint32_t low = half_bits(f(half_of(a), half_of(b)));
  return low | static_cast<uint32_t>(half_bits(f(half_of(a >> 16), half_of(b >> 16)))) << 16;
}
inline uint32_t pack_half(float low, float high) {
  return half_bits(static_cast<_Float16>(low)) |
         static_cast<uint32_t>(half_bits(static_cast<_Float16>(high))) << 16;
}
inline uint32_t pack_bfloat(float low, float high) {
  return from_float<BFloat>(low).bits | static_cast<uint32_t>(from_float<BFloat>(high).bits) << 16;
}
inline float low_half(uint32_t x) {
  return static_cast<float>(half_of(x));
}
inline float high_half(uint32_t x) {
  return static_cast<float>(half_of(x >> 16));
}
inline uint32_t add_half2(uint32_t a, uint32_t b) {
  return pairwise(a, b, [](_Float16 x, _Float16 y) { return static_cast<_Float16>(x + y); });
}
inline uint32_t sub_half2(uint32_t a, uint32_t b) {
  return pairwise(a, b, [](_Float16 x, _Float16 y) { return static_cast<_Float16>(x - y); });
}
inline uint32_t add_abs_half2(uint32_t a, uint32_t b) {
  return add_half2(a, b & 0x7fff7fff);
}
inline uint32_t add_both_abs_half2(uint32_t a, uint32_t b) {
  return add_half2(a & 0x7fff7fff, b & 0x7fff7fff);
}
inline uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  // A product of halves is exact in double, so is nearly every sum: rounded once.
  const auto one = [](uint32_t x, uint32_t y, uint32_t z) {
    return static_cast<_Float16>(static_cast<double>(half_of(x)) * static_cast<double>(half_of(y)) +
                                 static_cast<double>(half_of(z)));
  };
  return half_bits(one(a, b, c)) | static_cast<uint32_t>(half_bits(one(a >> 16, b >> 16, c >> 16)))
                                       << 16;
}
inline uint32_t greater_half2(uint32_t a, uint32_t b) {
  return pairwise(a, b, [](_Float16 x, _Float16 y) { return static_cast<_Float16>(x > y); });
}
inline uint32_t greater_equal_half2(uint32_t a, uint32_t b) {
  return pairwise(a, b, [](_Float16 x, _Float16 y) { return static_cast<_Float16>(x >= y); });
}

// --- matrix units

inline uint32_t to_tf32(float x) {
  return (float_bits(x) + 0x1000) & 0xffffe000;
}

struct Operands {
  uint32_t a[4];
  uint32_t b[2];
};

// element(register, part) of a fragment; `parts` elements stand in one register.
template <class Element>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int parts,
              Element element) {
  Operands mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  Operands all[emulator::kWarp];
  emulator::exchange(mine, all);
  const int lane = static_cast<int>(threadIdx.x % emulator::kWarp);
  for (int i = 0; i < 4; ++i) {
    const int row_half = i / 2;
    const int column = 2 * (lane % 4) + i % 2;
    double sum = c[i];
    for (int half = 0; half < 2; ++half) {
      for (int t = 0; t < 4; ++t) {
        const uint32_t x = all[lane / 4 * 4 + t].a[2 * half + row_half];
        const uint32_t y = all[column * 4 + t].b[half];
        for (int part = 0; part < parts; ++part) {
          sum += static_cast<double>(element(x, part)) * static_cast<double>(element(y, part));
        }
      }
    }
    c[i] = static_cast<float>(sum);
  }
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(c, a, b, 1, [](uint32_t x, int) { return bits_float(x & 0xffffe000); });
}
inline void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(c, a, b, 2,
           [](uint32_t x, int part) { return static_cast<float>(half_of(x >> (16 * part))); });
}
inline void mma_bfloat(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(c, a, b, 2,
           [](uint32_t x, int part) { return bits_float(part == 0 ? x << 16 : x & 0xffff0000); });
}

// --- memory

inline float4 load4(const float* from) {
  emulator::check_aligned(from, 16);
  return *reinterpret_cast<const float4*>(from);
}
inline float4 load4_past_l1(const float* from) {
  return load4(from);
}
inline uint4 load4(const uint32_t* from) {
  emulator::check_aligned(from, 16);
  return *reinterpret_cast<const uint4*>(from);
}
inline void store4(float* to, float4 x) {
  emulator::check_aligned(to, 16);
  *reinterpret_cast<float4*>(to) = x;
}
inline void store4(uint32_t* to, uint4 x) {
  emulator::check_aligned(to, 16);
  *reinterpret_cast<uint4*>(to) = x;
}
inline void store2(uint32_t* to, uint32_t x, uint32_t y) {
  emulator::check_aligned(to, 8);
  *reinterpret_cast<uint2*>(to) = make_uint2(x, y);
}
template <class Word>
void exchange_matrices(uint32_t (&r)[4], const uint32_t* row, Word word) {
  emulator::check_aligned(row, 16);
  const uint32_t* rows[emulator::kWarp];
  emulator::exchange(row, rows);
  for (int j = 0; j < 4; ++j) r[j] = word(rows + 8 * j);
}
inline void load_matrices(uint32_t (&r)[4], const uint32_t* row) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  exchange_matrices(r, row, [&](const uint32_t* const* rows) { return rows[g][t]; });
}
inline void load_matrices_transposed(uint32_t (&r)[4], const uint32_t* row) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  exchange_matrices(r, row, [&](const uint32_t* const* rows) {
    const uint32_t low = rows[2 * t][g / 2] >> (16 * (g % 2));
    return (low & 0xffff) | rows[2 * t + 1][g / 2] >> (16 * (g % 2)) << 16;
  });
}
inline void store4_streaming(float* to, float4 x) {
  store4(to, x);
}

inline void copy_async(void* to, const void* from, size_t bytes, bool valid) {
  emulator::check_aligned(to, bytes);
  if (valid) emulator::check_aligned(from, bytes);
  emulator::block()->current->open.push_back({to, from, bytes, valid});
}
inline void copy16_async(void* to, const void* from, bool valid) {
  copy_async(to, from, 16, valid);
}
inline void copy4_async(void* to, const void* from, bool valid) {
  copy_async(to, from, 4, valid);
}
inline void copies_commit() {
  emulator::Fiber* self = emulator::block()->current;
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}
template <int N>
void copies_wait() {
  auto& groups = emulator::block()->current->groups;
  while (groups.size() > N) {
    for (const emulator::Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    groups.pop_front();
  }
}

inline void atomic_add(float* to, float x) {
  *to += x;
}
inline void atomic_add4(float* to, float4 x) {
  emulator::check_aligned(to, 16);
  to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
}
inline int atomic_add(int* to, int x) {
  const int old = *to;
  *to += x;
  return old;
}
inline void atomic_max(float* to, float x) {
  *to = std::fmax(*to, x);
}
inline int load_acquire(const int* from) {
  return *from;
}
inline void store_release(int* to, int x) {
  *to = x;
}

}  // namespace attn::cuda

inline void __syncthreads() {
  attn::cuda::emulator::wait(attn::cuda::emulator::block()->barrier);
}

// The instructions that CUDA kernels use, under names that also exist without CUDA.
//
// nvcc compiles the real ones. A C++ compiler with ATTN_EMULATE takes tests/cuda/emulated.h, which
// runs a block's threads as fibers on the CPU: the kernels are tested where there is no GPU.
// Packed 16-bit pairs and matrix fragments are uint32_t registers; the first of a pair is the low
// half.
#pragma once

#include <cstdint>

#ifdef ATTN_EMULATE
#include "emulated.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ATTN_DEVICE __device__ __forceinline__
#define ATTN_HOST_DEVICE __host__ __device__ __forceinline__
#define ATTN_UNROLL _Pragma("unroll")

namespace attn::cuda {

using Half = __half;
using BFloat = __nv_bfloat16;

// --- the block

// All dynamic shared memory of the block, 16-byte aligned.
template <class T>
ATTN_DEVICE T* shared_memory() {
  extern __shared__ float4 attn_shared_memory[];
  return reinterpret_cast<T*>(attn_shared_memory);
}

// The value of the lane whose number differs by `mask`; all 32 lanes take part.
template <class T>
ATTN_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

template <class T>
ATTN_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

ATTN_DEVICE void sync_warp() {
  __syncwarp();
}

// True if it holds in any thread of the warp.
ATTN_DEVICE bool any(bool x) {
  return __any_sync(0xffffffffu, x);
}

// --- numbers

ATTN_DEVICE float to_float(float x) {
  return x;
}
ATTN_DEVICE float to_float(Half x) {
  return __half2float(x);
}
ATTN_DEVICE float to_float(BFloat x) {
  return __bfloat162float(x);
}

template <class T>
ATTN_DEVICE T from_float(float x);
template <>
ATTN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
ATTN_DEVICE Half from_float<Half>(float x) {
  return __float2half_rn(x);
}
template <>
ATTN_DEVICE BFloat from_float<BFloat>(float x) {
  return __float2bfloat16_rn(x);
}

// 2^x to 2 ulp; 2^-inf is 0.
ATTN_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Never fused into one operation.
ATTN_DEVICE float multiply_rounded(float a, float b) {
  return __fmul_rn(a, b);
}
ATTN_DEVICE float add_rounded(float a, float b) {
  return __fadd_rn(a, b);
}

// a * b + c, clamped to [0, 1].
ATTN_DEVICE float fma_saturate(float a, float b, float c) {
  return __saturatef(__fmaf_rn(a, b, c));
}

ATTN_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}
ATTN_DEVICE float bits_float(uint32_t x) {
  return __uint_as_float(x);
}

// sum + |a - b| of integers without a sign: one instruction.
ATTN_DEVICE uint32_t add_absolute_difference(uint32_t a, uint32_t b, uint32_t sum) {
  return __usad(a, b, sum);
}

// --- packed halves

ATTN_DEVICE uint32_t bits(__half2 x) {
  return *reinterpret_cast<uint32_t*>(&x);
}
ATTN_DEVICE __half2 half2_of(uint32_t x) {
  return *reinterpret_cast<__half2*>(&x);
}

ATTN_DEVICE uint32_t pack_half(float low, float high) {
  return bits(__floats2half2_rn(low, high));
}
ATTN_DEVICE uint32_t pack_bfloat(float low, float high) {
  __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&x);
}
ATTN_DEVICE float low_half(uint32_t x) {
  return __low2float(half2_of(x));
}
ATTN_DEVICE float high_half(uint32_t x) {
  return __high2float(half2_of(x));
}

ATTN_DEVICE uint32_t add_half2(uint32_t a, uint32_t b) {
  return bits(__hadd2(half2_of(a), half2_of(b)));
}
ATTN_DEVICE uint32_t sub_half2(uint32_t a, uint32_t b) {
  return bits(__hsub2(half2_of(a), half2_of(b)));
}
// a + |b|: one instruction.
ATTN_DEVICE uint32_t add_abs_half2(uint32_t a, uint32_t b) {
  return bits(__hadd2(half2_of(a), __habs2(half2_of(b))));
}
// |a| + |b|: one instruction.
ATTN_DEVICE uint32_t add_both_abs_half2(uint32_t a, uint32_t b) {
  return bits(__hadd2(__habs2(half2_of(a)), __habs2(half2_of(b))));
}
ATTN_DEVICE uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  return bits(__hfma2(half2_of(a), half2_of(b), half2_of(c)));
}
// 1 where it holds, else 0.
ATTN_DEVICE uint32_t greater_half2(uint32_t a, uint32_t b) {
  return bits(__hgt2(half2_of(a), half2_of(b)));
}
ATTN_DEVICE uint32_t greater_equal_half2(uint32_t a, uint32_t b) {
  return bits(__hge2(half2_of(a), half2_of(b)));
}

// --- matrix units. Fragments of mma.sync, g = lane / 4, t = lane % 4:
//   a (16 x k): registers 0..3 hold rows g, g + 8, g, g + 8; registers 2 and 3 the second half of
//   k.
//     tf32: one element, column t (+ 4). 16 bits: a pair, columns 2t, 2t + 1 (+ 8).
//   b (k x 8): column g; rows as the columns of a.
//   c (16 x 8): c[0], c[1] = (g, 2t), (g, 2t + 1); c[2], c[3] the same of row g + 8.

// The 19 upper bits, rounded to nearest: what the matrix units read of a float.
ATTN_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// c += a b for 16 x 8 x 8.
ATTN_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b for 16 x 8 x 16.
ATTN_DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ATTN_DEVICE void mma_bfloat(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- memory. Vectors of 16 bytes must be aligned to 16.

ATTN_DEVICE float4 load4(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}
// What this thread has added by atomic_add4, too.
ATTN_DEVICE float4 load4_past_l1(const float* from) {
  return __ldcg(reinterpret_cast<const float4*>(from));
}
ATTN_DEVICE uint4 load4(const uint32_t* from) {
  return *reinterpret_cast<const uint4*>(from);
}
ATTN_DEVICE void store4(float* to, float4 x) {
  *reinterpret_cast<float4*>(to) = x;
}
ATTN_DEVICE void store4(uint32_t* to, uint4 x) {
  *reinterpret_cast<uint4*>(to) = x;
}
ATTN_DEVICE void store2(uint32_t* to, uint32_t x, uint32_t y) {
  *reinterpret_cast<uint2*>(to) = make_uint2(x, y);
}
// Four 8 x 4 matrices of words from shared memory: lane i gives the address of row i % 8 of matrix
// i / 8 (16 bytes, aligned); r[j] is the word of row g and column t of matrix j.
ATTN_DEVICE void load_matrices(uint32_t (&r)[4], const uint32_t* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// Four 8 x 8 matrices of 16 bits: r[j] is the pair of rows 2t, 2t + 1 in column g of matrix j.
ATTN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const uint32_t* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// Written once, read by nobody here: past the caches.
ATTN_DEVICE void store4_streaming(float* to, float4 x) {
  __stcs(reinterpret_cast<float4*>(to), x);
}

// Copies 16 bytes to shared memory in the background; zeros if not `valid`.
ATTN_DEVICE void copy16_async(void* to, const void* from, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
ATTN_DEVICE void copy4_async(void* to, const void* from, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(address), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
// Closes a group of this thread's copies.
ATTN_DEVICE void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N groups of this thread are under way.
template <int N>
ATTN_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

ATTN_DEVICE void atomic_add(float* to, float x) {
  atomicAdd(to, x);
}
// Four neighbours, aligned to 16 bytes: one transaction from sm_90 on.
ATTN_DEVICE void atomic_add4(float* to, float4 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(to), x);
#else
  atomicAdd(to, x.x);
  atomicAdd(to + 1, x.y);
  atomicAdd(to + 2, x.z);
  atomicAdd(to + 3, x.w);
#endif
}
// Returns what was there.
ATTN_DEVICE int atomic_add(int* to, int x) {
  return atomicAdd(to, x);
}
ATTN_DEVICE void atomic_max(float* to, float x) {  // of numbers that are not negative
  atomicMax(reinterpret_cast<int*>(to), __float_as_int(x));
}
// A flag in global memory: what was written before a release is seen after the acquire.
ATTN_DEVICE int load_acquire(const int* from) {
  int x;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
ATTN_DEVICE void store_release(int* to, int x) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

}  // namespace attn::cuda

#endif

// Hopper's own instructions under names that also exist without CUDA (emulated_hopper.h).
#pragma once

#include "common/cuda/device.cuh"

// Code for sm_90a, whose instructions no other GPU has: kernels are empty without it.
#if defined(ATTN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ATTN_HOPPER
#endif

#ifdef ATTN_EMULATE
#include "emulated_hopper.h"
#else

#include <cuda.h>

namespace attn::cuda {

using TensorMap = CUtensorMap;

// All dynamic shared memory, from an address that 128-byte swizzles need.
ATTN_DEVICE unsigned char* aligned_shared_memory() {
  extern __shared__ __align__(1024) unsigned char attn_aligned_shared_memory[];
  return attn_aligned_shared_memory;
}
ATTN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- barriers in shared memory: a phase ends with its last arrival and its last expected byte

ATTN_DEVICE void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Before other threads and the copy engine use new barriers; __syncthreads comes after it.
ATTN_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
ATTN_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
ATTN_DEVICE void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity is over; before the first phase ends, parity 1 is over.
ATTN_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity), "r"(0x989680)
      : "memory");
}

// True for one lane of a warp; all 32 take part.
ATTN_DEVICE bool one_lane() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}\n"
               : "=r"(chosen));
  return chosen != 0;
}

// --- some of the block's warps

ATTN_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ATTN_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- the copy engine

ATTN_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box of a map at (column, row, head, batch): rows of 128 bytes, swizzled.
ATTN_DEVICE void load_panel(void* to, const TensorMap* map, uint64_t* barrier, int column, int row,
                            int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}
// Bytes and both addresses are multiples of 16.
ATTN_DEVICE void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Ordinary stores of this thread become visible to the copy engine and the matrix units.
ATTN_DEVICE void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- matrix units of a warpgroup

// A panel of rows of 128 bytes, swizzled. K-major: `step` is not used. N-major: bytes to the panel
// of the next 64 columns.
ATTN_DEVICE uint64_t matrix(const void* start, uint32_t step) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | uint64_t{(step >> 4) & 0x3fff} << 16 |
         ((shared_address(start) & 0x3ffff) >> 4);
}

ATTN_DEVICE void products_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
ATTN_DEVICE void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
ATTN_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler moves no use of these registers across it: it knows nothing of products under way.
template <int kCount>
ATTN_DEVICE void keep_here(float (&x)[kCount]) {
  ATTN_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount>
ATTN_DEVICE void keep_here(uint32_t (&x)[kCount]) {
  ATTN_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// The same number, of which the compiler knows nothing: what is computed from it stays where it is.
ATTN_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

ATTN_DEVICE float2 load2(const float* from) {
  return *reinterpret_cast<const float2*>(from);
}
ATTN_DEVICE void store2(float* to, float2 x) {
  *reinterpret_cast<float2*>(to) = x;
}

// Four 8 x 8 matrices of 16 bits: lane i gives the address of row i % 8 of matrix i / 8; r[j] is
// the pair of row g and columns 2t, 2t + 1 of matrix j.
ATTN_DEVICE void store_matrices(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// --- a kernel that starts before the one before it has ended: see launch_after

// Until the kernel before has ended, and what it wrote is seen.
ATTN_DEVICE void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
ATTN_DEVICE void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

template <int kRegisters>
ATTN_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ATTN_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace attn::cuda

#include "common/cuda/wgmma.cuh"

#endif

// Scans by one block.
#pragma once

#include "common/cuda/hopper.cuh"

namespace attn::cuda::cosine {

constexpr int kScanThreads = 1024;  // of the one block that scans
constexpr int kScanBytes = kScanThreads * 4;

// Combines the numbers of all threads before; the last one, of all threads, is left in `total`.
template <class Combine>
ATTN_DEVICE int scan_before(int x, int none, int& total, Combine combine) {
  int* numbers = shared_memory<int>();
  const int thread = threadIdx.x;
  numbers[thread] = x;
  __syncthreads();
  for (int step = 1; step < kScanThreads; step *= 2) {
    const int other = thread >= step ? numbers[thread - step] : none;
    __syncthreads();
    x = combine(x, other);
    numbers[thread] = x;
    __syncthreads();
  }
  const int before = thread > 0 ? numbers[thread - 1] : none;
  total = numbers[kScanThreads - 1];
  __syncthreads();
  return before;
}

// The rows of a thread: neighbours.
struct Chunk {
  int begin, end;
};
ATTN_DEVICE Chunk chunk_of(int rows) {
  const int each = (rows + kScanThreads - 1) / kScanThreads, begin = threadIdx.x * each;
  return {begin, begin + each < rows ? begin + each : rows};
}

}  // namespace attn::cuda::cosine

// What rows see, found on the device: intervals of the keys that a mask leaves, in the order in
// which hidden keys come last, and of the queries that see a key.
#pragma once

#include "cosine_sim/cuda/band.cuh"
#include "cosine_sim/cuda/scan.cuh"

namespace attn::cuda::cosine {

struct VisibleFirst {
  const bool* mask;  // [B, N], true = may attend
  int N;
  int* order;   // [B, N]: visible keys, then those that are hidden
  int* before;  // [B, N + 1]: how many visible keys there are before each
};

__global__ void __launch_bounds__(kScanThreads)
    visible_first_kernel(const __grid_constant__ VisibleFirst p) {
  const int64_t batch = blockIdx.x;
  const bool* mask = p.mask + batch * p.N;
  int* order = p.order + batch * p.N;
  int* before = p.before + batch * (p.N + 1);
  const Chunk keys = chunk_of(p.N);
  int count = 0, total;
  for (int n = keys.begin; n < keys.end; ++n) count += mask[n];
  int seen = scan_before(count, 0, total, [](int x, int y) { return x + y; });
  for (int n = keys.begin; n < keys.end; ++n) {
    before[n] = seen;
    order[mask[n] ? seen : total + n - seen] = n;
    seen += mask[n];
  }
  if (threadIdx.x == 0) before[p.N] = total;
}

struct KeysSeen {
  Band band;
  const int* before;  // see VisibleFirst
  int *start, *stop;  // [B, M]
};

// A block has 256 queries of a batch.
__global__ void __launch_bounds__(256) keys_seen_kernel(const __grid_constant__ KeysSeen p) {
  const int query = blockIdx.x * 256 + threadIdx.x, keys = p.band.columns;
  if (query >= p.band.rows) return;
  const int* before = p.before + int64_t{blockIdx.y} * (keys + 1);
  const int64_t at = int64_t{blockIdx.y} * p.band.rows + query;
  p.start[at] = before[within(query + p.band.first, 0, keys)];
  p.stop[at] = before[within(query + p.band.past, 0, keys)];
}

struct QueriesSeeing {
  const int *start, *stop;  // [B, M], of queries
  int M, N;
  int *first, *past;  // [B, N]
};

// How many of x, which never decreases, are at most n.
ATTN_DEVICE int count_up_to(const int* x, int size, int n) {
  int low = 0, high = size;
  while (low < high) {
    const int middle = (low + high) / 2;
    const bool more = x[middle] <= n;
    low = more ? middle + 1 : low, high = more ? high : middle;
  }
  return low;
}

// A block has 256 keys of a batch, each seen from the first query whose stop is behind it, up to
// the first whose start is.
__global__ void __launch_bounds__(256)
    queries_seeing_kernel(const __grid_constant__ QueriesSeeing p) {
  const int key = blockIdx.x * 256 + threadIdx.x;
  if (key >= p.N) return;
  const int64_t batch = blockIdx.y;
  p.first[batch * p.N + key] = count_up_to(p.stop + batch * p.M, p.M, key);
  p.past[batch * p.N + key] = count_up_to(p.start + batch * p.M, p.M, key);
}

}  // namespace attn::cuda::cosine

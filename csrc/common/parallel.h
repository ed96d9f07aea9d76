// Tasks over threads, and scratch memory for them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace attn {

// Uninitialised memory for `count` elements, aligned to a cache line.
template <class T>
class Scratch {
 public:
  // Not aligned_alloc, which looks for more than it takes: glibc would not find the block again
  // that the last one of this size left, and the heap would grow.
  explicit Scratch(int64_t count)
      : block_(std::malloc(static_cast<size_t>(count) * sizeof(T) + 2 * kAlign)) {
    if (block_ == nullptr) throw std::bad_alloc();
    const uintptr_t address = reinterpret_cast<uintptr_t>(block_);
    data_ = reinterpret_cast<T*>((address + kAlign - 1) / kAlign * kAlign);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }
  T* get() const { return data_; }

 private:
  static constexpr size_t kAlign = 64;
  void* block_;
  T* data_;
};

// Hands out 0 .. count-1, each once. Tasks of a causal problem differ in cost, so threads take the
// next one when they are free; results must not depend on who takes what.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}
  // The next task, or -1 when none is left.
  int64_t next() {
    const int64_t task = taken_.fetch_add(1, std::memory_order_relaxed);
    return task < count_ ? task : -1;
  }

 private:
  std::atomic<int64_t> taken_{0};
  int64_t count_;
};

// A call of few multiplications stays on its thread: to wake the others takes longer.
class ThreadLimit {
 public:
  explicit ThreadLimit(int64_t multiplications) { one() = multiplications < kWorthWaking; }
  ThreadLimit(const ThreadLimit&) = delete;
  ThreadLimit& operator=(const ThreadLimit&) = delete;
  ~ThreadLimit() { one() = false; }

  // Of the calling thread; the threads that it wakes have no limit.
  static bool& one() {
    static thread_local bool value = false;
    return value;
  }

 private:
  static constexpr int64_t kWorthWaking = 1 << 16;  // about ten microseconds
};

inline int64_t num_threads() {
  return ThreadLimit::one() ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

// Runs worker(queue) on up to num_threads() threads; each worker takes tasks until none is left.
template <class Worker>
void run_tasks(int64_t count, const Worker& worker) {
  if (count <= 0) return;
  TaskQueue queue(count);
  const int64_t workers = std::min(count, num_threads());
  if (workers == 1) return worker(queue);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(queue);
  });
}

}  // namespace attn

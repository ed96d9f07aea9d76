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
  explicit Scratch(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  T* get() const { return data_; }

 private:
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

inline int64_t num_threads() {
  return static_cast<int64_t>(torch::stable::get_num_threads());
}

// Runs worker(queue) on up to num_threads() threads; each worker takes tasks until none is left.
template <class Worker>
void run_tasks(int64_t count, const Worker& worker) {
  if (count <= 0) return;
  TaskQueue queue(count);
  const int64_t workers = std::min(count, num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(queue);
  });
}

}  // namespace attn

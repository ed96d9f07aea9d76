// A block of CUDA threads on a CPU: each thread is a fiber.
//
// Blocks run one after the other, in order. A thread runs until it waits for others. Shared memory
// starts as NaN; a barrier that not all threads reach aborts.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace attn::cuda {

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kLargestValue = 64;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s\n", message);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
};

// Threads that wait for each other.
struct Barrier {
  int waiting = 0;
  int members = 0;
  long generation = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char deposits[kWarp][kLargestValue];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  int rank = 0;
  bool finished = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  dim3 index, grid, size;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<float4> shared;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  long progress = 0;
  std::function<void()> kernel;
};

inline Block*& block() {
  static Block* running = nullptr;
  return running;
}

inline void yield() {
  Fiber* self = block()->current;
  swapcontext(&self->context, &block()->scheduler);
}

inline void arrive(Barrier& barrier) {
  if (++barrier.waiting >= barrier.members) {
    barrier.waiting = 0;
    ++barrier.generation;
    ++block()->progress;
  }
}

inline void wait(Barrier& barrier) {
  const long generation = barrier.generation;
  arrive(barrier);
  while (barrier.generation == generation) yield();
}

inline void finish(Barrier& barrier) {
  --barrier.members;
  if (barrier.members > 0 && barrier.waiting >= barrier.members) {
    barrier.waiting = 0;
    ++barrier.generation;
  }
}

inline void main_of_fiber() {
  Block* b = block();
  b->kernel();
  Fiber* self = b->current;
  if (!self->open.empty() || !self->groups.empty()) {
    for (const auto& group : self->groups) {
      if (!group.empty()) fail("a thread ended before its asynchronous copies did");
    }
  }
  self->finished = true;
  ++b->progress;
  finish(b->barrier);
  finish(b->warps[self->rank / kWarp].barrier);
  swapcontext(&self->context, &b->scheduler);
}

inline void run_block(Block& b) {
  const int threads = static_cast<int>(b.size.x);
  std::memset(static_cast<void*>(b.shared.data()), 0xff, b.shared.size() * sizeof(float4));
  b.barrier = {0, threads, 0};
  b.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.index = dim3(i, 0, 0);
    fiber.rank = i;
    fiber.finished = false;
    fiber.open.clear();
    fiber.groups.clear();
    ++b.warps[i / kWarp].barrier.members;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, main_of_fiber, 0);
  }
  for (int left = threads; left > 0;) {
    const long before = b.progress;
    for (Fiber& fiber : b.fibers) {
      if (fiber.finished) continue;
      b.current = &fiber;
      swapcontext(&b.scheduler, &fiber.context);
      if (fiber.finished) --left;
    }
    if (left > 0 && b.progress == before) fail("a barrier that not all threads reach");
  }
}

inline void run(dim3 grid, int threads, size_t shared, std::function<void()> kernel) {
  if (shared > 227 * 1024) fail("more shared memory than a block may have");
  Block b;
  b.grid = grid;
  b.size = dim3(threads);
  b.fibers = std::vector<Fiber>(threads);
  b.shared.resize(shared / sizeof(float4) + 1);
  b.kernel = std::move(kernel);
  block() = &b;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = dim3(x, y, z);
        run_block(b);
      }
    }
  }
  block() = nullptr;
}

// Every lane's value, for each lane of the warp.
template <class T>
void exchange(const T& mine, T (&all)[kWarp]) {
  static_assert(sizeof(T) <= kLargestValue);
  Block* b = block();
  const int rank = b->current->rank;
  Warp& warp = b->warps[rank / kWarp];
  if (warp.barrier.members != kWarp) fail("a warp instruction without all of its lanes");
  std::memcpy(warp.deposits[rank % kWarp], &mine, sizeof(T));
  wait(warp.barrier);
  for (int lane = 0; lane < kWarp; ++lane) std::memcpy(&all[lane], warp.deposits[lane], sizeof(T));
  wait(warp.barrier);
}

inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("a misaligned vector");
}

}  // namespace emulator

}  // namespace attn::cuda

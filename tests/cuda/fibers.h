// A block of CUDA threads on a CPU: each thread is a fiber.
//
// Blocks run one after the other, in order. A thread runs until it waits for others. Shared memory
// starts as NaN; a barrier that not all threads reach aborts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
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

// A barrier in shared memory. Copies of the copy engine arrive when somebody waits for them.
struct PhaseBarrier {
  uint32_t count = 0, arrived = 0, parity = 0;
  long bytes = 0;  // expected and not yet there
  std::vector<std::function<uint32_t()>> copies;
};

// A product that a warpgroup has started: what it reads, as it was then, and its result.
struct Product {
  int started = 0, retired = 0;
  bool from_registers = false, k_major = true, a_k_major = true;
  int columns = 0;
  uint64_t a = 0, b = 0;
  uint32_t fragment[128][4];
  std::vector<uint16_t> left, right;  // 64 x 16, 16 x columns
  std::vector<float> result;          // 64 x columns
};

struct Warpgroup {
  std::vector<std::shared_ptr<Product>> products;
};

// Registers that products under way write.
struct InFlight {
  float* where;
  int pending = 0;
  std::vector<float> value;
};

struct Started {
  std::shared_ptr<Product> product;
  float* where;
  bool accumulate;
  const uint32_t* fragment;
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
  const char* place = "?";
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  // products of the warpgroup that this thread takes part in
  size_t products = 0;
  bool fenced = false;
  std::vector<Started> started;
  std::deque<std::vector<Started>> product_groups;
  std::vector<InFlight> in_flight;
};

struct Block {
  dim3 index, grid, size;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<float4> shared;
  unsigned char* aligned = nullptr;  // 1024 bytes
  std::map<uint32_t, PhaseBarrier> phases;
  std::map<int, Barrier> named;
  std::vector<Warpgroup> warpgroups;
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
  block()->current->place = "a barrier of its warp or block";
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
  if (!self->started.empty() || !self->product_groups.empty()) {
    fail("a thread ended before its products did");
  }
  self->finished = true;
  ++b->progress;
  finish(b->barrier);
  finish(b->warps[self->rank / kWarp].barrier);
  swapcontext(&self->context, &b->scheduler);
}

// EMULATOR_ORDER: 0 threads go in order, 1 backwards, 2 warps in another order each time, some of
// them seldom.
inline void order_fibers(std::vector<int>& order, Block& b) {
  static const char* wanted = std::getenv("EMULATOR_ORDER");
  static std::mt19937 random;
  static std::vector<unsigned> rests;
  static int left = 0;
  const int mode = wanted ? std::atoi(wanted) : 0, count = static_cast<int>(b.fibers.size());
  order.resize(count);
  for (int i = 0; i < count; ++i) order[i] = mode == 1 ? count - 1 - i : i;
  if (mode != 2) return;
  std::vector<int> warps(count / kWarp);
  if (left-- <= 0 || rests.size() != warps.size()) {
    left = 256;
    rests.resize(warps.size());
    for (unsigned& rest : rests) rest = random() % 3 == 0 ? 32 : 1;
  }
  for (int i = 0; i < count / kWarp; ++i) warps[i] = i;
  std::shuffle(warps.begin(), warps.end(), random);
  order.clear();
  for (int warp : warps) {
    if (random() % rests[warp] != 0) {
      ++b.progress;  // nobody is to blame
      continue;
    }
    for (int i = 0; i < kWarp; ++i) order.push_back(warp * kWarp + i);
  }
}

inline void run_block(Block& b) {
  const int threads = static_cast<int>(b.size.x);
  std::memset(static_cast<void*>(b.shared.data()), 0xff, b.shared.size() * sizeof(float4));
  b.aligned = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(b.shared.data()) + 1023) / 1024 * 1024);
  b.phases.clear();
  b.named.clear();
  b.warpgroups.assign((threads + 127) / 128, Warpgroup{});
  b.barrier = {0, threads, 0};
  b.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.index = dim3(i, 0, 0);
    fiber.rank = i;
    fiber.finished = false;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.products = 0;
    fiber.fenced = false;
    fiber.in_flight.clear();
    ++b.warps[i / kWarp].barrier.members;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, main_of_fiber, 0);
  }
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  for (int left = threads; left > 0;) {
    const long before = b.progress;
    order_fibers(order, b);
    for (int i : order) {
      Fiber& fiber = b.fibers[i];
      if (fiber.finished) continue;
      b.current = &fiber;
      swapcontext(&b.scheduler, &fiber.context);
      if (fiber.finished) --left;
    }
    if (left > 0 && b.progress == before) {
      for (Fiber& fiber : b.fibers) {
        if (!fiber.finished && fiber.rank % 32 == 0) {
          std::fprintf(stderr, "warp %d waits at %s\n", fiber.rank / 32, fiber.place);
        }
      }
      for (const auto& [at, barrier] : b.phases) {
        std::fprintf(stderr, "barrier at %u: %u of %u, parity %u, %ld bytes, %zu copies\n", at,
                     barrier.arrived, barrier.count, barrier.parity, barrier.bytes,
                     barrier.copies.size());
      }
      for (Fiber& fiber : b.fibers) {
        if (!fiber.finished && fiber.rank % 32 < 2) {
          std::fprintf(stderr, "thread %d waits at %s\n", fiber.rank, fiber.place);
        }
      }
      fail("a barrier that not all threads reach");
    }
  }
}

inline void run(dim3 grid, int threads, size_t shared, std::function<void()> kernel) {
  if (shared > 227 * 1024) fail("more shared memory than a block may have");
  Block b;
  b.grid = grid;
  b.size = dim3(threads);
  b.fibers = std::vector<Fiber>(threads);
  b.shared.resize(shared / sizeof(float4) + 1 + 64);
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

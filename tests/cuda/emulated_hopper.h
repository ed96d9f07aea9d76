// The names of hopper.cuh on a CPU.
//
// Made visible: bytes under way are NaN until their barrier is waited for; so are results of
// products until they are waited for, and what products read, in shared memory and in registers,
// must not change until then.
#pragma once

inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}

namespace attn::cuda {

struct TensorMap {
  const unsigned char* base;
  int64_t size[4], stride[4];  // stride in bytes
  int box[4];
  int element;
};

inline float2 load2(const float* from) {
  emulator::check_aligned(from, 8);
  return *reinterpret_cast<const float2*>(from);
}

inline void store2(float* to, float2 x) {
  emulator::check_aligned(to, 8);
  *reinterpret_cast<float2*>(to) = x;
}

inline unsigned char* aligned_shared_memory() {
  return emulator::block()->aligned;
}
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               emulator::block()->aligned);
}

namespace emulator {

inline void check_copies(PhaseBarrier& barrier) {
  for (auto& copy : barrier.copies) barrier.bytes -= copy();
  barrier.copies.clear();
}
inline PhaseBarrier& phase_barrier(const uint64_t* at) {
  auto found = block()->phases.find(shared_address(at));
  if (found == block()->phases.end()) fail("a barrier that was not initialised");
  return found->second;
}
inline void end_phase(PhaseBarrier& b) {
  if (b.arrived > b.count) fail("more arrivals than a barrier expects");
  if (b.arrived == b.count && b.copies.empty() && b.bytes == 0) {
    b.arrived = 0;
    b.parity ^= 1;
    ++block()->progress;
  }
}

}  // namespace emulator

inline void barrier_init(uint64_t* at, uint32_t arrivals) {
  emulator::check_aligned(at, 8);
  emulator::block()->phases[shared_address(at)] = {arrivals, 0, 0, 0, {}};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(uint64_t* at, uint32_t bytes) {
  emulator::PhaseBarrier& b = emulator::phase_barrier(at);
  ++b.arrived;
  b.bytes += bytes;
  ++emulator::block()->progress;
  emulator::end_phase(b);
  emulator::yield();  // whoever waited goes first
}
inline void barrier_arrive(uint64_t* at) {
  barrier_arrive_expect(at, 0);
}
inline void wait_at(uint64_t* at, uint32_t parity, const char* place) {
  emulator::PhaseBarrier& b = emulator::phase_barrier(at);
  emulator::block()->current->place = place;
  for (;;) {
    if (!b.copies.empty()) {
      emulator::check_copies(b);
      emulator::end_phase(b);
    }
    if (b.parity != parity) break;
    emulator::yield();
  }
}
#define ATTN_TEXT_(x) #x
#define ATTN_TEXT(x) ATTN_TEXT_(x)
#define barrier_wait(at, parity) wait_at(at, parity, #at " line " ATTN_TEXT(__LINE__))

inline bool one_lane() {
  sync_warp();
  return threadIdx.x % 32 == 0;
}

inline void named_arrive(int id, int threads) {
  emulator::Barrier& b = emulator::block()->named[id];
  b.members = threads;
  emulator::arrive(b);
}
inline void named_sync(int id, int threads) {
  emulator::Barrier& b = emulator::block()->named[id];
  b.members = threads;
  emulator::block()->current->place = "a named barrier";
  emulator::wait(b);
}

inline void prefetch_map(const TensorMap*) {}
inline void load_panel(void* to, const TensorMap* map, uint64_t* at, int column, int row, int head,
                       int batch) {
  emulator::check_aligned(to, 1);
  if (shared_address(to) % 1024 != 0) emulator::fail("a swizzled tile not at 1024 bytes");
  const int64_t corner[4] = {column, row, head, batch};
  const TensorMap m = *map;
  size_t bytes = m.element;
  for (int extent : m.box) bytes *= extent;
  if (m.box[0] * m.element != 128) emulator::fail("a box of other than 128 bytes a row");
  std::memset(to, 0xff, bytes);
  ++emulator::block()->progress;
  emulator::phase_barrier(at).copies.push_back([=] {
    int64_t i[4];
    size_t place = 0;
    for (i[3] = 0; i[3] < m.box[3]; ++i[3])
      for (i[2] = 0; i[2] < m.box[2]; ++i[2])
        for (i[1] = 0; i[1] < m.box[1]; ++i[1])
          for (i[0] = 0; i[0] < m.box[0]; ++i[0], place += m.element) {
            const uint32_t offset = shared_address(to) + place;
            unsigned char* target =
                emulator::block()->aligned + (offset ^ ((offset >> 7 & 7) << 4));
            int64_t from = 0;
            bool inside = true;
            for (int d = 0; d < 4; ++d) {
              const int64_t x = corner[d] + i[d];
              inside = inside && x >= 0 && x < m.size[d];
              from += x * m.stride[d];
            }
            if (inside) {
              std::memcpy(target, m.base + from, m.element);
            } else {
              std::memset(target, 0, m.element);
            }
          }
    return static_cast<uint32_t>(bytes);
  });
}
inline void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* at) {
  emulator::check_aligned(to, 16);
  emulator::check_aligned(from, 16);
  if (bytes % 16) emulator::fail("a bulk copy of other than 16-byte pieces");
  std::memset(to, 0xff, bytes);
  ++emulator::block()->progress;
  emulator::phase_barrier(at).copies.push_back([=] {
    std::memcpy(to, from, bytes);
    return bytes;
  });
}
inline void fence_async() {}

inline uint64_t matrix(const void* start, uint32_t step) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{(step >> 4) & 0x3fff} << 16 |
         ((shared_address(start) & 0x3ffff) >> 4);
}

namespace emulator {

// Element (mn, k) of an operand in shared memory, by the canonical layouts of the PTX ISA:
// K-major ((8,m),(T,2k)) : ((8T,SBO),(1,T)); MN-major ((T,8,m),(8,k)) : ((1,T,LBO),(8T,SBO));
// T = 8 elements of 16 bits; then address bits 4-6 are xored with bits 7-9.
inline uint16_t element(uint64_t descriptor, bool k_major, int mn, int k) {
  if (descriptor >> 62 != 1) fail("only the swizzle of 128 bytes is modelled");
  if (descriptor >> 49 & 7) fail("a base offset is not modelled");
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t offset;
  if (k_major) {
    offset = mn % 8 * 128 + mn / 8 * stride + k * 2;
  } else {
    offset = mn % 64 * 2 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride;
  }
  uint32_t address = start + offset;
  address ^= (address >> 7 & 7) << 4;
  uint16_t x;
  std::memcpy(&x, block()->aligned + address, 2);
  return x;
}

inline void read_operands(const Product& p, std::vector<uint16_t>& left,
                          std::vector<uint16_t>& right) {
  left.resize(64 * 16);
  right.resize(16 * p.columns);
  for (int m = 0; m < 64; ++m) {
    for (int k = 0; k < 16; ++k) {
      if (p.from_registers) {
        const int lane = m % 8 * 4 + k % 8 / 2;
        const uint32_t pair = p.fragment[m / 16 * 32 + lane][m / 8 % 2 + k / 8 * 2];
        left[m * 16 + k] = static_cast<uint16_t>(k % 2 ? pair >> 16 : pair);
      } else {
        left[m * 16 + k] = element(p.a, p.a_k_major, m, k);
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < p.columns; ++n) {
      right[k * p.columns + n] = element(p.b, p.k_major, n, k);
    }
  }
}

template <class T>
float value_of(uint16_t x) {
  if constexpr (std::is_same_v<T, BFloat>) {
    return to_float(BFloat{x});
  } else {
    return static_cast<float>(half_of(x));
  }
}

template <class T>
void compute(Product& p) {
  read_operands(p, p.left, p.right);
  p.result.assign(64 * p.columns, 0.0f);
  std::vector<float> right(p.right.size());
  for (size_t i = 0; i < right.size(); ++i) right[i] = value_of<T>(p.right[i]);
  for (int m = 0; m < 64; ++m) {
    for (int k = 0; k < 16; ++k) {
      const float x = value_of<T>(p.left[m * 16 + k]);
      for (int n = 0; n < p.columns; ++n) {
        p.result[m * p.columns + n] += x * right[k * p.columns + n];
      }
    }
  }
}

constexpr uint32_t kPoison = 0xffffffffu;

template <class T>
void start(float* d, int columns, uint64_t a, const uint32_t* fragment, uint64_t b, bool k_major,
           bool accumulate, bool a_k_major = true) {
  Fiber* self = block()->current;
  const int rank = self->rank % 128;
  auto& products = block()->warpgroups[self->rank / 128].products;
  if (!self->fenced) fail("a product without a fence after registers changed");
  if (self->products == products.size()) products.push_back(std::make_shared<Product>());
  std::shared_ptr<Product> p = products[self->products++];
  if (p->started == 0) {
    p->from_registers = fragment != nullptr;
    p->columns = columns;
    p->k_major = k_major;
    p->a_k_major = a_k_major;
    p->a = a, p->b = b;
  } else if (p->columns != columns || p->a != a || p->b != b) {
    fail("threads of a warpgroup start different products");
  }
  if (fragment) std::memcpy(p->fragment[rank], fragment, 16);
  if (++p->started == 128) {
    compute<T>(*p);
    ++block()->progress;
  }
  InFlight* found = nullptr;
  for (InFlight& x : self->in_flight) {
    if (x.where == d) found = &x;
  }
  const int count = columns / 2;
  if (found == nullptr) {
    self->in_flight.push_back({d, 0, std::vector<float>(d, d + count)});
    found = &self->in_flight.back();
    std::memset(static_cast<void*>(d), 0xff, count * sizeof(float));
  }
  ++found->pending;
  self->started.push_back({p, d, accumulate, fragment});
}

inline void retire(const Started& s) {
  Fiber* self = block()->current;
  const int rank = self->rank % 128;
  Product& p = *s.product;
  self->place = "a product";
  while (p.started < 128) yield();
  if (s.fragment && std::memcmp(s.fragment, p.fragment[rank], 16) != 0) {
    fail("registers that a product reads were changed before it was waited for");
  }
  size_t at = 0;
  while (self->in_flight[at].where != s.where) ++at;
  InFlight& x = self->in_flight[at];
  const int row = rank / 32 * 16 + rank % 32 / 4, column = rank % 4 * 2;
  for (int i = 0; i < p.columns / 2; ++i) {
    uint32_t bits;
    std::memcpy(&bits, s.where + i, 4);
    if (bits != kPoison) fail("registers that a product writes were changed under way");
    const float r = p.result[(row + i % 4 / 2 * 8) * p.columns + i / 4 * 8 + column + i % 2];
    x.value[i] = s.accumulate ? x.value[i] + r : r;
  }
  if (--x.pending == 0) {
    std::memcpy(s.where, x.value.data(), x.value.size() * sizeof(float));
    self->in_flight.erase(self->in_flight.begin() + at);
  }
  if (++p.retired == 128) {
    std::vector<uint16_t> left, right;
    read_operands(p, left, right);
    if (left != p.left || right != p.right) {
      fail("shared memory that a product reads was changed before it was waited for");
    }
    s.product->result.clear();
    s.product->result.shrink_to_fit();
  }
}

}  // namespace emulator

template <class T, int N>
void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  emulator::start<T>(d, N, a, nullptr, b, true, accumulate != 0);
}
template <class T, int N>
void multiply_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  emulator::start<T>(d, N, 0, a, b, false, accumulate != 0);
}
template <class T, int N>
void multiply_held(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  emulator::start<T>(d, N, 0, a, b, true, accumulate != 0);
}
template <class T, int N>
void multiply_transposed(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  emulator::start<T>(d, N, a, nullptr, b, false, accumulate != 0, false);
}
inline void products_fence() {
  emulator::block()->current->fenced = true;
}
inline void products_commit() {
  emulator::Fiber* self = emulator::block()->current;
  self->product_groups.push_back(std::move(self->started));
  self->started.clear();
}
template <int kPending>
void products_wait() {
  emulator::Fiber* self = emulator::block()->current;
  while (self->product_groups.size() > kPending) {
    for (const emulator::Started& s : self->product_groups.front()) emulator::retire(s);
    self->product_groups.pop_front();
  }
  self->fenced = false;
}
template <class X, int kCount>
void keep_here(X (&)[kCount]) {}

inline void store_matrices(void* row, const uint32_t (&r)[4]) {
  emulator::check_aligned(row, 16);
  uint32_t* rows[emulator::kWarp];
  emulator::exchange(static_cast<uint32_t*>(row), rows);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int j = 0; j < 4; ++j) rows[8 * j + g][t] = r[j];
  sync_warp();
}
inline void wait_for_kernel_before() {}
inline void let_next_kernel_start() {}
inline int opaque(int x) {
  return x;
}
template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}

}  // namespace attn::cuda

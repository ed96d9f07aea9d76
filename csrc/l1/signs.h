// Sums of signs: from the gradient g of the distances, query m takes sum_n g[m,n] sign(q - k), and
// key n takes -sum_m g[m,n] sign(q - k), with sign(0) = 0.
#pragma once

namespace attn::l1::ATTN_ISA {

#if ATTN_ISA_LEVEL >= 2

// What VFIXUPIMM makes of a class of numbers, four bits per class: zeros to 0, positive ones to 1,
// negative ones to -1; NaN stays.
constexpr int64_t kSignTable = 0xA9A9A800;

ATTN_INLINE __m512 sign(__m512 x) {
  return _mm512_fixupimm_ps(x, x, _mm512_set1_epi32(static_cast<int>(kSignTable)), 0);
}
ATTN_INLINE __m512d sign(__m512d x) {
  return _mm512_fixupimm_pd(x, x, _mm512_set1_epi64(kSignTable), 0);
}

template <class T>
ATTN_INLINE Vec<T> sign_of(Vec<T> x) {
  return (Vec<T>)sign(x);
}

#else

template <class T>
ATTN_INLINE Vec<T> sign_of(Vec<T> x) {
  using Bits = typename Simd<T>::Bits;
  const Bits one = ((Bits)x & (Bits)splat<T>(T(-0.0))) | (Bits)splat<T>(T(1));
  return (Vec<T>)(one & (Bits)(x != Vec<T>{}));
}

#endif

// A tile of queries against some keys, one panel of the width.
template <class T>
struct SignTile {
  const T* queries;  // rows at kRowPitch
  const T* grads;    // rows at kRowPitch
  const T* keys;     // rows of a panel
  T* query_sums;     // [kTileRows][kPanel]
  T* key_sums;       // rows of a panel
  int64_t num_keys;
};

// Each sign is used twice while it is in a register. A function of its own: gcc then keeps the sums
// of the queries in registers.
template <class T>
__attribute__((noinline)) void add_signs(const SignTile<T>& tile) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t v = 0; v < kPanel<T>; v += lanes) {
    Vec<T> query[kTileRows], sum[kTileRows];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      query[r] = load(tile.queries + r * kRowPitch + v);
      sum[r] = load(tile.query_sums + r * kPanel<T> + v);
    }
    const T* keys = tile.keys + v;
    const T* grads = tile.grads;
    T* key_sums = tile.key_sums + v;
    for (int64_t n = 0; n < tile.num_keys; ++n) {
      const Vec<T> key = load(keys);
      Vec<T> key_sum = load(key_sums);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const Vec<T> term_sign = sign_of<T>(query[r] - key);
        const Vec<T> grad = splat<T>(grads[r * kRowPitch]);
        sum[r] += term_sign * grad;
        key_sum -= term_sign * grad;
      }
      store<T>(key_sums, key_sum);
      keys += kPanel<T>;
      key_sums += kPanel<T>;
      ++grads;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) store<T>(tile.query_sums + r * kPanel<T> + v, sum[r]);
  }
}

// Sums of a block of queries over its blocks of keys, added to those of the keys.
template <class T>
class SignSums {
 public:
  SignSums(const Problem& p, const Gradients& grads, const Partials<T>& partials)
      : p_(p),
        grads_(grads),
        partials_(partials),
        panels_(round_up(p.D, kPanel<T>) / kPanel<T>),
        sums_(kQueryBlock * round_up(p.D, kPanel<T>)),
        row_(kRowPitch) {}

  void clear(const QueryBlock& q) {
    std::fill(sums_.get(), sums_.get() + q.tiles * panels_ * kTileSize<T>, T(0));
  }

  // queries, grads: rows at kRowPitch; key_rows: packed, of this head.
  void add(const QueryBlock& q, KeyBlock<T> keys, const T* queries, const T* grads,
           const T* key_rows, int64_t padded, int64_t part) {
    T* key_sums = partials_.key_sum(q.kv_head, part);
    for (int64_t panel = 0; panel < panels_; ++panel) {
      for (int64_t tile = 0; tile < q.tiles; ++tile) {
        const int64_t begin = std::max(keys.first, q.tile_begin(tile));
        const int64_t end = std::min(keys.last, q.tile_end(tile));
        if (begin >= end) continue;
        const int64_t row = tile * kTileRows * kRowPitch;
        add_signs(SignTile<T>{queries + row + panel * kPanel<T>, grads + row + begin - keys.first,
                              key_rows + (panel * padded + begin) * kPanel<T>,
                              sums_.get() + (tile * panels_ + panel) * kTileSize<T>,
                              key_sums + (panel * partials_.key_rows + begin) * kPanel<T>,
                              end - begin});
      }
    }
  }

  // Writes factor times the sums of the queries.
  void store(const QueryBlock& q, T factor) {
    if (!grads_.query) return;
    for (int64_t r = 0; r < q.rows; ++r) {
      const T* sum =
          sums_.get() + r / kTileRows * panels_ * kTileSize<T> + r % kTileRows * kPanel<T>;
      for (int64_t d = 0; d < p_.D; ++d) {
        row_.get()[d] = factor * sum[d / kPanel<T> * kTileSize<T> + d % kPanel<T>];
      }
      const int64_t index = (q.batch * p_.H + q.head) * p_.M + q.first + r;
      store_row(grads_.query, index * p_.D, row_.get(), p_.D);
    }
  }

 private:
  const Problem& p_;
  const Gradients& grads_;
  const Partials<T>& partials_;
  int64_t panels_;
  Scratch<T> sums_;  // [tile][panel][row of tile][kPanel]
  Scratch<T> row_;
};

// The sums of the tasks to the gradients of key (times factor) and value.
template <class T>
void finish_keys(const Problem& p, const Gradients& grads, const Partials<T>& partials, T factor) {
  constexpr int64_t kTask = 64;  // keys
  const int64_t tasks = (p.N + kTask - 1) / kTask;
  run_tasks(p.B * p.Hk * tasks, [&](TaskQueue& queue) {
    Scratch<T> row(kRowPitch);
    for (int64_t i; (i = queue.next()) >= 0;) {
      const int64_t kv_head = i / tasks;
      const int64_t end = std::min(i % tasks * kTask + kTask, p.N);
      for (int64_t n = i % tasks * kTask; n < end; ++n) {
        if (grads.value) partials.finish_value(kv_head, n, row.get());
        if (!grads.key) continue;
        partials.add_parts(row.get(), partials.key_sum(kv_head, 0), partials.key_size, n, p.D);
        for (int64_t d = 0; d < p.D; ++d) row.get()[d] *= factor;
        store_row(grads.key, (kv_head * p.N + n) * p.D, row.get(), p.D);
      }
    }
  });
}

}  // namespace attn::l1::ATTN_ISA

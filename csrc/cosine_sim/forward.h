// Forward: per block of queries, over blocks of keys, weights = exp(scores), out += weights values.
//
// |q̂·k̂| is bounded by the product of the largest norms. Where the bound is small, weights are
// taken relative to it while the scores are still in registers. Otherwise, and where something is
// added to scores, a running maximum per row is used.
#pragma once

namespace attn::cosine_sim::ATTN_ISA {

// Powers of two that weights may go below the bound without losing what they add to.
template <class T>
constexpr double kSafeExponent = sizeof(T) == 8 ? 900 : 64;

template <class T>
class Forward : SoftmaxRows<T> {
  using SoftmaxRows<T>::row_;
  using SoftmaxRows<T>::sums_;
  using SoftmaxRows<T>::weights_;

 public:
  Forward(const Problem& p, const Parameters<T>& parameters, const PackedKeys<T>& keys)
      : SoftmaxRows<T>(p, parameters),
        p_(p),
        parameters_(parameters),
        keys_(keys),
        query_(query_block_rows(p) * kRowPitch) {}

  void run(const QueryBlock& q) {
    load_queries(q);
    this->clear_rows(q);
    const T* values = keys_.value_rows.get() + q.kv_head * keys_.rows_size(p_.E);
    for_each_key_block<T>(q, [&](KeyBlock<T> keys) {
      multiply_keys(q, keys);
      if (!bounded_) this->soften_rows(q, keys);
      if (bounded_ && p_.mask) mask_rows(q, keys);
      this->multiply_values(q, keys, values, keys_.padded);
    });
    for (int64_t r = 0; r < q.rows; ++r) {
      this->finish_row(q, r, bounded_ ? shift_ / kLog2E : double{this->row_max_[r]});
    }
  }

 private:
  // Scaled queries, in base 2 and with a fixed shift if the bound allows.
  void load_queries(const QueryBlock& q) {
    T largest = 0;
    for (int64_t r = 0; r < q.tiles * kTileRows; ++r) {
      T* row = query_.get() + r * kRowPitch;
      if (r < q.rows) {
        load_normalized(row, p_.query, q.batch, q.head, q.first + r, p_, parameters_.query_gain);
      } else {
        std::fill(row, row + p_.D, T(0));
      }
      largest = std::max(largest, dot(row, row, p_.D));
    }
    const T scale = parameters_.scale[q.head];
    const double bound =
        std::fabs(double{scale}) * std::sqrt(largest) * keys_.largest_norm(q.kv_head) * kLog2E;
    bounded_ = !p_.bias && !p_.relative_bias && 2 * bound <= kSafeExponent<T>;
    shift_ = bounded_ ? std::ceil(bound) : 0;
    const T factor = bounded_ ? scale * T(kLog2E) : scale;
    for (int64_t r = 0; r < q.rows; ++r) {
      T* row = query_.get() + r * kRowPitch;
      for (int64_t d = 0; d < p_.D; ++d) row[d] *= factor;
    }
  }

  void multiply_keys(const QueryBlock& q, KeyBlock<T> keys) {
    for (int64_t n = keys.first; n < keys.last; n += kPanel<T>) {
      const T* panel = keys_.key_columns.get() + (q.kv_head * keys_.padded + n) * p_.D;
      for (int64_t tile = 0; tile < q.tiles; ++tile) {
        if (n + kPanel<T> <= q.tile_begin(tile) || q.tile_end(tile) <= n) continue;
        const T* left = query_.get() + tile * kTileRows * kRowPitch;
        T* target = weights_.get() + tile * kTileRows * kRowPitch + n - keys.first;
        if (!bounded_) {
          multiply(left, panel, p_.D, [=](const Tile<T>& scores) ATTN_INLINE_LAMBDA {
            store_tile(target, scores, kRowPitch);
          });
        } else if (q.tile_is_full(tile, n, kPanel<T>)) {
          multiply(left, panel, p_.D, [&](const Tile<T>& scores) ATTN_INLINE_LAMBDA {
            store_weights<false>(target, scores, q, tile, n);
          });
        } else {
          multiply(left, panel, p_.D, [&](const Tile<T>& scores) ATTN_INLINE_LAMBDA {
            store_weights<true>(target, scores, q, tile, n);
          });
        }
      }
    }
  }

  // weights = 2^(scores - shift), 0 outside of a row's interval, and their sums.
  template <bool Partial>
  ATTN_INLINE void store_weights(T* target, const Tile<T>& scores, const QueryBlock& q,
                                 int64_t tile, int64_t n) {
    using Index = typename Simd<T>::Index;
    const Vec<T> magic = splat<T>(Simd<T>::round_magic - shift_);
    // With an element mask the sums are taken afterwards, these go nowhere.
    T* sums = p_.mask ? row_.get() : sums_.get() + tile * kTileRows * Simd<T>::lanes;
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      Vec<T> sum = load(sums + r * Simd<T>::lanes);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        Vec<T> weight = exp2_shifted<T>(scores.at[r][v], magic);
        if constexpr (Partial) {
          const int64_t row = tile * kTileRows + r;
          const int64_t first = n + v * Simd<T>::lanes;
          const IVec<T> index = lane_index<T>();
          const IVec<T> visible = (index >= static_cast<Index>(q.begin[row] - first)) &
                                  (index < static_cast<Index>(q.end[row] - first));
          weight = visible ? weight : Vec<T>{};
        }
        store<T>(target + r * kRowPitch + v * Simd<T>::lanes, weight);
        sum += weight;
      }
      store<T>(sums + r * Simd<T>::lanes, sum);
    }
  }

  // Takes what the element mask hides out of the weights, and their sums.
  void mask_rows(const QueryBlock& q, KeyBlock<T> keys) {
    constexpr int lanes = Simd<T>::lanes;
    for (int64_t r = 0; r < q.rows; ++r) {
      const Interval panels = keys.panels(q, r / kTileRows);
      T* row = weights_.get() + r * kRowPitch;
      const int64_t end = std::min(panels.end, p_.N - keys.first);
      hide_masked(row + panels.begin, p_, q, q.first + r, keys.first + panels.begin,
                  keys.first + end, T(0));
      Vec<T> sum = load(sums_.get() + r * lanes);
      for (int64_t i = panels.begin; i < panels.end; i += lanes) sum += load(row + i);
      store<T>(sums_.get() + r * lanes, sum);
    }
  }

  const Problem& p_;
  const Parameters<T>& parameters_;
  const PackedKeys<T>& keys_;
  Scratch<T> query_;
  bool bounded_ = false;
  T shift_ = 0;
};

template <class T>
void forward(const Problem& p) {
  const Parameters<T> parameters(p);
  if (has_few_queries(p)) return run_few_queries<FewQueries<T>>(p, p, parameters);
  const PackedKeys<T> keys(p, parameters, /*backward=*/false);
  const int64_t size = query_block_size(p);
  const int64_t blocks = (p.M + size - 1) / size;
  run_tasks(p.B * p.H * blocks, [&](TaskQueue& queue) {
    Forward<T> worker(p, parameters, keys);
    for (int64_t i; (i = queue.next()) >= 0;) {
      // The last queries of a causal head see the most keys: they go first.
      const int64_t block = blocks - 1 - i % blocks;
      const int64_t head = i / blocks;
      worker.run(QueryBlock(p, head / p.H, head % p.H, block * size, size));
    }
  });
}

}  // namespace attn::cosine_sim::ATTN_ISA

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
class Forward {
 public:
  Forward(const Problem& p, const Parameters<T>& parameters, const PackedKeys<T>& keys)
      : p_(p),
        parameters_(parameters),
        keys_(keys),
        out_panels_(round_up(p.E, kPanel<T>) / kPanel<T>),
        query_(kQueryBlock * kRowPitch),
        weights_(kQueryBlock * kRowPitch),
        out_(kQueryBlock * round_up(p.E, kPanel<T>)),
        sums_(kQueryBlock * Simd<T>::lanes),
        row_(kRowPitch) {}

  void run(const QueryBlock& q) {
    load_queries(q);
    std::fill(out_.get(), out_.get() + q.tiles * out_panels_ * kTileSize<T>, T(0));
    std::fill(sums_.get(), sums_.get() + kQueryBlock * Simd<T>::lanes, T(0));
    for_each_key_block<T>(q, [&](KeyBlock<T> keys) {
      multiply_keys(q, keys);
      if (!bounded_) soften_rows(q, keys);
      if (bounded_ && p_.mask) mask_rows(q, keys);
      multiply_values(q, keys);
    });
    for (int64_t r = 0; r < q.rows; ++r) finish_row(q, r);
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
      row_max_[r] = -std::numeric_limits<T>::infinity();
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

  // Scores of the block to weights relative to the running maximum of their row.
  void soften_rows(const QueryBlock& q, KeyBlock<T> keys) {
    for (int64_t tile = 0; tile < q.tiles; ++tile) {
      const Interval panels = keys.panels(q, tile);
      for (int64_t r = tile * kTileRows; r < (tile + 1) * kTileRows; ++r) {
        T* row = weights_.get() + r * kRowPitch;
        const int64_t begin = std::max(q.begin[r] - keys.first, panels.begin);
        const int64_t end = std::min(q.end[r] - keys.first, panels.end);
        if (r >= q.rows || begin >= end) {
          std::fill(row + panels.begin, row + panels.end, T(0));
          continue;
        }
        hide_outside(row, panels.begin, panels.end, begin, end);
        if (p_.has_extras()) {
          add_extras(row + begin, row_.get(), p_, parameters_, q, q.first + r, keys.first + begin,
                     keys.first + end);
        }
        soften_row(row, panels, r);
      }
    }
  }

  void soften_row(T* row, Interval panels, int64_t r) {
    constexpr int lanes = Simd<T>::lanes;
    Vec<T> largest = splat<T>(row_max_[r]);
    for (int64_t i = panels.begin; i < panels.end; i += lanes) {
      largest = maximum<T>(load(row + i), largest);
    }
    const T new_max = horizontal_max<T>(largest);
    if (new_max == -std::numeric_limits<T>::infinity()) {  // subtracting it would give NaN
      std::fill(row + panels.begin, row + panels.end, T(0));
      return;
    }
    rescale_row(r, row_max_[r], new_max);
    row_max_[r] = new_max;
    Vec<T> sum = load(sums_.get() + r * lanes);
    for (int64_t i = panels.begin; i < panels.end; i += lanes) {
      const Vec<T> weight =
          exp2_flushed<T>((load(row + i) - splat<T>(new_max)) * splat<T>(T(kLog2E)));
      store<T>(row + i, weight);
      sum += weight;
    }
    store<T>(sums_.get() + r * lanes, sum);
  }

  void rescale_row(int64_t r, T old_max, T new_max) {
    if (old_max == new_max || old_max == -std::numeric_limits<T>::infinity()) return;
    const Vec<T> factor = splat<T>(std::exp(old_max - new_max));
    T* sums = sums_.get() + r * Simd<T>::lanes;
    store<T>(sums, load(sums) * factor);
    for (int64_t panel = 0; panel < out_panels_; ++panel) {
      T* out = out_row(r, panel);
      for (int v = 0; v < kPanel<T>; v += Simd<T>::lanes) {
        store<T>(out + v, load(out + v) * factor);
      }
    }
  }

  void multiply_values(const QueryBlock& q, KeyBlock<T> keys) {
    const T* values = keys_.value_rows.get() + q.kv_head * keys_.rows_size(p_.E);
    for (int64_t panel = 0; panel < out_panels_; ++panel) {
      const T* right = values + (panel * keys_.padded + keys.first) * kPanel<T>;
      for (int64_t tile = 0; tile < q.tiles; ++tile) {
        const Interval panels = keys.panels(q, tile);
        accumulate<kRowPitch, 1>(out_row(tile * kTileRows, panel),
                                 weights_.get() + tile * kTileRows * kRowPitch + panels.begin,
                                 right + panels.begin * kPanel<T>, panels.end - panels.begin);
      }
    }
  }

  // Panel of one row of the accumulator [tile][panel][row of tile][kPanel].
  T* out_row(int64_t r, int64_t panel) const {
    return out_.get() + (r / kTileRows * out_panels_ + panel) * kTileSize<T> +
           r % kTileRows * kPanel<T>;
  }

  void finish_row(const QueryBlock& q, int64_t r) {
    const Total total(bounded_ ? shift_ / kLog2E : double{row_max_[r]},
                      horizontal_sum<T>(load(sums_.get() + r * Simd<T>::lanes)),
                      parameters_.sink[q.head]);
    const int64_t index = (q.batch * p_.H + q.head) * p_.M + q.first + r;
    static_cast<T*>(p_.lse.data)[index] = static_cast<T>(total.lse);
    for (int64_t panel = 0; panel < out_panels_; ++panel) {
      const T* out = out_row(r, panel);
      for (int e = 0; e < kPanel<T>; ++e) {
        row_.get()[panel * kPanel<T> + e] = out[e] * static_cast<T>(total.factor);
      }
    }
    store_row(p_.out, index * p_.E, row_.get(), p_.E);
  }

  const Problem& p_;
  const Parameters<T>& parameters_;
  const PackedKeys<T>& keys_;
  int64_t out_panels_;
  Scratch<T> query_, weights_, out_, sums_, row_;
  T row_max_[kQueryBlock];
  bool bounded_ = false;
  T shift_ = 0;
};

// Smaller blocks where there would be fewer than two per thread.
inline int64_t query_block_size(const Problem& p) {
  int64_t size = kQueryBlock;
  while (size > 2 * kTileRows && p.B * p.H * ((p.M + size - 1) / size) < 2 * num_threads()) {
    size = size / 2 / kTileRows * kTileRows;
  }
  return size;
}

template <class T>
void forward(const Problem& p) {
  const Parameters<T> parameters(p);
  if (has_few_queries(p)) return forward_few_queries(p, parameters);
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

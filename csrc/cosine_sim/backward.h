// Backward: recomputes the weights P = exp(score - lse) block by block, from which
//   dS = P (grad_out·v - delta),  grad_v = Pᵀ grad_out,  u = dS k̂,  w = dSᵀ (s q̂),
// and takes u and w through the norms.
//
// A task walks its blocks of queries over all their keys. Sums over queries go to accumulators that
// the task owns (see Partials), which are added up in a fixed order afterwards: no atomics.
#pragma once

namespace attn::cosine_sim::ATTN_ISA {

// Which of the sums are needed.
struct Wanted {
  bool query, key, value, score;
  explicit Wanted(const Gradients& g)
      : query(g.query || g.head_scale || g.query_gain),
        key(g.key || g.key_gain),
        value(static_cast<bool>(g.value)),
        score(query || key || g.bias || g.relative_bias) {}
};

template <class T>
class Backward {
 public:
  Backward(const Problem& p, const Gradients& grads, const Parameters<T>& parameters,
           const PackedKeys<T>& keys, const Partials<T>& partials)
      : p_(p),
        grads_(grads),
        wanted_(grads),
        parameters_(parameters),
        keys_(keys),
        partials_(partials),
        panels_d_(round_up(p.D, kPanel<T>) / kPanel<T>),
        panels_e_(round_up(p.E, kPanel<T>) / kPanel<T>),
        query_(kQueryBlock * kRowPitch),
        grad_out_(kQueryBlock * kRowPitch),
        query_panels_(kQueryBlock * round_up(p.D, kPanel<T>)),
        grad_out_panels_(kQueryBlock * round_up(p.E, kPanel<T>)),
        weights_(kQueryBlock * kRowPitch),
        grad_scores_(kQueryBlock * kRowPitch),
        sum_(kQueryBlock * round_up(p.D, kPanel<T>)),
        row_(3 * kRowPitch) {}

  // Adds what these queries give to the accumulators of partial `part`.
  void run(const QueryBlock& q, int64_t part) {
    load_queries(q);
    load_grad_out(q);
    std::fill(sum_.get(), sum_.get() + q.tiles * panels_d_ * kTileSize<T>, T(0));
    for_each_key_block<T>(q, [&](KeyBlock<T> keys) {
      compute_weights(q, keys);
      if (wanted_.value) {
        multiply_queries(q, keys, weights_.get(), grad_out_panels_.get(), panels_e_,
                         partials_.value_sum(q.kv_head, part));
      }
      if (!wanted_.score) return;
      compute_grad_scores(q, keys);
      if (grads_.bias || grads_.relative_bias) add_grad_bias(q, keys, part);
      if (wanted_.key) {
        multiply_queries(q, keys, grad_scores_.get(), query_panels_.get(), panels_d_,
                         partials_.key_sum(q.kv_head, part));
      }
      if (wanted_.query) multiply_keys(q, keys);
    });
    if (wanted_.query) finish_queries(q);
  }

 private:
  void load_queries(const QueryBlock& q) {
    const T scale = parameters_.scale[q.head];
    // Without anything to add, scores are kept in base 2.
    const T factor = p_.has_extras() ? scale : scale * T(kLog2E);
    for (int64_t r = 0; r < q.tiles * kTileRows; ++r) {
      T* row = query_.get() + r * kRowPitch;
      T* scaled = row_.get();
      if (r < q.rows) {
        load_normalized(row, p_.query, q.batch, q.head, q.first + r, p_, parameters_.query_gain);
      } else {
        std::fill(row, row + round_up(p_.D, kPanel<T>), T(0));
      }
      for (int64_t d = 0; d < panels_d_ * kPanel<T>; ++d) scaled[d] = row[d] * scale;
      pack_row(query_panels_.get() + r * kPanel<T>, scaled, p_.D, kQueryBlock * kPanel<T>);
      for (int64_t d = 0; d < p_.D; ++d) row[d] *= factor;
    }
  }

  // Rows of grad_out, delta, and the gradient of the sink.
  void load_grad_out(const QueryBlock& q) {
    double grad_sink = 0;
    for (int64_t r = 0; r < q.tiles * kTileRows; ++r) {
      T* row = grad_out_.get() + r * kRowPitch;
      lse_[r] = delta_[r] = 0;
      hidden_[r] = true;
      std::fill(row, row + round_up(p_.E, kPanel<T>), T(0));
      if (r < q.rows) grad_sink += load_grad_out_row(q, r, row);
      pack_row(grad_out_panels_.get() + r * kPanel<T>, row, p_.E, kQueryBlock * kPanel<T>);
    }
    if (grads_.sink) partials_.sink.get()[partials_.block(q)] = static_cast<T>(grad_sink);
  }

  // Returns what the query adds to the gradient of the sink.
  double load_grad_out_row(const QueryBlock& q, int64_t r, T* row) {
    const int64_t m = q.first + r;
    const int64_t index = (q.batch * p_.H + q.head) * p_.M + m;
    const T lse = static_cast<const T*>(p_.lse.data)[index];
    // The query saw nothing: no gradient goes through it, whatever came in.
    if (lse == -std::numeric_limits<T>::infinity()) return 0;
    load_padded(row, grads_.grad_out, q.batch, q.head, m, p_.E);
    load_row(row_.get(), p_.out, index * p_.E, 1, p_.E);
    T delta = dot(row, row_.get(), p_.E);
    if (grads_.grad_lse) {
      const int64_t* stride = grads_.grad_lse.stride;
      T grad_lse;
      load_row(&grad_lse, grads_.grad_lse, q.batch * stride[0] + q.head * stride[1] + m * stride[2],
               1, 1);
      delta -= grad_lse;
    }
    hidden_[r] = false;
    delta_[r] = delta;
    lse_[r] = p_.has_extras() ? lse : lse * T(kLog2E);
    return -std::exp(double{parameters_.sink[q.head]} - double{lse}) * double{delta};
  }

  void compute_weights(const QueryBlock& q, KeyBlock<T> keys) {
    clear_last_rows(keys, weights_.get(), q);
    for (int64_t n = keys.first; n < keys.last; n += kPanel<T>) {
      const T* panel = keys_.key_columns.get() + (q.kv_head * keys_.padded + n) * p_.D;
      for (int64_t tile = 0; tile < q.tiles; ++tile) {
        const T* left = query_.get() + tile * kTileRows * kRowPitch;
        T* target = weights_.get() + tile * kTileRows * kRowPitch + n - keys.first;
        if (n + kPanel<T> <= q.tile_begin(tile) || q.tile_end(tile) <= n) {
          zero_tile(target);
        } else if (p_.has_extras()) {
          multiply(left, panel, p_.D, [=](const Tile<T>& scores) ATTN_INLINE_LAMBDA {
            store_tile(target, scores, kRowPitch);
          });
        } else {
          multiply(left, panel, p_.D, [=](const Tile<T>& scores) ATTN_INLINE_LAMBDA {
            store_weights(target, scores, lse_ + tile * kTileRows);
          });
        }
      }
    }
    finish_weights(q, keys);
  }

  static ATTN_INLINE void zero_tile(T* target) {
    Tile<T> tile;
    clear(tile);
    store_tile(target, tile, kRowPitch);
  }

  static ATTN_INLINE void store_weights(T* target, const Tile<T>& scores, const T* row_lse) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> lse = splat<T>(row_lse[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        store<T>(target + r * kRowPitch + v * Simd<T>::lanes,
                 exp2_flushed<T>(scores.at[r][v] - lse));
      }
    }
  }

  // The rows that are not wholly visible, or whose scores something is added to.
  void finish_weights(const QueryBlock& q, KeyBlock<T> keys) {
    for (int64_t tile = 0; tile < q.tiles; ++tile) {
      const Interval panels = keys.panels(q, tile);
      for (int64_t r = tile * kTileRows; r < (tile + 1) * kTileRows; ++r) {
        T* row = weights_.get() + r * kRowPitch;
        const int64_t begin = std::max(q.begin[r] - keys.first, panels.begin);
        const int64_t end = std::min(q.end[r] - keys.first, panels.end);
        if (hidden_[r] || begin >= end) {
          std::fill(row + panels.begin, row + panels.end, T(0));
          continue;
        }
        if (p_.has_extras()) {
          add_extras(row + begin, row_.get(), p_, parameters_, q, q.first + r, keys.first + begin,
                     keys.first + end);
          for (int64_t i = panels.begin; i < panels.end; i += Simd<T>::lanes) {
            const Vec<T> score = (load(row + i) - splat<T>(lse_[r])) * splat<T>(T(kLog2E));
            store<T>(row + i, exp2_flushed<T>(score));
          }
        }
        std::fill(row + panels.begin, row + begin, T(0));
        std::fill(row + end, row + panels.end, T(0));
      }
    }
  }

  void compute_grad_scores(const QueryBlock& q, KeyBlock<T> keys) {
    clear_last_rows(keys, grad_scores_.get(), q);
    for (int64_t n = keys.first; n < keys.last; n += kPanel<T>) {
      const T* panel = keys_.value_columns.get() + (q.kv_head * keys_.padded + n) * p_.E;
      for (int64_t tile = 0; tile < q.tiles; ++tile) {
        const int64_t offset = tile * kTileRows * kRowPitch + n - keys.first;
        T* target = grad_scores_.get() + offset;
        if (n + kPanel<T> <= q.tile_begin(tile) || q.tile_end(tile) <= n) {
          zero_tile(target);
          continue;
        }
        const T* weights = weights_.get() + offset;
        const T* delta = delta_ + tile * kTileRows;
        multiply(grad_out_.get() + tile * kTileRows * kRowPitch, panel, p_.E,
                 [=](const Tile<T>& grad_weights) ATTN_INLINE_LAMBDA {
                   store_grad_scores(target, weights, grad_weights, delta);
                 });
      }
    }
  }

  static ATTN_INLINE void store_grad_scores(T* target, const T* weights,
                                            const Tile<T>& grad_weights, const T* row_delta) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> delta = splat<T>(row_delta[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t at = r * kRowPitch + v * Simd<T>::lanes;
        store<T>(target + at, load(weights + at) * (grad_weights.at[r][v] - delta));
      }
    }
  }

  // Products over queries take keys kTileRows at a time: the rest of the last group is zero.
  void clear_last_rows(KeyBlock<T> keys, T* scores, const QueryBlock& q) {
    const int64_t count = keys.last - keys.first;
    const int64_t padded = round_up(count, kTileRows);
    for (int64_t r = 0; r < q.tiles * kTileRows && count < padded; ++r) {
      std::fill(scores + r * kRowPitch + count, scores + r * kRowPitch + padded, T(0));
    }
  }

  // sum[n] += sum over queries of scores[m, n] panels[m], n over the block of keys.
  void multiply_queries(const QueryBlock& q, KeyBlock<T> keys, const T* scores, const T* panels,
                        int64_t num_panels, T* sum) {
    for (int64_t n = keys.first; n < keys.last; n += kTileRows) {
      // The tiles of queries that see any of these keys.
      int64_t first = 0;
      int64_t last = q.tiles;
      while (first < last && q.tile_end(first) <= n) ++first;
      while (first < last && n + kTileRows <= q.tile_begin(last - 1)) --last;
      if (first == last) continue;
      const T* left = scores + first * kTileRows * kRowPitch + n - keys.first;
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        T* target = sum + (panel * partials_.key_rows + n) * kPanel<T>;
        accumulate<1, kRowPitch>(target, left,
                                 panels + (panel * kQueryBlock + first * kTileRows) * kPanel<T>,
                                 (last - first) * kTileRows);
      }
    }
  }

  // u += dS k̂.
  void multiply_keys(const QueryBlock& q, KeyBlock<T> keys) {
    const T* rows = keys_.key_rows.get() + q.kv_head * keys_.rows_size(p_.D);
    for (int64_t panel = 0; panel < panels_d_; ++panel) {
      const T* right = rows + (panel * keys_.padded + keys.first) * kPanel<T>;
      for (int64_t tile = 0; tile < q.tiles; ++tile) {
        const Interval panels = keys.panels(q, tile);
        accumulate<kRowPitch, 1>(sum_.get() + (tile * panels_d_ + panel) * kTileSize<T>,
                                 grad_scores_.get() + tile * kTileRows * kRowPitch + panels.begin,
                                 right + panels.begin * kPanel<T>, panels.end - panels.begin);
      }
    }
  }

  void add_grad_bias(const QueryBlock& q, KeyBlock<T> keys, int64_t part) {
    for (int64_t r = 0; r < q.rows; ++r) {
      const int64_t m = q.first + r;
      const int64_t begin = std::max(q.begin[r], keys.first);
      const int64_t end = std::min(q.end[r], keys.last);
      const T* row = grad_scores_.get() + r * kRowPitch - keys.first;
      if (grads_.relative_bias) {
        T* sum = partials_.relative_bias_sum(q.batch * p_.H + q.head, part) + p_.M - 1 - m;
        for (int64_t n = begin; n < end; ++n) sum[n] += row[n];
      }
      if (!grads_.bias) continue;
      const int64_t* stride = grads_.bias.stride;
      T* sum = partials_.bias_sum(part) + q.batch * stride[0] + q.head * stride[1] + m * stride[2];
      if (stride[3] == 1) {
        for (int64_t n = begin; n < end; ++n) sum[n] += row[n];
      } else {
        for (int64_t n = begin; n < end; ++n) sum[0] += row[n];
      }
    }
  }

  // u through scale, gain and norm to grad_query, and the sums for scale and gain.
  void finish_queries(const QueryBlock& q) {
    const T scale = parameters_.scale[q.head];
    T* grad = row_.get();
    T* plain = row_.get() + kRowPitch;
    T* normalized = row_.get() + 2 * kRowPitch;
    T* gain_sum = grads_.query_gain ? partials_.gain.get() + partials_.block(q) * p_.D : nullptr;
    if (gain_sum != nullptr) std::fill(gain_sum, gain_sum + p_.D, T(0));
    double scale_sum = 0;
    for (int64_t r = 0; r < q.rows; ++r) {
      const T* sum =
          sum_.get() + r / kTileRows * panels_d_ * kTileSize<T> + r % kTileRows * kPanel<T>;
      load_padded(plain, p_.query, q.batch, q.head, q.first + r, p_.D);
      std::copy(plain, plain + p_.D, normalized);
      normalize_row(normalized, p_.D, p_.groups);
      const T* gain =
          parameters_.query_gain.empty() ? nullptr : parameters_.query_gain.data() + q.head * p_.D;
      for (int64_t d = 0; d < p_.D; ++d) {
        const T u = sum[d / kPanel<T> * kTileSize<T> + d % kPanel<T>];
        const T factor = gain == nullptr ? T(1) : gain[d];
        scale_sum += double{u * factor * normalized[d]};
        if (gain_sum != nullptr) gain_sum[d] += scale * u * normalized[d];
        grad[d] = scale * u * factor;
      }
      if (!grads_.query) continue;
      normalize_row_backward(grad, plain, p_.D, p_.groups);
      store_row(grads_.query, ((q.batch * p_.H + q.head) * p_.M + q.first + r) * p_.D, grad, p_.D);
    }
    if (grads_.head_scale)
      partials_.scale.get()[partials_.block(q)] = static_cast<T>(scale_sum * p_.scale);
  }

  const Problem& p_;
  const Gradients& grads_;
  const Wanted wanted_;
  const Parameters<T>& parameters_;
  const PackedKeys<T>& keys_;
  const Partials<T>& partials_;
  int64_t panels_d_, panels_e_;
  Scratch<T> query_, grad_out_;                // left operands [kQueryBlock, kRowPitch]
  Scratch<T> query_panels_, grad_out_panels_;  // right operands [panel][kQueryBlock][kPanel]
  Scratch<T> weights_, grad_scores_;           // [kQueryBlock, kRowPitch]
  Scratch<T> sum_;                             // u: [tile][panel][row of tile][kPanel]
  Scratch<T> row_;
  T lse_[kQueryBlock];  // in base 2 unless there are extras
  T delta_[kQueryBlock];
  bool hidden_[kQueryBlock];
};

}  // namespace attn::cosine_sim::ATTN_ISA

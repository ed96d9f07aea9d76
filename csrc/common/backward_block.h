// Backward of a block of queries: what is the same for every score. Weights P = exp(score - lse)
// are recomputed block by block, from which dS = P (grad_out·v - delta) and grad_v = Pᵀ grad_out.
//
// A task walks its blocks of queries over all their keys. Sums over queries go to accumulators that
// the task owns (see Partials), which are added up in a fixed order afterwards: no atomics.
#pragma once

namespace attn::ATTN_ISA {

// Which of the sums are needed.
struct Wanted {
  bool query, key, value, score;
};

template <class T>
class BackwardBlock {
 protected:
  // lse_unit: what lse is multiplied with for compute_weights of the room.
  BackwardBlock(const AttentionProblem& p, const AttentionGradients& grads,
                const ScoreParameters<T>& parameters, const Partials<T>& partials, T lse_unit)
      : grad_out_(kQueryBlock * kRowPitch),
        grad_out_panels_(kQueryBlock * round_up(p.E, kPanel<T>)),
        weights_(kQueryBlock * kRowPitch),
        grad_scores_(kQueryBlock * kRowPitch),
        row_(3 * kRowPitch),
        p_(p),
        grads_(grads),
        score_parameters_(parameters),
        partials_(partials),
        lse_unit_(lse_unit) {}

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
    lse_[r] = lse * lse_unit_;
    return -std::exp(double{score_parameters_.sink[q.head]} - double{lse}) * double{delta};
  }

  static ATTN_INLINE void zero_tile(T* target) {
    Tile<T> tile;
    clear(tile);
    store_tile(target, tile, kRowPitch);
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
          add_extras(row + begin, row_.get(), p_, score_parameters_, q, q.first + r,
                     keys.first + begin, keys.first + end);
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

  // value_columns: of this head.
  void compute_grad_scores(const QueryBlock& q, KeyBlock<T> keys, const T* value_columns) {
    clear_last_rows(keys, grad_scores_.get(), q);
    for (int64_t n = keys.first; n < keys.last; n += kPanel<T>) {
      const T* panel = value_columns + n * p_.E;
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

  // grad_v += Pᵀ grad_out.
  void add_grad_value(const QueryBlock& q, KeyBlock<T> keys, int64_t part) {
    multiply_queries(q, keys, weights_.get(), grad_out_panels_.get(),
                     round_up(p_.E, kPanel<T>) / kPanel<T>, partials_.value_sum(q.kv_head, part));
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

  Scratch<T> grad_out_;               // left operand [kQueryBlock, kRowPitch]
  Scratch<T> grad_out_panels_;        // right operand [panel][kQueryBlock][kPanel]
  Scratch<T> weights_, grad_scores_;  // [kQueryBlock, kRowPitch]
  Scratch<T> row_;
  T lse_[kQueryBlock];  // times lse_unit
  T delta_[kQueryBlock];
  bool hidden_[kQueryBlock];

 private:
  const AttentionProblem& p_;
  const AttentionGradients& grads_;
  const ScoreParameters<T>& score_parameters_;
  const Partials<T>& partials_;
  T lse_unit_;
};

}  // namespace attn::ATTN_ISA

// Backward: from the gradient dS of the scores (common/backward_block.h) to
//   u = dS k̂,  w = dSᵀ (s q̂),
// and through the norms.
#pragma once

namespace attn::cosine_sim::ATTN_ISA {

inline Wanted wanted(const Gradients& g) {
  const bool query = g.query || g.head_scale || g.query_gain;
  const bool key = g.key || g.key_gain;
  return {query, key, static_cast<bool>(g.value), query || key || g.bias || g.relative_bias};
}

// Sums of one query block for the gradients of head_scale and query_gain.
template <class T>
struct RowSums {
  Scratch<T> scale, gain;  // [B*H, blocks], [B*H, blocks, D]

  RowSums(const Problem& p, const Gradients& g, int64_t blocks)
      : scale(g.head_scale ? p.B * p.H * blocks : 0),
        gain(g.query_gain ? p.B * p.H * blocks * p.D : 0) {}
};

template <class T>
class Backward : BackwardBlock<T> {
  using BackwardBlock<T>::grad_scores_;
  using BackwardBlock<T>::lse_;
  using BackwardBlock<T>::row_;
  using BackwardBlock<T>::weights_;

 public:
  // Without anything to add, scores are kept in base 2.
  Backward(const Problem& p, const Gradients& grads, const Parameters<T>& parameters,
           const PackedKeys<T>& keys, const Partials<T>& partials, const RowSums<T>& sums)
      : BackwardBlock<T>(p, grads, parameters, partials, p.has_extras() ? T(1) : T(kLog2E)),
        p_(p),
        grads_(grads),
        wanted_(wanted(grads)),
        parameters_(parameters),
        keys_(keys),
        partials_(partials),
        row_sums_(sums),
        panels_d_(round_up(p.D, kPanel<T>) / kPanel<T>),
        query_(kQueryBlock * kRowPitch),
        query_panels_(kQueryBlock * round_up(p.D, kPanel<T>)),
        sum_(kQueryBlock * round_up(p.D, kPanel<T>)) {}

  // Adds what these queries give to the accumulators of partial `part`.
  void run(const QueryBlock& q, int64_t part) {
    load_queries(q);
    this->load_grad_out(q);
    std::fill(sum_.get(), sum_.get() + q.tiles * panels_d_ * kTileSize<T>, T(0));
    const T* value_columns = keys_.value_columns.get() + q.kv_head * keys_.padded * p_.E;
    for_each_key_block<T>(q, [&](KeyBlock<T> keys) {
      compute_weights(q, keys);
      if (wanted_.value) this->add_grad_value(q, keys, part);
      if (!wanted_.score) return;
      this->compute_grad_scores(q, keys, value_columns);
      if (grads_.bias || grads_.relative_bias) this->add_grad_bias(q, keys, part);
      if (wanted_.key) {
        this->multiply_queries(q, keys, grad_scores_.get(), query_panels_.get(), panels_d_,
                               partials_.key_sum(q.kv_head, part));
      }
      if (wanted_.query) multiply_keys(q, keys);
    });
    if (wanted_.query) finish_queries(q);
  }

 private:
  void load_queries(const QueryBlock& q) {
    const T scale = parameters_.scale[q.head];
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

  void compute_weights(const QueryBlock& q, KeyBlock<T> keys) {
    this->clear_last_rows(keys, weights_.get(), q);
    for (int64_t n = keys.first; n < keys.last; n += kPanel<T>) {
      const T* panel = keys_.key_columns.get() + (q.kv_head * keys_.padded + n) * p_.D;
      for (int64_t tile = 0; tile < q.tiles; ++tile) {
        const T* left = query_.get() + tile * kTileRows * kRowPitch;
        T* target = weights_.get() + tile * kTileRows * kRowPitch + n - keys.first;
        if (n + kPanel<T> <= q.tile_begin(tile) || q.tile_end(tile) <= n) {
          this->zero_tile(target);
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
    this->finish_weights(q, keys);
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

  // u through scale, gain and norm to grad_query, and the sums for scale and gain.
  void finish_queries(const QueryBlock& q) {
    const T scale = parameters_.scale[q.head];
    T* grad = row_.get();
    T* plain = row_.get() + kRowPitch;
    T* normalized = row_.get() + 2 * kRowPitch;
    T* gain_sum = grads_.query_gain ? row_sums_.gain.get() + partials_.block(q) * p_.D : nullptr;
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
      row_sums_.scale.get()[partials_.block(q)] = static_cast<T>(scale_sum * p_.scale);
  }

  const Problem& p_;
  const Gradients& grads_;
  const Wanted wanted_;
  const Parameters<T>& parameters_;
  const PackedKeys<T>& keys_;
  const Partials<T>& partials_;
  const RowSums<T>& row_sums_;
  int64_t panels_d_;
  Scratch<T> query_;         // left operand [kQueryBlock, kRowPitch]
  Scratch<T> query_panels_;  // right operand [panel][kQueryBlock][kPanel]
  Scratch<T> sum_;           // u: [tile][panel][row of tile][kPanel]
};

}  // namespace attn::cosine_sim::ATTN_ISA

// Backward: from the gradient dS of the scores (common/backward_block.h) to that of the distances,
// -scale dS, or -scale dS score² for inverse scores, and to sums of signs.
#pragma once

namespace attn::l1::ATTN_ISA {

inline Wanted wanted(const Gradients& g) {
  const bool query = static_cast<bool>(g.query), key = static_cast<bool>(g.key);
  return {query, key, static_cast<bool>(g.value), query || key || g.bias || g.relative_bias};
}

// Keys and values of all heads as right operands.
template <class T>
struct PackedForBackward : PanelPacker<T> {
  using PanelPacker<T>::heads;
  using PanelPacker<T>::padded;
  using PanelPacker<T>::rows_size;

  const Problem& p;
  Scratch<T> key_columns;  // of distances
  Scratch<T> key_rows;     // of sums of signs
  Scratch<T> value_columns;

  explicit PackedForBackward(const Problem& problem)
      : PanelPacker<T>(problem),
        p(problem),
        key_columns(heads() * padded * p.D),
        key_rows(heads() * rows_size(p.D)),
        value_columns(heads() * padded * p.E) {
    this->for_each_panel([&](int64_t head, int64_t n, T* copies) {
      this->store_columns(value_columns.get(), head, n,
                          this->read_rows(p.value, head, n, p.E, copies), p.E);
      const Rows<T> keys = this->read_rows(p.key, head, n, p.D, copies);
      this->store_columns(key_columns.get(), head, n, keys, p.D);
      this->store_rows(key_rows.get(), head, n, keys, p.D);
    });
  }
};

template <class T>
class Backward : BackwardBlock<T> {
  using BackwardBlock<T>::grad_scores_;
  using BackwardBlock<T>::weights_;

 public:
  Backward(const Problem& p, const Gradients& grads, const ScoreParameters<T>& parameters,
           const PackedForBackward<T>& keys, const Partials<T>& partials)
      : BackwardBlock<T>(p, grads, parameters, partials, T(1)),
        p_(p),
        grads_(grads),
        wanted_(wanted(grads)),
        score_(p),
        keys_(keys),
        signs_(p, grads, partials),
        query_(kQueryBlock * kRowPitch),
        scores_(p.inverse ? kQueryBlock * kRowPitch : 0) {}

  // Adds what these queries give to the accumulators of partial `part`.
  void run(const QueryBlock& q, int64_t part) {
    load_queries(query_.get(), p_, q);
    this->load_grad_out(q);
    signs_.clear(q);
    const T* value_columns = keys_.value_columns.get() + q.kv_head * keys_.padded * p_.E;
    const T* key_rows = keys_.key_rows.get() + q.kv_head * keys_.rows_size(p_.D);
    for_each_key_block<T>(q, [&](KeyBlock<T> keys) {
      compute_weights(q, keys);
      if (wanted_.value) this->add_grad_value(q, keys, part);
      if (!wanted_.score) return;
      this->compute_grad_scores(q, keys, value_columns);
      if (grads_.bias || grads_.relative_bias) this->add_grad_bias(q, keys, part);
      if (!wanted_.query && !wanted_.key) return;
      if (p_.inverse) multiply_squares(q, keys);
      signs_.add(q, keys, query_.get(), grad_scores_.get(), key_rows, keys_.padded, part);
    });
    signs_.store(q, static_cast<T>(-p_.scale));
  }

 private:
  void compute_weights(const QueryBlock& q, KeyBlock<T> keys) {
    this->clear_last_rows(keys, weights_.get(), q);
    const T* columns = keys_.key_columns.get() + q.kv_head * keys_.padded * p_.D;
    for_each_tile(
        q, keys, query_.get(), columns, p_.D,
        [&](int64_t tile, int64_t n, Tile<T>& sums) ATTN_INLINE_LAMBDA {
          const int64_t offset = tile * kTileRows * kRowPitch + n - keys.first;
          score_.of_tile(sums);
          if (p_.inverse) store_tile(scores_.get() + offset, sums, kRowPitch);
          if (!p_.has_extras()) soften_tile(sums, this->lse_ + tile * kTileRows);
          store_tile(weights_.get() + offset, sums, kRowPitch);
        },
        [&](int64_t tile, int64_t n) {
          this->zero_tile(weights_.get() + tile * kTileRows * kRowPitch + n - keys.first);
        });
    this->finish_weights(q, keys);
  }

  static ATTN_INLINE void soften_tile(Tile<T>& scores, const T* row_lse) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> lse = splat<T>(row_lse[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        scores.at[r][v] = exp2_flushed<T>((scores.at[r][v] - lse) * splat<T>(T(kLog2E)));
      }
    }
  }

  // dS *= score², but 0 for what is hidden, whose score may be infinite.
  void multiply_squares(const QueryBlock& q, KeyBlock<T> keys) {
    for (int64_t tile = 0; tile < q.tiles; ++tile) {
      const Interval panels = keys.panels(q, tile);
      for (int64_t r = tile * kTileRows; r < (tile + 1) * kTileRows; ++r) {
        T* grads = grad_scores_.get() + r * kRowPitch;
        const T* scores = scores_.get() + r * kRowPitch;
        for (int64_t i = panels.begin; i < panels.end; i += Simd<T>::lanes) {
          const Vec<T> grad = load(grads + i), score = load(scores + i);
          store<T>(grads + i, grad == Vec<T>{} ? grad : grad * (score * score));
        }
      }
    }
  }

  const Problem& p_;
  const Gradients& grads_;
  const Wanted wanted_;
  Score<T> score_;
  const PackedForBackward<T>& keys_;
  SignSums<T> signs_;
  Scratch<T> query_;   // left operand [kQueryBlock, kRowPitch]
  Scratch<T> scores_;  // inverse ones, before anything is added [kQueryBlock, kRowPitch]
};

template <class T>
void backward(const Problem& whole, const Gradients& whole_grads) {
  const int64_t widths = 3 * round_up(whole.D, kPanel<T>) + 2 * round_up(whole.E, kPanel<T>);
  for_each_slice(whole, whole.N * widths * sizeof(T), [&](const Slice& slice) {
    const Problem p = slice.of(whole);
    const Gradients grads = slice.of(whole_grads, whole);
    const ScoreParameters<T> parameters(p);
    const PackedForBackward<T> keys(p);
    const Partials<T> partials(p, grads, wanted(grads).query || wanted(grads).key);
    run_tasks(partials.schedule.tasks(), [&](TaskQueue& queue) {
      Backward<T> worker(p, grads, parameters, keys, partials);
      for (int64_t i; (i = queue.next()) >= 0;) run_backward_task(worker, partials, i);
    });
    partials.finish_parameters();
    finish_keys(p, grads, partials, static_cast<T>(-p.scale));
  });
}

}  // namespace attn::l1::ATTN_ISA

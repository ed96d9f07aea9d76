// Forward of a block of queries: scores of one block of keys after another become weights relative
// to the running maximum of their row, and multiply the values.
#pragma once

namespace attn::ATTN_ISA {

template <class T>
class SoftmaxRows {
 public:
  SoftmaxRows(const AttentionProblem& p, const ScoreParameters<T>& parameters)
      : attention_(p),
        score_parameters_(parameters),
        out_panels_(round_up(p.E, kPanel<T>) / kPanel<T>),
        weights_(query_block_rows(p) * kRowPitch),
        out_(query_block_rows(p) * round_up(p.E, kPanel<T>)),
        sums_(query_block_rows(p) * Simd<T>::lanes),
        row_(kRowPitch) {}

 protected:
  void clear_rows(const QueryBlock& q) {
    const int64_t rows = q.tiles * kTileRows;
    std::fill_n(out_.get(), q.tiles * out_panels_ * kTileSize<T>, T(0));
    std::fill_n(sums_.get(), rows * Simd<T>::lanes, T(0));
    std::fill_n(row_max_, rows, -std::numeric_limits<T>::infinity());
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
        if (attention_.has_extras()) {
          add_extras(row + begin, row_.get(), attention_, score_parameters_, q, q.first + r,
                     keys.first + begin, keys.first + end);
        }
        soften_row(row, panels, r);
      }
    }
  }

  // out += weights values, values packed as rows.
  void multiply_values(const QueryBlock& q, KeyBlock<T> keys, const T* values, int64_t padded) {
    for (int64_t panel = 0; panel < out_panels_; ++panel) {
      const T* right = values + (panel * padded + keys.first) * kPanel<T>;
      for (int64_t tile = 0; tile < q.tiles; ++tile) {
        const Interval panels = keys.panels(q, tile);
        accumulate<kRowPitch, 1>(out_row(tile * kTileRows, panel),
                                 weights_.get() + tile * kTileRows * kRowPitch + panels.begin,
                                 right + panels.begin * kPanel<T>, panels.end - panels.begin);
      }
    }
  }

  // Writes out and lse of a row whose weights are exp(score - shift).
  void finish_row(const QueryBlock& q, int64_t r, double shift) {
    const AttentionProblem& p = attention_;
    const Total total(shift, horizontal_sum<T>(load(sums_.get() + r * Simd<T>::lanes)),
                      score_parameters_.sink[q.head]);
    const int64_t index = (q.batch * p.H + q.head) * p.M + q.first + r;
    static_cast<T*>(p.lse.data)[index] = static_cast<T>(total.lse);
    for (int64_t panel = 0; panel < out_panels_; ++panel) {
      const T* out = out_row(r, panel);
      for (int e = 0; e < kPanel<T>; ++e) {
        row_.get()[panel * kPanel<T> + e] = out[e] * static_cast<T>(total.factor);
      }
    }
    store_row(p.out, index * p.E, row_.get(), p.E);
  }

 private:
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

  // Panel of one row of the accumulator [tile][panel][row of tile][kPanel].
  T* out_row(int64_t r, int64_t panel) const {
    return out_.get() + (r / kTileRows * out_panels_ + panel) * kTileSize<T> +
           r % kTileRows * kPanel<T>;
  }

  const AttentionProblem& attention_;
  const ScoreParameters<T>& score_parameters_;
  int64_t out_panels_;

 protected:
  Scratch<T> weights_, out_, sums_, row_;
  T row_max_[kQueryBlock];
};

}  // namespace attn::ATTN_ISA

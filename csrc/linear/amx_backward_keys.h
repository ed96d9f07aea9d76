// The walk from the last token on, see amx_backward.h.
#pragma once

namespace attn::linear::ATTN_ISA {

// Sums of queries times gradients.
class HalfQuerySums {
 public:
  HalfQuerySums(const Problem& p, const Gradients& grads)
      : p_(p),
        grads_(grads),
        queries_(kChunk * kHalfPitch),
        grad_out_(kChunk * kHalfPitch),
        split_(whole_blocks(p.F) * kTokenPitch),
        query_columns_(kChunk * whole_blocks(p.F) / 2),
        grad_rows_(kChunk / 2 * whole_blocks(p.E)) {}

  void add(State<float>& state, const Place& place, const Fade<float>& fade, Interval tokens) {
    for_each_chunk(tokens, true, [&](int64_t first, int64_t count, Interval next) {
      ahead_.clear();
      ahead_.add(p_.query, place.batch, place.head, next, p_.D);
      ahead_.add(grads_.grad_out, place.batch, place.head, next, p_.E);
      read_queries(place, first, count);
      add_queries(state, fade, count);
    });
  }

 protected:
  void read_queries(const Place& place, int64_t first, int64_t count) {
    load_half_rows(queries_.get(), p_.query, place.batch, place.head, first, count, p_.D);
    load_half_rows(grad_out_.get(), grads_.grad_out, place.batch, place.head, first, count, p_.E);
    rows_.read(p_, grad_out_.get(), place, first, count);
    pack_half_columns(query_columns_.get(), queries_.get(), count, p_.F);
    pack_half_rows(grad_rows_.get(), grad_out_.get(), count, p_.E);
  }

  void add_queries(State<float>& state, const Fade<float>& fade, int64_t count) {
    float factors[kChunk] = {}, deltas[kChunk] = {};
    for (int64_t r = 0; r < count; ++r) {
      factors[r] = fade.of_past()[r] * rows_.inverse[r];
      deltas[r] = fade.of_past()[r] * rows_.delta[r];
    }
    split_columns(split_.get(), query_columns_.get(), factors, count, p_.F);
    update_half_matrix(state.panels, state.at(0, 0), p_.F, fade.after(count), split_.get(),
                       grad_rows_.get(), count, ahead_);
    update_half_sum(state.sum(), fade.after(count), queries_.get(), deltas,
                    p_.normalized ? count : 0, p_.F);
  }

  const TileRegisters registers_;
  const Problem& p_;
  const Gradients& grads_;
  Prefetch ahead_;
  RowFactors rows_;
  Scratch<uint16_t> queries_, grad_out_, split_;
  Scratch<Pair> query_columns_, grad_rows_;
};

class HalfBackwardKeys : private HalfQuerySums {
 public:
  HalfBackwardKeys(const Problem& p, const Gradients& grads)
      : HalfQuerySums(p, grads),
        group_(p.H / p.Hk),
        fades_(group_),
        transposed_(p.F, p.E),
        keys_(kChunk * kHalfPitch),
        values_(kChunk * kHalfPitch),
        weights_(kChunk * kTokenPitch),
        grad_weights_(kChunk * kTokenPitch),
        grad_columns_(kChunk * whole_blocks(p.E) / 2),
        query_rows_(kChunk / 2 * whole_blocks(p.F)),
        state_rows_(whole_blocks(p.F) / 2 * whole_blocks(p.E)),
        state_columns_(whole_blocks(p.E) / 2 * whole_blocks(p.F)),
        scores_(kChunk * kScorePitch),
        grad_keys_(kChunk * kRowPitch),
        grad_values_(kChunk * kRowPitch),
        key_total_(kChunk * kRowPitch),
        value_total_(kChunk * kRowPitch) {
    transposed_.clear();  // products read rows behind the last one, times zero
    for (int64_t i = 0; i < group_; ++i) {
      states_.push_back(std::make_unique<State<float>>(p.F, p.E));
    }
  }

  // kv_head counts over B * Hk.
  void run(int64_t kv_head, const Segment& segment, const PartSums<float>& parts) {
    for (int64_t i = 0; i < group_; ++i) {
      const Place place(p_, kv_head * group_ + i);
      fades_[i].read(p_, place.head);
      start_backward(*states_[i], static_cast<HalfQuerySums&>(*this), parts, p_, grads_, place,
                     fades_[i], segment);
    }
    for_each_chunk(segment.keys(), true, [&](int64_t first, int64_t count, Interval next) {
      for (int64_t i = 0; i < group_; ++i) {
        const Place place(p_, kv_head * group_ + i);
        prefetch_chunk(ahead_, p_, grads_, place, next, true);
        run_chunk(place, i, first, count);
      }
      const int64_t index = kv_head * p_.N + first;
      if (grads_.key) store_rows(grads_.key, index, key_total_.get(), count, p_.D);
      if (grads_.value) store_rows(grads_.value, index, value_total_.get(), count, p_.E);
    });
    for (int64_t i = 0; i < group_ && segment.is_first(); ++i) {
      states_[i]->write(grads_.state, grads_.key_sum, kv_head * group_ + i);
    }
  }

 private:
  void run_chunk(const Place& place, int64_t i, int64_t first, int64_t count) {
    State<float>& state = *states_[i];
    const Fade<float>& fade = fades_[i];
    load_half_keys(keys_.get(), p_, place, first, count);
    load_half_rows(values_.get(), p_.value, place.batch, place.kv_head, first, count, p_.E);
    read_queries(place, first, count);
    pack_half_columns(grad_columns_.get(), grad_out_.get(), count, p_.E);
    pack_half_rows(query_rows_.get(), queries_.get(), count, p_.F);
    float* grad_keys = i == 0 ? key_total_.get() : grad_keys_.get();
    float* grad_values = i == 0 ? value_total_.get() : grad_values_.get();
    const float zeros[kChunk] = {};
    compute_weights(weights_.get(), {keys_.get(), kHalfPitch, query_columns_.get(), p_.F}, zeros,
                    fade, count);
    compute_weights(grad_weights_.get(), {values_.get(), kHalfPitch, grad_columns_.get(), p_.E},
                    rows_.delta, fade, count);
    multiply_grad_out(grad_values, state, fade, count);
    multiply_queries(grad_keys, state, fade, count);
    for (int64_t r = 0; r < count && p_.mask; ++r) {
      if (is_hidden(p_, place, first + r)) clear_rows(grad_keys, r, r + 1);
    }
    add_queries(state, fade, count);
    if (i == 0) return;
    add_rows(key_total_.get(), grad_keys, count, p_.D);
    add_rows(value_total_.get(), grad_values, count, p_.E);
  }

  // weights[n][m] = w(m, n) (r[m] (row n · column m) + delta[m]) of the queries m >= n
  void compute_weights(uint16_t* weights, HalfProduct product, const float* delta,
                       const Fade<float>& fade, int64_t count) {
    const int64_t depth = whole_blocks(product.depth), end = round_up(count, kBlock);
    for (int64_t row = 0; row < count; row += kBlock) {
      for (int64_t m = row; m < count; m += kBlock) {
        ahead_.step();
        multiply_half(
            scores_.get() + row * kScorePitch + m, kScorePitch,
            {product.left + row * kHalfPitch, kHalfPitch, product.panel + m * depth / 2, depth});
      }
    }
    for (int64_t row = 0; row < end; ++row) {
      for (int64_t m = row / kBlock * kBlock; m < end; m += 16) {
        const Vec<float> factor = load(fade.weights_of_queries(row, m));
        const Vec<float> score =
            load(scores_.get() + row * kScorePitch + m) * load(rows_.inverse + m) + load(delta + m);
        store_half(weights + row * kTokenPitch + m,
                   factor != Vec<float>{} ? score * factor : Vec<float>{});
      }
    }
  }

  void multiply_grad_out(float* grad, const State<float>& state, const Fade<float>& fade,
                         int64_t count) {
    const int64_t depth = whole_blocks(p_.F);
    pack_half_matrix(state_rows_.get(), state.panels, state.at(0, 0), p_.F);
    for (int64_t e = 0; e < p_.E; e += kBlock) {
      for (int64_t row = 0; row < count; row += kBlock) {
        const HalfProduct past{keys_.get() + row * kHalfPitch, kHalfPitch,
                               state_rows_.get() + e * depth / 2, depth};
        const HalfProduct near = near_product(weights_.get(), grad_rows_.get(), e, row, count);
        multiply_both(grad + row * kRowPitch + e, past, near, nullptr, fade, row, count);
      }
    }
  }

  void multiply_queries(float* grad, const State<float>& state, const Fade<float>& fade,
                        int64_t count) {
    const int64_t depth = whole_blocks(p_.E);
    transposed_.read(state, 0, p_.F);
    pack_half_matrix(state_columns_.get(), transposed_.panels, transposed_.at(0, 0), p_.E);
    for (int64_t f = 0; f < p_.F; f += kBlock) {
      for (int64_t row = 0; row < count; row += kBlock) {
        const HalfProduct past{values_.get() + row * kHalfPitch, kHalfPitch,
                               state_columns_.get() + f * depth / 2, depth};
        const HalfProduct near =
            near_product(grad_weights_.get(), query_rows_.get(), f, row, count);
        const float* sums = extended_width(p_) > p_.E ? state.sum() + f : nullptr;
        multiply_both(grad + row * kRowPitch + f, past, near, sums, fade, row, count);
      }
    }
  }

  static HalfProduct near_product(const uint16_t* weights, const Pair* right, int64_t column,
                                  int64_t row, int64_t count) {
    return {weights + row * kTokenPitch + row, kTokenPitch,
            right + column * (kChunk / 2) + row / 2 * kBlock, round_up(count, kBlock) - row};
  }

  // target = (past + sums) faded + near
  void multiply_both(float* target, const HalfProduct& past, const HalfProduct& near,
                     const float* sums, const Fade<float>& fade, int64_t row, int64_t count) {
    ahead_.step();
    if (!fade.any() && sums == nullptr) {
      multiply_half(target, kRowPitch, past, near);
      return;
    }
    const float zeros[kBlock] = {};
    float left[kBlock] = {};
    std::copy(fade.of_keys(count) + row, fade.of_keys(count) + std::min(row + kBlock, count), left);
    multiply_half(target, kRowPitch, past);
    finish_past(target, nullptr, nullptr, sums == nullptr ? zeros : sums, left);
    accumulate_half(target, kRowPitch, near);
  }

  int64_t group_;
  std::vector<Fade<float>> fades_;
  std::vector<std::unique_ptr<State<float>>> states_;
  TransposedState<float> transposed_;
  Scratch<uint16_t> keys_, values_, weights_, grad_weights_;
  Scratch<Pair> grad_columns_, query_rows_, state_rows_, state_columns_;
  Scratch<float> scores_, grad_keys_, grad_values_, key_total_, value_total_;
};

inline void half_backward(const Problem& p, const Gradients& grads) {
  run_backward<float, HalfBackwardKeys, HalfBackwardQueries, HalfKeySums, HalfQuerySums>(p, grads);
}

}  // namespace attn::linear::ATTN_ISA

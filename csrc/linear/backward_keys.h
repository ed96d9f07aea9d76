// Gradients of keys, values and of the state before the first token: a walk from the last token on.
// The query heads that share a key head are walked together, each with a state of its own.
#pragma once

namespace attn::linear::ATTN_ISA {

// Sums of queries times gradients, the gradient of the state.
template <class T>
class QuerySums {
 public:
  QuerySums(const Problem& p, const Gradients& grads)
      : p_(p),
        grads_(grads),
        queries_(kChunk * kRowPitch),
        grad_out_(kChunk * kRowPitch),
        grad_panels_(kChunk * round_up(p.E, kPanel<T>)) {}

  void add(State<T>& state, const Place& place, const Fade<T>& fade, Interval tokens) {
    for_each_chunk(tokens, true, [&](int64_t first, int64_t count, Interval next) {
      ahead_.clear();
      ahead_.add(p_.query, place.batch, place.head, next, p_.D);
      ahead_.add(grads_.grad_out, place.batch, place.head, next, p_.E);
      load_grad_out(place, first, count);
      for_each_block<T>(p_, [&](Block block) {
        load_features(queries_.get(), p_, p_.query, place.batch, place.head, first, count, block);
        add_block(state, fade, count, block);
      });
    });
  }

 protected:
  void load_grad_out(const Place& place, int64_t first, int64_t count) {
    load_gradients(grad_out_.get(), queries_.get(), p_, grads_, place, first, count);
    pack_panels(grad_panels_.get(), grad_out_.get(), count, p_.E);
  }

  // The queries of a block, which are scaled in place.
  void add_block(State<T>& state, const Fade<T>& fade, int64_t count, Block block) {
    if (fade.any()) scale_rows(queries_.get(), fade.of_past(), count, block.size());
    const T factor = fade.after(count);
    update_state(state, factor, queries_.get(), grad_panels_.get(), count, block, ahead_);
    update_sum<T>(state.sum() + block.begin, factor, queries_.get(),
                  p_.normalized ? grad_out_.get() + p_.E : kNoWeights, p_.normalized ? count : 0,
                  block.size());
  }

  static constexpr const T* kNoWeights = nullptr;
  const Problem& p_;
  const Gradients& grads_;
  Scratch<T> queries_, grad_out_, grad_panels_;
  Prefetch ahead_;
};

// The gradient of the state after the last key of a segment.
template <class T, class Sums>
void start_backward(State<T>& state, Sums& sums, const PartSums<T>& parts, const Problem& p,
                    const Gradients& grads, const Place& place, const Fade<T>& fade,
                    const Segment& segment) {
  state.read(grads.grad_final_state, grads.grad_final_key_sum, place.batch, place.head);
  const Run& run = *segment.run;
  if (run.segments == 1) {
    if (!p.causal) sums.add(state, place, fade, run.queries);
    return;
  }
  const int64_t end = p.causal ? (segment.index + 1) * run.parts_in_segment : 0;
  for (int64_t i = run.parts() - 1; i >= end; --i) {
    const T left = fade.after(part_of_queries({&run, i}).size());
    state.fade_and_add(left, parts.of(place.batch * p.H + place.head, run.first_part + i));
  }
}

template <class T>
void add_rows(T* total, const T* rows, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count * kRowPitch; r += kRowPitch) {
    for (int64_t d = 0; d < width; ++d) total[r + d] += rows[r + d];
  }
}

template <class T>
class BackwardKeys : private QuerySums<T> {
 public:
  BackwardKeys(const Problem& p, const Gradients& grads)
      : QuerySums<T>(p, grads),
        width_(extended_width(p)),
        block_(feature_block(p.F, kFeatureBlock<T>)),
        group_(p.Hk == 0 ? 0 : p.H / p.Hk),
        fades_(group_),
        transposed_(p.F, p.E),
        keys_(kChunk * kRowPitch),
        key_columns_(kChunk * block_),
        query_panels_(kChunk * round_up(block_, kPanel<T>)),
        values_(kChunk * kRowPitch),
        value_columns_(kChunk * width_),
        weights_(kChunk * kScorePitch),
        grad_scores_(kChunk * kScorePitch),
        grad_features_(kChunk * kRowPitch),
        grad_keys_(kChunk * kRowPitch),
        grad_values_(kChunk * kRowPitch),
        key_total_(kChunk * kRowPitch),
        value_total_(kChunk * kRowPitch) {
    for (int64_t i = 0; i < group_; ++i) states_.push_back(std::make_unique<State<T>>(p.F, p.E));
  }

  // kv_head counts over B * Hk.
  void run(int64_t kv_head, const Segment& segment, const PartSums<T>& parts) {
    for (int64_t i = 0; i < group_; ++i) {
      const Place head = place(kv_head, i);
      fades_[i].read(p_, head.head);
      start_backward(*states_[i], static_cast<QuerySums<T>&>(*this), parts, p_, grads_, head,
                     fades_[i], segment);
    }
    if (grads_.key || grads_.value || p_.causal) {
      for_each_chunk(segment.keys(), true, [&](int64_t first, int64_t count, Interval next) {
        for (int64_t i = 0; i < group_; ++i) {
          prefetch_chunk(ahead_, p_, grads_, place(kv_head, i), next, p_.causal);
          if (i == 0) ahead_.add(grads_.key, kv_head / p_.Hk, kv_head % p_.Hk, next, p_.D);
          if (i == 0) ahead_.add(grads_.value, kv_head / p_.Hk, kv_head % p_.Hk, next, p_.E);
          run_chunk(place(kv_head, i), i, first, count);
        }
        const int64_t index = kv_head * p_.N + first;
        if (grads_.key) store_rows(grads_.key, index, key_total_.get(), count, p_.D);
        if (grads_.value) store_rows(grads_.value, index, value_total_.get(), count, p_.E);
      });
    }
    for (int64_t i = 0; i < group_ && segment.is_first(); ++i) {
      states_[i]->write(grads_.state, grads_.key_sum, kv_head * group_ + i);
    }
  }

 private:
  using QuerySums<T>::ahead_;
  using QuerySums<T>::p_;
  using QuerySums<T>::grads_;
  using QuerySums<T>::queries_;
  using QuerySums<T>::grad_out_;
  using QuerySums<T>::grad_panels_;

  Place place(int64_t kv_head, int64_t i) const { return Place(p_, kv_head * group_ + i); }

  void run_chunk(const Place& place, int64_t i, int64_t first, int64_t count) {
    load_extended_values(values_.get(), p_, place, first, count);
    if (p_.causal) {
      this->load_grad_out(place, first, count);
      compute_scores(place, fades_[i], first, count);
    }
    const bool is_taylor = p_.feature_map == FeatureMap::taylor;
    // The first head's results are the totals, those of the others are added.
    T* grad_values = i == 0 ? value_total_.get() : grad_values_.get();
    T* grad = i == 0 ? key_total_.get() : grad_keys_.get();
    T* grad_features = is_taylor ? grad_features_.get() : grad;
    for_each_block<T>(p_, [&](Block block) {
      if (!p_.causal || block.size() < p_.F) load_block(place, first, count, block);
      if (p_.causal) pack_panels(query_panels_.get(), queries_.get(), count, block.size());
      multiply_queries(grad_features, *states_[i], fades_[i], count, block);
      multiply_grad_out(grad_values, *states_[i], fades_[i], count, block);
      chain_features(grad, grad_features, p_, p_.key, place.batch, place.kv_head, first, count,
                     block);
      if (p_.causal) this->add_block(*states_[i], fades_[i], count, block);
    });
    for (int64_t r = 0; r < count && p_.mask; ++r) {
      if (is_hidden(p_, place, first + r)) clear_rows(grad, r, r + 1);
    }
    if (i == 0) return;
    add_rows(key_total_.get(), grad, count, p_.D);
    add_rows(value_total_.get(), grad_values, count, p_.E);
  }

  void load_block(const Place& place, int64_t first, int64_t count, Block block) {
    load_keys(keys_.get(), p_, place, first, count, block);
    if (!p_.causal) return;
    load_features(queries_.get(), p_, p_.query, place.batch, place.head, first, count, block);
  }

  // Both kinds of scores of a chunk: query times key, and gradient times value.
  void compute_scores(const Place& place, const Fade<T>& fade, int64_t first, int64_t count) {
    pack_columns(value_columns_.get(), values_.get(), count, width_);
    multiply_scores(grad_scores_.get(), grad_out_.get(), value_columns_.get(), width_, count, fade,
                    ahead_, true, true);
    for_each_block<T>(p_, [&](Block block) {
      load_block(place, first, count, block);
      pack_columns(key_columns_.get(), keys_.get(), count, block.size());
      multiply_scores(weights_.get(), queries_.get(), key_columns_.get(), block.size(), count, fade,
                      ahead_, block.begin == 0, block.end == p_.F);
    });
  }

  // Gradients of the features of keys.
  void multiply_queries(T* grad, const State<T>& state, const Fade<T>& fade, int64_t count,
                        Block block) {
    transposed_.read(state, block.begin, block.end);
    for (int64_t f = 0; f < block.size(); f += kPanel<T>) {
      for (int64_t row = 0; row < count; row += kTileRows) {
        ahead_.step();
        T* target = grad + row * kRowPitch + f;
        multiply_two<1, kScorePitch, T>(
            nullptr, {values_.get() + row * kRowPitch, transposed_.at(0, block.begin + f), width_},
            fade.any() ? fade.of_keys(count) + row : nullptr,
            {grad_scores_.get() + row * kScorePitch + row,
             query_panels_.get() + f * kChunk + row * kPanel<T>, seen_by(row, count)},
            [=](const Tile<T>& tile) ATTN_INLINE_LAMBDA { store_tile(target, tile, kRowPitch); });
      }
    }
  }

  void multiply_grad_out(T* grad, const State<T>& state, const Fade<T>& fade, int64_t count,
                         Block block) {
    const bool is_last = block.end == p_.F;
    for (int64_t e = 0; e < p_.E; e += kPanel<T>) {
      for (int64_t row = 0; row < count; row += kTileRows) {
        ahead_.step();
        T* target = grad + row * kRowPitch + e;
        multiply_two<1, kScorePitch, T>(
            block.begin == 0 ? nullptr : target,
            {keys_.get() + row * kRowPitch, state.at(block.begin, e), block.size()},
            fade.any() && is_last ? fade.of_keys(count) + row : nullptr,
            {weights_.get() + row * kScorePitch + row,
             grad_panels_.get() + e * kChunk + row * kPanel<T>, is_last ? seen_by(row, count) : 0},
            [=](const Tile<T>& tile) ATTN_INLINE_LAMBDA { store_tile(target, tile, kRowPitch); });
      }
    }
  }

  // Queries of the chunk from a row on, which may see the key in it.
  int64_t seen_by(int64_t row, int64_t count) const { return p_.causal ? count - row : 0; }

  int64_t width_, block_, group_;
  std::vector<Fade<T>> fades_;
  std::vector<std::unique_ptr<State<T>>> states_;
  TransposedState<T> transposed_;
  Scratch<T> keys_, key_columns_, query_panels_, values_, value_columns_, weights_, grad_scores_;
  Scratch<T> grad_features_, grad_keys_, grad_values_, key_total_, value_total_;
};

// Zero gradients for the tokens after the last offset.
template <class T>
void clear_hidden_gradients(const Problem& p, const Gradients& grads, Interval hidden) {
  const std::vector<T> zeros(std::max(p.D, p.E), T(0));
  const auto clear = [&](const View& v, int64_t heads, int64_t width) {
    for (int64_t row = 0; v && row < heads * p.N; ++row) {
      if (row % p.N >= hidden.begin) store_row(v, row * width, zeros.data(), width);
    }
  };
  if (hidden.size() == 0) return;
  clear(grads.query, p.H, p.D);
  clear(grads.key, p.Hk, p.D);
  clear(grads.value, p.Hk, p.E);
}

// The workers of both walks, and of the sums that segments start from.
template <class T, class Keys, class Queries, class SumsOfKeys, class SumsOfQueries>
void run_backward(const Problem& p, const Gradients& grads) {
  const Plan query_plan(p, p.B * p.H, kChunk);
  const Plan key_plan(p, p.B * p.Hk, kChunk);
  const bool for_keys = grads.key || grads.value || grads.state || grads.key_sum;
  const auto query_segments = static_cast<int64_t>(grads.query ? query_plan.segments.size() : 0);
  const auto key_segments = static_cast<int64_t>(for_keys ? key_plan.segments.size() : 0);
  PartSums<T> key_sums(p, query_plan);
  PartSums<T> query_sums(p, key_plan);
  if (grads.query) {
    key_sums.compute(
        p, query_plan, [&] { return SumsOfKeys(p); }, part_of_keys, is_before_a_segment);
  }
  if (for_keys) {
    query_sums.compute(
        p, key_plan, [&] { return SumsOfQueries(p, grads); }, part_of_queries, is_after_a_segment);
  }
  const int64_t key_tasks = p.B * p.Hk * key_segments;
  run_tasks(key_tasks + p.B * p.H * query_segments, [&](TaskQueue& queue) {
    std::unique_ptr<Keys> keys;
    std::unique_ptr<Queries> queries;
    for (int64_t i; (i = queue.next()) >= 0;) {
      if (i < key_tasks) {  // the longer ones go first
        if (!keys) keys = std::make_unique<Keys>(p, grads);
        keys->run(i / key_segments, key_plan.segments[i % key_segments], query_sums);
        continue;
      }
      keys.reset();
      if (!queries) queries = std::make_unique<Queries>(p, grads);
      const int64_t task = i - key_tasks;
      queries->run(task / query_segments, query_plan.segments[task % query_segments], key_sums);
    }
  });
  clear_hidden_gradients<T>(p, grads, query_plan.hidden);
}

template <class T>
void backward(const Problem& p, const Gradients& grads) {
  run_backward<T, BackwardKeys<T>, BackwardQueries<T>, KeySums<T>, QuerySums<T>>(p, grads);
}

}  // namespace attn::linear::ATTN_ISA

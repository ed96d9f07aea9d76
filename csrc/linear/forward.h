// Forward: a walk over chunks of tokens. A chunk's queries see the keys before it through the
// state, out = q S, and the keys in it through scores; then its keys are added to the state.
#pragma once

namespace attn::linear::ATTN_ISA {

// Sums of keys times values.
template <class T>
class KeySums {
 public:
  explicit KeySums(const Problem& p)
      : p_(p),
        keys_(kChunk * kRowPitch),
        values_(kChunk * kRowPitch),
        value_panels_(kChunk * round_up(p.E, kPanel<T>)) {}

  void add(State<T>& state, const Place& place, const Fade<T>& fade, Interval tokens) {
    for_each_chunk(tokens, false, [&](int64_t first, int64_t count, Interval next) {
      ahead_.clear();
      ahead_.add(p_.key, place.batch, place.kv_head, next, p_.D);
      ahead_.add(p_.value, place.batch, place.kv_head, next, p_.E);
      load_values(place, first, count);
      for_each_block<T>(p_, [&](Block block) {
        load_keys(keys_.get(), p_, place, first, count, block);
        add_block(state, fade, count, block);
      });
    });
  }

 protected:
  static constexpr bool kReversed = false;

  void load_values(const Place& place, int64_t first, int64_t count) {
    load_rows(values_.get(), p_.value, place.batch, place.kv_head, first, count, p_.E);
    pack_panels(value_panels_.get(), values_.get(), count, p_.E);
  }

  // The keys of a block, which are scaled in place.
  void add_block(State<T>& state, const Fade<T>& fade, int64_t count, Block block) {
    if (fade.any()) scale_rows(keys_.get(), fade.of_keys(count), count, block.size());
    const T factor = fade.after(count);
    update_state(state, factor, keys_.get(), value_panels_.get(), count, block, ahead_);
    update_sum<T>(state.sum() + block.begin, factor, keys_.get(), nullptr, count, block.size());
  }

  const Problem& p_;
  Scratch<T> keys_, values_, value_panels_;
  Prefetch ahead_;
};

// Sums over the parts of runs that are cut into segments: [head][part].
template <class T>
class PartSums {
 public:
  PartSums(const Problem& p, const Plan& plan)
      : parts_(static_cast<int64_t>(plan.parts.size())),
        size_(State<T>::size_of(p.F, p.E)),
        data_(p.B * p.H * parts_ * size_) {}

  T* of(int64_t head, int64_t part) const { return data_.get() + (head * parts_ + part) * size_; }

  // make_sums() gives an object whose add(state, place, fade, tokens) adds tokens to a state;
  // tokens_of(part) says which, is_needed(part) whether a segment starts from it.
  template <class MakeSums, class TokensOf, class IsNeeded>
  void compute(const Problem& p, const Plan& plan, const MakeSums& make_sums,
               const TokensOf& tokens_of, const IsNeeded& is_needed) {
    std::vector<int64_t> needed;
    for (int64_t part = 0; part < parts_; ++part) {
      if (!p.causal || is_needed(plan.parts[part])) needed.push_back(part);
    }
    const auto count = static_cast<int64_t>(needed.size());
    run_tasks(p.B * p.H * count, [&](TaskQueue& queue) {
      auto sums = make_sums();
      State<T> state(p.F, p.E);
      Fade<T> fade;
      for (int64_t i; (i = queue.next()) >= 0;) {
        const int64_t head = i / count, part = needed[i % count];
        fade.read(p, head % p.H);
        state.clear();
        sums.add(state, Place(p, head), fade, tokens_of(plan.parts[part]));
        std::copy(state.data(), state.data() + size_, of(head, part));
      }
    });
  }

 private:
  int64_t parts_, size_;
  Scratch<T> data_;
};

inline Interval part_of_queries(const Segment& part) {
  return piece(part.run->queries, part.run->query_part, part.index);
}
inline Interval part_of_keys(const Segment& part) {
  return piece(part.run->keys, part.run->key_part, part.index);
}

inline bool is_before_a_segment(const Segment& part) {
  return part.index < part.run->parts() - part.run->parts_in_segment;
}
inline bool is_after_a_segment(const Segment& part) {
  return part.index >= part.run->parts_in_segment;
}

// What the first query of a segment sees before it. A run that is not causal: everything.
template <class T, class Sums>
void start_forward(State<T>& state, Sums& sums, const PartSums<T>& parts, const Problem& p,
                   const Place& place, const Fade<T>& fade, const Segment& segment) {
  state.read(p.state, p.key_sum, place.batch, place.head);
  const Run& run = *segment.run;
  if (run.segments == 1 && !p.causal) sums.add(state, place, fade, run.keys);
  const int64_t end = p.causal ? segment.index * run.parts_in_segment : run.parts();
  for (int64_t i = 0; i < (run.segments == 1 ? 0 : end); ++i) {
    const T left = fade.after(part_of_keys({&run, i}).size());
    state.fade_and_add(left, parts.of(place.batch * p.H + place.head, run.first_part + i));
  }
}

template <class T>
class Forward : private KeySums<T> {
 public:
  explicit Forward(const Problem& p)
      : KeySums<T>(p),
        block_(feature_block(p.F, kFeatureBlock<T>)),
        state_(p.F, p.E),
        queries_(kChunk * kRowPitch),
        key_columns_(kChunk * block_),
        scores_(kChunk * kScorePitch),
        out_(kChunk * kRowPitch) {}

  void run(int64_t head, const Segment& segment, const PartSums<T>& parts) {
    const Place place(p_, head);
    fade_.read(p_, place.head);
    start_forward(state_, static_cast<KeySums<T>&>(*this), parts, p_, place, fade_, segment);
    for_each_chunk(segment.queries(), false, [&](int64_t first, int64_t count, Interval next) {
      ahead_.clear();
      ahead_.add(p_.query, place.batch, place.head, next, p_.D);
      ahead_.add(p_.out, place.batch, place.head, next, p_.E);
      if (p_.causal) {
        ahead_.add(p_.key, place.batch, place.kv_head, next, p_.D);
        ahead_.add(p_.value, place.batch, place.kv_head, next, p_.E);
      }
      run_chunk(place, first, count);
    });
    if (p_.state && segment.is_last()) state_.write(p_.final_state, p_.final_key_sum, head);
  }

 private:
  using KeySums<T>::ahead_;
  using KeySums<T>::p_;
  using KeySums<T>::keys_;
  using KeySums<T>::value_panels_;

  void run_chunk(const Place& place, int64_t first, int64_t count) {
    if (p_.causal) this->load_values(place, first, count);
    for_each_block<T>(p_, [&](Block block) {
      const bool is_first = block.begin == 0, is_last = block.end == p_.F;
      load_features(queries_.get(), p_, p_.query, place.batch, place.head, first, count, block);
      if (p_.causal) {
        load_keys(keys_.get(), p_, place, first, count, block);
        pack_columns(key_columns_.get(), keys_.get(), count, block.size());
        multiply_scores(scores_.get(), queries_.get(), key_columns_.get(), block.size(), count,
                        fade_, ahead_, is_first, is_last);
      }
      if (p_.normalized) add_past_sums(count, block);
      if (p_.normalized && is_last) finish_sums(count);
      multiply_values(count, block);
      if (p_.causal) this->add_block(state_, fade_, count, block);
    });
    store_chunk((place.batch * p_.H + place.head) * p_.M + first, count);
  }

  // denominator = q · (sum over the keys before the chunk)
  void add_past_sums(int64_t count, Block block) {
    for (int64_t r = 0; r < count; ++r) {
      const T sum = dot(queries_.get() + r * kRowPitch, state_.sum() + block.begin, block.size());
      denominator_[r] = block.begin == 0 ? sum : denominator_[r] + sum;
    }
  }

  void finish_sums(int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      T sum = denominator_[r] * (fade_.any() ? fade_.of_past()[r] : T(1));
      if (p_.causal) {
        Vec<T> seen{};
        const T* row = scores_.get() + r * kScorePitch;
        for (int64_t n = 0; n < scores_in_row<T>(r, count); n += Simd<T>::lanes)
          seen += load(row + n);
        sum += horizontal_sum<T>(seen);
      }
      sum += static_cast<T>(p_.eps);
      denominator_[r] = sum;
      // Products of any sign can cancel out exactly: then there is no average.
      inverse_[r] = sum == 0 ? T(0) : 1 / sum;
    }
    for (int64_t r = count; r < kChunk; ++r) inverse_[r] = 0;
  }

  // out = q S of a block, and once all blocks are in, scores times values.
  void multiply_values(int64_t count, Block block) {
    const bool is_last = block.end == p_.F;
    for (int64_t e = 0; e < p_.E; e += kPanel<T>) {
      for (int64_t row = 0; row < count; row += kTileRows) {
        ahead_.step();
        T* target = out_.get() + row * kRowPitch + e;
        const Product<T> past{queries_.get() + row * kRowPitch, state_.at(block.begin, e),
                              block.size()};
        const int64_t seen = p_.causal && is_last ? std::min<int64_t>(row + kTileRows, count) : 0;
        const Product<T> near{scores_.get() + row * kScorePitch, value_panels_.get() + e * kChunk,
                              seen};
        const T* factors = fade_.any() && is_last ? fade_.of_past() + row : nullptr;
        const T* inverse = p_.normalized && is_last ? inverse_ + row : nullptr;
        multiply_two<kScorePitch, 1>(block.begin == 0 ? nullptr : target, past, factors, near,
                                     [=](Tile<T>& tile) ATTN_INLINE_LAMBDA {
                                       if (inverse != nullptr) scale_tile(tile, inverse);
                                       store_tile(target, tile, kRowPitch);
                                     });
      }
    }
  }

  void store_chunk(int64_t index, int64_t count) {
    store_rows(p_.out, index, out_.get(), count, p_.E);
    if (p_.normalized) store_row(p_.denominator, index, denominator_, count);
  }

  int64_t block_;
  State<T> state_;
  Fade<T> fade_;
  Scratch<T> queries_, key_columns_, scores_, out_;
  T denominator_[kChunk], inverse_[kChunk];
};

// out = 0 and denominator = eps for the tokens after the last offset.
template <class T>
void clear_hidden(const Problem& p, Interval hidden) {
  const std::vector<T> zeros(p.E, T(0));
  const T eps = static_cast<T>(p.eps);
  for (int64_t head = 0; head < p.B * p.H; ++head) {
    for (int64_t m = hidden.begin; m < hidden.end; ++m) {
      store_row(p.out, (head * p.M + m) * p.E, zeros.data(), p.E);
      if (p.normalized) store_row(p.denominator, head * p.M + m, &eps, 1);
    }
  }
}

template <class T>
void forward(const Problem& p) {
  const Plan plan(p, p.B * p.H, kChunk);
  PartSums<T> parts(p, plan);
  parts.compute(p, plan, [&] { return KeySums<T>(p); }, part_of_keys, is_before_a_segment);
  const auto segments = static_cast<int64_t>(plan.segments.size());
  run_tasks(p.B * p.H * segments, [&](TaskQueue& queue) {
    Forward<T> worker(p);
    for (int64_t i; (i = queue.next()) >= 0;) {
      worker.run(i / segments, plan.segments[i % segments], parts);
    }
  });
  clear_hidden<T>(p, plan.hidden);
}

}  // namespace attn::linear::ATTN_ISA

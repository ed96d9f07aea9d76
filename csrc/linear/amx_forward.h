// Forward of bfloat16 on AMX: forward.h with operands of 16 bits.
#pragma once

namespace attn::linear::ATTN_ISA {

inline int64_t whole_blocks(int64_t width) {
  return round_up(width, kBlock);
}

// Keys, zeros where they are hidden.
inline void load_half_keys(uint16_t* rows, const Problem& p, const Place& place, int64_t first,
                           int64_t count) {
  load_half_rows(rows, p.key, place.batch, place.kv_head, first, count, p.D);
  for (int64_t r = 0; r < count && p.mask; ++r) {
    uint16_t* row = rows + r * kHalfPitch;
    if (is_hidden(p, place, first + r)) std::fill(row, row + kHalfPitch, uint16_t{0});
  }
}

// Sums of keys times values.
class HalfKeySums {
 public:
  explicit HalfKeySums(const Problem& p)
      : p_(p),
        keys_(kChunk * kHalfPitch),
        values_(kChunk * kHalfPitch),
        split_(whole_blocks(p.F) * kTokenPitch),
        key_columns_(kChunk * whole_blocks(p.F) / 2),
        value_rows_(kChunk / 2 * whole_blocks(p.E)) {}

  void add(State<float>& state, const Place& place, const Fade<float>& fade, Interval tokens) {
    for_each_chunk(tokens, false, [&](int64_t first, int64_t count, Interval next) {
      ahead_.clear();
      ahead_.add(p_.key, place.batch, place.kv_head, next, p_.D);
      ahead_.add(p_.value, place.batch, place.kv_head, next, p_.E);
      read_tokens(place, first, count);
      add_keys(state, fade, count);
    });
  }

 protected:
  void read_tokens(const Place& place, int64_t first, int64_t count) {
    load_half_keys(keys_.get(), p_, place, first, count);
    load_half_rows(values_.get(), p_.value, place.batch, place.kv_head, first, count, p_.E);
    pack_half_columns(key_columns_.get(), keys_.get(), count, p_.F);
    pack_half_rows(value_rows_.get(), values_.get(), count, p_.E);
  }

  void add_keys(State<float>& state, const Fade<float>& fade, int64_t count) {
    float factors[kChunk] = {};
    std::copy(fade.of_keys(count), fade.of_keys(count) + count, factors);
    split_columns(split_.get(), key_columns_.get(), factors, count, p_.F);
    update_half_matrix(state.panels, state.at(0, 0), p_.F, fade.after(count), split_.get(),
                       value_rows_.get(), count, ahead_);
    if (fade.any()) {  // what rounding took from the faded keys: states keep the precision of sums
      split_rests(split_.get(), key_columns_.get(), factors, count, p_.F);
      update_half_matrix(state.panels, state.at(0, 0), p_.F, 1, split_.get(), value_rows_.get(),
                         count, ahead_);
    }
    update_half_sum(state.sum(), fade.after(count), keys_.get(), factors, count, p_.F);
  }

  const TileRegisters registers_;
  const Problem& p_;
  Prefetch ahead_;
  Scratch<uint16_t> keys_, values_, split_;
  Scratch<Pair> key_columns_, value_rows_;
};

class HalfForward : private HalfKeySums {
 public:
  explicit HalfForward(const Problem& p)
      : HalfKeySums(p),
        state_(p.F, p.E),
        queries_(kChunk * kHalfPitch),
        weights_(kChunk * kTokenPitch),
        state_rows_(whole_blocks(p.F) / 2 * whole_blocks(p.E)),
        scores_(kChunk * kScorePitch),
        out_(kChunk * kRowPitch) {}

  void run(int64_t head, const Segment& segment, const PartSums<float>& parts) {
    const Place place(p_, head);
    fade_.read(p_, place.head);
    start_forward(state_, static_cast<HalfKeySums&>(*this), parts, p_, place, fade_, segment);
    for_each_chunk(segment.queries(), false, [&](int64_t first, int64_t count, Interval next) {
      ahead_.clear();
      ahead_.add(p_.query, place.batch, place.head, next, p_.D);
      ahead_.add(p_.key, place.batch, place.kv_head, next, p_.D);
      ahead_.add(p_.value, place.batch, place.kv_head, next, p_.E);
      run_chunk(place, first, count);
    });
    if (p_.state && segment.is_last()) state_.write(p_.final_state, p_.final_key_sum, head);
  }

 private:
  void run_chunk(const Place& place, int64_t first, int64_t count) {
    load_half_rows(queries_.get(), p_.query, place.batch, place.head, first, count, p_.D);
    read_tokens(place, first, count);
    const int64_t depth = whole_blocks(p_.F);
    for (int64_t row = 0; row < count; row += kBlock) {
      for (int64_t n = 0; n <= row; n += kBlock) {
        ahead_.step();
        multiply_half(scores_.get() + row * kScorePitch + n, kScorePitch,
                      {queries_.get() + row * kHalfPitch, kHalfPitch,
                       key_columns_.get() + n * depth / 2, depth});
      }
    }
    for (int64_t row = 0; row < count; ++row) finish_row(row);
    multiply_values(count);
    const int64_t index = (place.batch * p_.H + place.head) * p_.M + first;
    if (p_.normalized) {
      scale_rows(out_.get(), inverse_, count, whole_blocks(p_.E));
      store_row(p_.denominator, index, denominator_, count);
    }
    store_rows(p_.out, index, out_.get(), count, p_.E);
    add_keys(state_, fade_, count);
  }

  // Weights of one query, and its denominator.
  void finish_row(int64_t row) {
    const int64_t end = row / kBlock * kBlock + kBlock;
    Vec<float> sum{};
    for (int64_t n = 0; n < end; n += 16) {
      const Vec<float> factor = load(fade_.weights(row, n));
      const Vec<float> score = load(scores_.get() + row * kScorePitch + n);
      const Vec<float> weight = factor != Vec<float>{} ? score * factor : Vec<float>{};
      sum += weight;
      store_half(weights_.get() + row * kTokenPitch + n, weight);
    }
    if (!p_.normalized) return;
    Vec<float> past{};
    for (int64_t d = 0; d < p_.F; d += 16) {
      past += widen_half(queries_.get() + row * kHalfPitch + d) * load(state_.sum() + d);
    }
    sum += past * splat(fade_.of_past()[row]);
    const float total = horizontal_sum<float>(sum) + static_cast<float>(p_.eps);
    denominator_[row] = total;
    inverse_[row] = total == 0 ? 0.0f : 1 / total;
  }

  void multiply_values(int64_t count) {
    const int64_t depth = whole_blocks(p_.F);
    pack_half_matrix(state_rows_.get(), state_.panels, state_.at(0, 0), p_.F);
    for (int64_t e = 0; e < p_.E; e += kBlock) {
      for (int64_t row = 0; row < count; row += kBlock) {
        ahead_.step();
        float* target = out_.get() + row * kRowPitch + e;
        const HalfProduct past{queries_.get() + row * kHalfPitch, kHalfPitch,
                               state_rows_.get() + e * depth / 2, depth};
        const HalfProduct near{weights_.get() + row * kTokenPitch, kTokenPitch,
                               value_rows_.get() + e * (kChunk / 2), row + kBlock};
        if (!fade_.any()) {
          multiply_half(target, kRowPitch, past, near);
          continue;
        }
        multiply_half(target, kRowPitch, past);
        scale_rows(target, fade_.of_past() + row, kBlock, kBlock);
        accumulate_half(target, kRowPitch, near);
      }
    }
  }

  State<float> state_;
  Fade<float> fade_;
  Scratch<uint16_t> queries_, weights_;
  Scratch<Pair> state_rows_;
  Scratch<float> scores_, out_;
  float denominator_[kChunk], inverse_[kChunk];
};

inline void half_forward(const Problem& p) {
  const Plan plan(p, p.B * p.H, kChunk);
  PartSums<float> parts(p, plan);
  parts.compute(p, plan, [&] { return HalfKeySums(p); }, part_of_keys, is_before_a_segment);
  const auto segments = static_cast<int64_t>(plan.segments.size());
  run_tasks(p.B * p.H * segments, [&](TaskQueue& queue) {
    HalfForward worker(p);
    for (int64_t i; (i = queue.next()) >= 0;) {
      worker.run(i / segments, plan.segments[i % segments], parts);
    }
  });
  clear_hidden<float>(p, plan.hidden);
}

}  // namespace attn::linear::ATTN_ISA

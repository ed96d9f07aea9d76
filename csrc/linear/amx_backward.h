// Backward of bfloat16 on AMX: backward.h and backward_keys.h with operands of 16 bits. Factors of
// rows, r and the decay, are applied to sums in float32.
#pragma once

namespace attn::linear::ATTN_ISA {

// r and -r grad_out·out of the rows of a chunk; 1 and 0 where nothing is normalised.
class RowFactors {
 public:
  float inverse[kChunk], delta[kChunk];

  void read(const Problem& p, const uint16_t* grad_out, const Place& place, int64_t first,
            int64_t count) {
    std::fill(inverse, inverse + kChunk, p.normalized ? 0.0f : 1.0f);
    std::fill(delta, delta + kChunk, 0.0f);
    if (!p.normalized) return;
    float out[kRowPitch] = {};
    const int64_t* stride = p.denominator.stride;
    for (int64_t r = 0; r < count; ++r) {
      float denominator;
      load_row(&denominator, p.denominator,
               place.batch * stride[0] + place.head * stride[1] + (first + r) * stride[2], 1, 1);
      if (denominator == 0) continue;
      load_padded(out, p.out, place.batch, place.head, first + r, p.E);
      Vec<float> along{};
      for (int64_t e = 0; e < p.E; e += 16) {
        along += widen_half(grad_out + r * kHalfPitch + e) * load(out + e);
      }
      inverse[r] = 1 / denominator;
      delta[r] = -inverse[r] * horizontal_sum<float>(along);
    }
  }
};

// 32 rows of a block of 32 columns at kRowPitch; inverse and delta may be null: ones.
// Row r: target = (target * inverse[r] + delta[r] * sums) * fade[r].
inline void finish_past(float* target, const float* inverse, const float* delta, const float* sums,
                        const float* fade) {
  const Vec<float> low = load(sums), high = load(sums + 16);
  for (int64_t r = 0; r < kBlock; ++r, target += kRowPitch) {
    const Vec<float> factor = splat(inverse == nullptr ? 1.0f : inverse[r]);
    const Vec<float> along = splat(delta == nullptr ? 1.0f : delta[r]);
    const Vec<float> left = splat(fade[r]);
    store(target, (load(target) * factor + along * low) * left);
    store(target + 16, (load(target + 16) * factor + along * high) * left);
  }
}

class HalfBackwardQueries : private HalfKeySums {
 public:
  HalfBackwardQueries(const Problem& p, const Gradients& grads)
      : HalfKeySums(p),
        grads_(grads),
        start_(p.F, p.E),
        state_(p.F, p.E),
        grad_out_(kChunk * kHalfPitch),
        weights_(kChunk * kTokenPitch),
        split_values_(whole_blocks(p.E) * kTokenPitch),
        value_columns_(kChunk * whole_blocks(p.E) / 2),
        key_rows_(kChunk / 2 * whole_blocks(p.F)),
        state_rows_(whole_blocks(p.E) / 2 * whole_blocks(p.F)),
        scores_(kChunk * kScorePitch),
        grad_(kChunk * kRowPitch) {}

  void run(int64_t head, const Segment& segment, const PartSums<float>& parts) {
    const Place place(p_, head);
    fade_.read(p_, place.head);
    start_forward(start_, static_cast<HalfKeySums&>(*this), parts, p_, place, fade_, segment);
    state_.clear();
    state_.read(start_, 0, p_.F);
    for_each_chunk(segment.queries(), false, [&](int64_t first, int64_t count, Interval next) {
      prefetch_chunk(ahead_, p_, grads_, place, next, /*with_queries=*/false);
      run_chunk(place, first, count);
    });
  }

 private:
  void run_chunk(const Place& place, int64_t first, int64_t count) {
    load_half_keys(keys_.get(), p_, place, first, count);
    load_half_rows(values_.get(), p_.value, place.batch, place.kv_head, first, count, p_.E);
    load_half_rows(grad_out_.get(), grads_.grad_out, place.batch, place.head, first, count, p_.E);
    rows_.read(p_, grad_out_.get(), place, first, count);
    pack_half_columns(value_columns_.get(), values_.get(), count, p_.E);
    pack_half_rows(key_rows_.get(), keys_.get(), count, p_.F);
    multiply_values(count);
    multiply_keys(count);
    store_rows(grads_.query, (place.batch * p_.H + place.head) * p_.M + first, grad_.get(), count,
               p_.D);
    add_keys_transposed(count);
  }

  // weights[m][n] = w(m, n) (r grad_out[m]·value[n] + delta[m])
  void multiply_values(int64_t count) {
    const int64_t depth = whole_blocks(p_.E);
    for (int64_t row = 0; row < count; row += kBlock) {
      for (int64_t n = 0; n <= row; n += kBlock) {
        ahead_.step();
        multiply_half(scores_.get() + row * kScorePitch + n, kScorePitch,
                      {grad_out_.get() + row * kHalfPitch, kHalfPitch,
                       value_columns_.get() + n * depth / 2, depth});
      }
    }
    for (int64_t row = 0; row < round_up(count, kBlock); ++row) {
      const Vec<float> inverse = splat(rows_.inverse[row]), delta = splat(rows_.delta[row]);
      for (int64_t n = 0; n < row / kBlock * kBlock + kBlock; n += 16) {
        const Vec<float> factor = load(fade_.weights(row, n));
        const Vec<float> score = load(scores_.get() + row * kScorePitch + n) * inverse + delta;
        store_half(weights_.get() + row * kTokenPitch + n,
                   factor != Vec<float>{} ? score * factor : Vec<float>{});
      }
    }
  }

  void multiply_keys(int64_t count) {
    const int64_t depth = whole_blocks(p_.E);
    pack_half_matrix(state_rows_.get(), state_.panels, state_.at(0, 0), p_.E);
    for (int64_t f = 0; f < p_.F; f += kBlock) {
      for (int64_t row = 0; row < count; row += kBlock) {
        ahead_.step();
        float* target = grad_.get() + row * kRowPitch + f;
        const HalfProduct past{grad_out_.get() + row * kHalfPitch, kHalfPitch,
                               state_rows_.get() + f * depth / 2, depth};
        const HalfProduct near{weights_.get() + row * kTokenPitch, kTokenPitch,
                               key_rows_.get() + f * (kChunk / 2), row + kBlock};
        if (!fade_.any() && !p_.normalized) {
          multiply_half(target, kRowPitch, past, near);
          continue;
        }
        multiply_half(target, kRowPitch, past);
        finish_past(target, rows_.inverse + row, rows_.delta + row, state_.at(p_.E, f),
                    fade_.of_past() + row);
        accumulate_half(target, kRowPitch, near);
      }
    }
  }

  void add_keys_transposed(int64_t count) {
    float factors[kChunk] = {};
    std::copy(fade_.of_keys(count), fade_.of_keys(count) + count, factors);
    const float left = fade_.after(count);
    split_columns(split_values_.get(), value_columns_.get(), factors, count, p_.E);
    // The row of key sums may lie in the last block of rows: there only the factor reaches it.
    std::vector<float> sums(whole_blocks(p_.F));
    for (int64_t f = 0; f < p_.F; f += kBlock) {
      std::copy(state_.at(p_.E, f), state_.at(p_.E, f) + kBlock, sums.data() + f);
    }
    update_half_sum(sums.data(), left, keys_.get(), factors, count, p_.F);
    update_half_matrix(state_.panels, state_.at(0, 0), p_.E, left, split_values_.get(),
                       key_rows_.get(), count, ahead_);
    for (int64_t f = 0; f < p_.F; f += kBlock) {
      std::copy(sums.data() + f, sums.data() + f + kBlock, state_.at(p_.E, f));
    }
  }

  const Gradients& grads_;
  State<float> start_;
  TransposedState<float> state_;
  Fade<float> fade_;
  RowFactors rows_;
  Scratch<uint16_t> grad_out_, weights_, split_values_;
  Scratch<Pair> value_columns_, key_rows_, state_rows_;
  Scratch<float> scores_, grad_;
};

}  // namespace attn::linear::ATTN_ISA

// Backward. With r = 1 / denominator and G[m] = (r grad_out[m], -r grad_out[m]·out[m]), the
// gradient of numerators and denominator, and values extended by a one, V[n] = (v[n], 1):
//   grad_phi_query[m] = sum_n w(m, n) (G[m]·V[n]) phi_key[n]
//   grad_phi_key[n]   = sum_m w(m, n) (G[m]·V[n]) phi_query[m]
//   grad_value[n]     = sum_m w(m, n) (phi_query[m]·phi_key[n]) r grad_out[m]
// The first is a walk forward with the transposed state of the forward, the others are a walk from
// the last token on (backward_keys.h) with the gradient of the state. Each ends in the feature map.
#pragma once

namespace attn::linear::ATTN_ISA {

// Width of extended values and gradients.
inline int64_t extended_width(const Problem& p) {
  return p.E + (p.normalized || p.state ? 1 : 0);
}

template <class T>
void load_extended_values(T* rows, const Problem& p, const Place& place, int64_t first,
                          int64_t count) {
  load_rows(rows, p.value, place.batch, place.kv_head, first, count, p.E);
  if (extended_width(p) == p.E) return;
  for (int64_t r = 0; r < count; ++r) rows[r * kRowPitch + p.E] = 1;
}

// Rows of G; `out` has room for as many rows.
template <class T>
void load_gradients(T* rows, T* out, const Problem& p, const Gradients& grads, const Place& place,
                    int64_t first, int64_t count) {
  load_rows(rows, grads.grad_out, place.batch, place.head, first, count, p.E);
  if (!p.normalized) return;
  load_rows(out, p.out, place.batch, place.head, first, count, p.E);
  const int64_t* stride = p.denominator.stride;
  T denominators[kChunk];
  load_row(denominators, p.denominator,
           place.batch * stride[0] + place.head * stride[1] + first * stride[2], stride[2], count);
  for (int64_t r = 0; r < count; ++r) {
    T* row = rows + r * kRowPitch;
    if (denominators[r] == 0) {
      clear_rows(rows, r, r + 1);
      continue;
    }
    const Vec<T> inverse = splat<T>(1 / denominators[r]);
    Vec<T> along{};
    for (int64_t e = 0; e < p.E; e += Simd<T>::lanes) {
      const Vec<T> scaled = load(row + e) * inverse;
      along += scaled * load(out + r * kRowPitch + e);
      store<T>(row + e, scaled);
    }
    row[p.E] = -horizontal_sum<T>(along);
  }
}

// Gradients of a block of features in rows at kRowPitch, added to the gradient of the inputs. With
// one block `grad` may be `grad_features`.
template <class T>
void chain_features(T* grad, T* grad_features, const Problem& p, const View& v, int64_t batch,
                    int64_t head, int64_t first, int64_t count, Block block) {
  if (p.feature_map == FeatureMap::identity) return;
  T row[kRowPitch];
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = r * kRowPitch;
    if (p.feature_map != FeatureMap::taylor) {
      load_padded(row, v, batch, head, first + r, p.D);
      chain_row(p.feature_map, grad_features + at, row, p.D);
      continue;
    }
    load_taylor_row(row, p, v, batch, head, first + r);
    if (block.begin == 0) std::fill(grad + at, grad + at + kRowPitch, T(0));
    chain_taylor(grad + at, grad_features + at, row, p.D, block);
    if (block.end < p.F) continue;
    const T scale = taylor_scale<T>(p.D);
    for (int64_t d = 0; d < p.D; ++d) grad[at + d] *= scale;
  }
}

// Announces what both walks of the backward read of queries and keys.
inline void prefetch_chunk(Prefetch& ahead, const Problem& p, const Gradients& grads,
                           const Place& place, Interval next, bool with_queries) {
  ahead.clear();
  ahead.add(grads.grad_out, place.batch, place.head, next, p.E);
  if (p.normalized) ahead.add(p.out, place.batch, place.head, next, p.E);
  if (with_queries) ahead.add(p.query, place.batch, place.head, next, p.D);
  if (!p.causal) return;
  ahead.add(p.key, place.batch, place.kv_head, next, p.D);
  ahead.add(p.value, place.batch, place.kv_head, next, p.E);
}

template <class T>
class BackwardQueries {
 public:
  BackwardQueries(const Problem& p, const Gradients& grads)
      : p_(p),
        grads_(grads),
        width_(extended_width(p)),
        sums_(p),
        start_(p.F, p.E),
        state_(p.F, p.E),
        grad_out_(kChunk * kRowPitch),
        values_(kChunk * kRowPitch),
        value_columns_(kChunk * width_),
        keys_(kChunk * kRowPitch),
        key_panels_(kChunk * round_up(feature_block(p.F, kFeatureBlock<T>), kPanel<T>)),
        scores_(kChunk * kScorePitch),
        grad_features_(kChunk * kRowPitch),
        grad_(kChunk * kRowPitch) {}

  void run(int64_t head, const Segment& segment, const PartSums<T>& parts) {
    const Place place(p_, head);
    fade_.read(p_, place.head);
    start_forward(start_, sums_, parts, p_, place, fade_, segment);
    state_.clear();
    state_.read(start_, 0, p_.F);
    for_each_chunk(segment.queries(), false, [&](int64_t first, int64_t count, Interval next) {
      const bool with_queries = p_.feature_map != FeatureMap::identity;
      prefetch_chunk(ahead_, p_, grads_, place, next, with_queries);
      ahead_.add(grads_.query, place.batch, place.head, next, p_.D);
      run_chunk(place, first, count);
    });
  }

 private:
  void run_chunk(const Place& place, int64_t first, int64_t count) {
    load_gradients(grad_out_.get(), keys_.get(), p_, grads_, place, first, count);
    if (p_.causal) {
      load_extended_values(values_.get(), p_, place, first, count);
      pack_columns(value_columns_.get(), values_.get(), count, width_);
      multiply_scores(scores_.get(), grad_out_.get(), value_columns_.get(), width_, count, fade_,
                      ahead_, true, true);
      if (fade_.any()) scale_rows(values_.get(), fade_.of_keys(count), count, width_);
    }
    T* grad = p_.feature_map == FeatureMap::taylor ? grad_.get() : grad_features_.get();
    for_each_block<T>(p_, [&](Block block) {
      if (p_.causal) {
        load_keys(keys_.get(), p_, place, first, count, block);
        pack_panels(key_panels_.get(), keys_.get(), count, block.size());
      }
      multiply_keys(count, block);
      chain_features(grad, grad_features_.get(), p_, p_.query, place.batch, place.head, first,
                     count, block);
    });
    const int64_t index = (place.batch * p_.H + place.head) * p_.M + first;
    store_rows(grads_.query, index, grad, count, p_.D);
  }

  // Gradients of the features of queries; then the keys are added to the state.
  void multiply_keys(int64_t count, Block block) {
    for (int64_t f = 0; f < block.size(); f += kPanel<T>) {
      T* state = state_.at(0, block.begin + f);
      const T* keys = key_panels_.get() + f * kChunk;
      for (int64_t row = 0; row < count; row += kTileRows) {
        ahead_.step();
        T* target = grad_features_.get() + row * kRowPitch + f;
        const int64_t seen = p_.causal ? std::min<int64_t>(row + kTileRows, count) : 0;
        multiply_two<kScorePitch, 1, T>(
            nullptr, {grad_out_.get() + row * kRowPitch, state, width_},
            fade_.any() ? fade_.of_past() + row : nullptr,
            {scores_.get() + row * kScorePitch, keys, seen},
            [=](const Tile<T>& tile) ATTN_INLINE_LAMBDA { store_tile(target, tile, kRowPitch); });
      }
      for (int64_t e = 0; e < width_ && p_.causal; e += kTileRows) {
        ahead_.step();
        update_tile(state + e * kPanel<T>, fade_.after(count), values_.get() + e, keys, count);
      }
    }
  }

  const Problem& p_;
  const Gradients& grads_;
  int64_t width_;
  KeySums<T> sums_;
  State<T> start_;
  TransposedState<T> state_;
  Fade<T> fade_;
  Prefetch ahead_;
  Scratch<T> grad_out_, values_, value_columns_, keys_, key_panels_, scores_, grad_features_, grad_;
};

}  // namespace attn::linear::ATTN_ISA

// One token of decoding: state = decay state + phi(key) value, read by the query as it is written.
#pragma once

namespace attn::linear::ATTN_ISA {

template <class T>
class Step {
 public:
  explicit Step(const Problem& p)
      : p_(p),
        query_(p.F + kMaxWidth + kRowPitch),
        key_(p.F + kMaxWidth + kRowPitch),
        value_(kRowPitch),
        row_(kRowPitch),
        out_(kRowPitch) {}

  void run(int64_t head) {
    const Place place(p_, head);
    load_token(query_.get(), p_.query, place.batch, place.head);
    load_token(key_.get(), p_.key, place.batch, place.kv_head);
    load_padded(value_.get(), p_.value, place.batch, place.kv_head, 0, p_.E);
    T decay = 1;
    if (p_.decay) load_row(&decay, p_.decay, place.head * p_.decay.stride[0], 1, 1);
    const T denominator = update_sum(place, decay);
    std::fill(out_.get(), out_.get() + p_.E, T(0));
    T* state = static_cast<T*>(p_.state.data) + place.batch * p_.state.stride[0] +
               place.head * p_.state.stride[1];
    for (int64_t f = 0; f < p_.F; ++f) {
      update_row(state + f * p_.state.stride[2], decay, key_.get()[f], query_.get()[f]);
    }
    const T inverse = denominator == 0 ? T(0) : 1 / denominator;
    for (int64_t e = 0; e < p_.E && p_.normalized; ++e) out_.get()[e] *= inverse;
    store_row(p_.out, head * p_.E, out_.get(), p_.E);
  }

 private:
  void load_token(T* features, const View& v, int64_t batch, int64_t head) {
    for_each_block<T>(p_, [&](Block block) {
      if (p_.feature_map == FeatureMap::taylor) {
        load_taylor_row(row_.get(), p_, v, batch, head, 0);
        taylor_features(features + block.begin, row_.get(), p_.D, block);
      } else {
        load_padded(features, v, batch, head, 0, p_.D);
        map_row(p_.feature_map, features, p_.D);
      }
    });
  }

  // Returns the denominator.
  T update_sum(const Place& place, T decay) {
    const int64_t* stride = p_.key_sum.stride;
    T* sum = static_cast<T*>(p_.key_sum.data) + place.batch * stride[0] + place.head * stride[1];
    T total = 0;
    for (int64_t f = 0; f < p_.F; ++f) {
      T& element = sum[f * stride[2]];
      element = element * decay + key_.get()[f];
      total += element * query_.get()[f];
    }
    return total + static_cast<T>(p_.eps);
  }

  void update_row(T* row, T decay, T key, T query) {
    const int64_t stride = p_.state.stride[3];
    T* out = out_.get();
    const T* value = value_.get();
    if (stride == 1) {
      for (int64_t e = 0; e < p_.E; ++e) {
        row[e] = row[e] * decay + key * value[e];
        out[e] += row[e] * query;
      }
      return;
    }
    for (int64_t e = 0; e < p_.E; ++e) {
      T& element = row[e * stride];
      element = element * decay + key * value[e];
      out[e] += element * query;
    }
  }

  const Problem& p_;
  Scratch<T> query_, key_, value_, row_, out_;
};

template <class T>
void step(const Problem& p) {
  run_tasks(p.B * p.H, [&](TaskQueue& queue) {
    Step<T> worker(p);
    for (int64_t i; (i = queue.next()) >= 0;) worker.run(i);
  });
}

}  // namespace attn::linear::ATTN_ISA

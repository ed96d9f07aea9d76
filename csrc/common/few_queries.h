// Forward for a handful of queries per key head (decoding): keys and values are read once, where
// they are, since packing them would cost more than the products.
#pragma once

namespace attn::ATTN_ISA {

constexpr int64_t kFewQueries = 4;  // query heads of a group times M

inline bool has_few_queries(const AttentionProblem& p) {
  return p.Hk > 0 && p.H / p.Hk * p.M <= kFewQueries && p.B * p.Hk >= num_threads();
}

// A room derives from it and gives load_query(row, batch, head, m), which fills a row of query_,
// and score_key(kv_head, n), which writes the scores of key n.
template <class T, class Room>
class FewQueries {
 public:
  // All queries of one of the B * Hk key heads.
  void run(int64_t kv_head) {
    const int64_t batch = kv_head / p_.Hk;
    Room& room = static_cast<Room&>(*this);
    Interval all{p_.N, 0};
    for (int64_t r = 0; r < rows_; ++r) {
      room.load_query(query_.get() + r * kRowPitch, batch, head(kv_head, r), r % p_.M);
      const Interval keys = p_.visible.of(batch, r % p_.M);
      all = {std::min(all.begin, keys.begin), std::max(all.end, keys.end)};
    }
    for (int64_t n = all.begin; n < all.end; ++n) room.score_key(kv_head, n);
    for (int64_t r = 0; r < rows_; ++r) soften_row(batch, head(kv_head, r), r, all);
    multiply_values(kv_head, all);
    for (int64_t r = 0; r < rows_; ++r) finish_row(batch, head(kv_head, r), r);
  }

 protected:
  FewQueries(const AttentionProblem& p, const ScoreParameters<T>& parameters)
      : p_(p),
        score_parameters_(parameters),
        rows_(p.H / p.Hk * p.M),
        pitch_(round_up(p.N, Simd<T>::lanes) + Simd<T>::lanes),
        query_(rows_ * kRowPitch),
        scores_(rows_ * pitch_),
        out_(rows_ * kRowPitch),
        copies_(kUnroll * kRowPitch) {}

  // Row n of key or value as it is, or copied.
  const T* row(const View& v, int64_t kv_head, int64_t n, int64_t width, T* copy) const {
    constexpr ScalarType dtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
    const int64_t offset =
        kv_head / p_.Hk * v.stride[0] + kv_head % p_.Hk * v.stride[1] + n * v.stride[2];
    if (v.dtype == dtype && v.stride[3] == 1) return static_cast<const T*>(v.data) + offset;
    load_row(copy, v, offset, v.stride[3], width);
    return copy;
  }

 private:
  static constexpr int64_t kUnroll = 4;  // values per step

  int64_t head(int64_t kv_head, int64_t r) const {
    return kv_head % p_.Hk * (p_.H / p_.Hk) + r / p_.M;
  }

  // Scores to weights relative to the largest; 0 for what the query does not see.
  void soften_row(int64_t batch, int64_t head, int64_t r, Interval all) {
    const QueryBlock q(p_, batch, head, r % p_.M, 1);
    T* scores = scores_.get() + r * pitch_;
    hide_outside(scores, all.begin, all.end, q.begin[0], q.end[0]);
    constexpr int64_t step = kMaxWidth;
    for (int64_t n = q.begin[0]; n < q.end[0] && p_.has_extras(); n += step) {
      add_extras(scores + n, copies_.get(), p_, score_parameters_, q, r % p_.M, n,
                 std::min(n + step, q.end[0]));
    }
    constexpr T hidden = -std::numeric_limits<T>::infinity();
    constexpr int lanes = Simd<T>::lanes;
    const int64_t end = all.begin + round_up(std::max<int64_t>(all.end - all.begin, 0), lanes);
    std::fill(scores + std::min(all.end, end), scores + end, hidden);
    Vec<T> largest = splat<T>(hidden);
    for (int64_t n = all.begin; n < end; n += lanes) {
      largest = maximum<T>(load(scores + n), largest);
    }
    largest_[r] = horizontal_max<T>(largest);
    // Subtracting -inf would give NaN.
    const Vec<T> shift = splat<T>(largest_[r] == hidden ? T(0) : largest_[r]);
    Vec<T> sum{};
    for (int64_t n = all.begin; n < end; n += lanes) {
      const Vec<T> weight = exp2_flushed<T>((load(scores + n) - shift) * splat<T>(T(kLog2E)));
      store<T>(scores + n, weight);
      sum += weight;
    }
    sum_[r] = horizontal_sum<T>(sum);
  }

  void multiply_values(int64_t kv_head, Interval keys) {
    std::fill(out_.get(), out_.get() + rows_ * kRowPitch, T(0));
    for (int64_t n = keys.begin; n < keys.end; n += kUnroll) {
      const T* values[kUnroll];
      for (int64_t i = 0; i < kUnroll; ++i) {
        values[i] = row(p_.value, kv_head, std::min(n + i, keys.end - 1), p_.E,
                        copies_.get() + i * kRowPitch);
      }
      for (int64_t r = 0; r < rows_; ++r) {
        const T* weights = scores_.get() + r * pitch_ + n;
        T weight[kUnroll] = {};
        std::copy(weights, weights + std::min(kUnroll, keys.end - n), weight);
        T* out = out_.get() + r * kRowPitch;
        for (int64_t e = 0; e < p_.E; ++e) {
          out[e] += (weight[0] * values[0][e] + weight[1] * values[1][e]) +
                    (weight[2] * values[2][e] + weight[3] * values[3][e]);
        }
      }
    }
  }

  void finish_row(int64_t batch, int64_t head, int64_t r) {
    const Total total(largest_[r], sum_[r], score_parameters_.sink[head]);
    const int64_t index = (batch * p_.H + head) * p_.M + r % p_.M;
    static_cast<T*>(p_.lse.data)[index] = static_cast<T>(total.lse);
    T* out = out_.get() + r * kRowPitch;
    for (int64_t e = 0; e < p_.E; ++e) out[e] *= static_cast<T>(total.factor);
    store_row(p_.out, index * p_.E, out, p_.E);
  }

  const AttentionProblem& p_;
  const ScoreParameters<T>& score_parameters_;

 protected:
  int64_t rows_;   // query heads of the group times M
  int64_t pitch_;  // of scores, room for a vector that starts at any key
  Scratch<T> query_, scores_, out_, copies_;

 private:
  T largest_[kFewQueries];
  double sum_[kFewQueries];
};

// Worker(arguments...) for every thread that there is work for.
template <class Worker, class... Arguments>
void run_few_queries(const AttentionProblem& p, const Arguments&... arguments) {
  run_tasks(p.M == 0 ? 0 : p.B * p.Hk, [&](TaskQueue& queue) {
    Worker worker(arguments...);
    for (int64_t i; (i = queue.next()) >= 0;) worker.run(i);
  });
}

}  // namespace attn::ATTN_ISA

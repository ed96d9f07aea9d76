// Weights of the edges of a row, and the values that they add up.
#pragma once

namespace attn::l1::sparse::ATTN_ISA {

// x = exp(x - largest), in place; returns the sum. x <= largest.
template <class T>
T exponentiate(T* x, int64_t count, T largest) {
  constexpr int lanes = Simd<T>::lanes;
  const Vec<T> shift = splat<T>(largest), log2_e = splat<T>(T(1.44269504088896340736));
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vec<T> power = exp2_flushed<T>((load(x + i) - shift) * log2_e);
    store<T>(x + i, power);
    sum += power;
  }
  T rest[lanes];
  for (int lane = 0; lane < lanes; ++lane) rest[lane] = i + lane < count ? x[i + lane] : largest;
  store<T>(rest, exp2_flushed<T>((load(rest) - shift) * log2_e));
  T total = horizontal_sum<T>(sum);
  for (int lane = 0; i + lane < count; ++lane) total += x[i + lane] = rest[lane];
  return total;
}

template <class T>
class Forward {
 public:
  explicit Forward(const Problem& p) : p_(p), room_(3 * kRowPitch) {}

  void run(int64_t matrix, int64_t row) {
    write_weights(matrix, row);
    if (!p_.reverse) write_sums(matrix, row);
  }

  // out of a row, from the weights of its edges, and with `reverse` from those of its column.
  void write_sums(int64_t matrix, int64_t row) {
    const int64_t batch = matrix / p_.H, kv_head = matrix % p_.H / (p_.H / p_.Hk);
    RowSum<T> sum(room_.get(), p_.E);
    T* room = room_.get() + 2 * kRowPitch;
    const Edges& edges = p_.edges;
    const T* weight = per_edge<T>(p_.weight, matrix, edges.count);
    const Rows<T> values(p_.value, batch, kv_head, p_.E);
    for (int64_t e = edges.row_start[row]; e < edges.row_start[row + 1]; ++e) {
      values.prefetch(edges.row_keys[std::min(e + kAhead, edges.count - 1)]);
      sum.add_scaled(weight[e], values.at(edges.row_keys[e], room));
    }
    if (p_.reverse) {
      const Rows<T> reverse(p_.reverse, batch, kv_head, p_.E);
      for (int64_t i = edges.col_start[row]; i < edges.col_start[row + 1]; ++i) {
        reverse.prefetch(edges.col_queries[std::min(i + kAhead, edges.count - 1)]);
        sum.add_scaled(weight[edges.col_edges[i]], reverse.at(edges.col_queries[i], room));
      }
    }
    sum.store(p_.out, matrix * p_.M + row, T(1));
  }

 private:
  void write_weights(int64_t matrix, int64_t row) {
    const int64_t batch = matrix / p_.H, head = matrix % p_.H;
    const Edges& edges = p_.edges;
    const int64_t begin = edges.row_start[row], end = edges.row_start[row + 1];
    T* weight = per_edge<T>(p_.weight, matrix, edges.count);
    const Rows<T> keys(p_.key, batch, head / (p_.H / p_.Hk), p_.D);
    const T* query = Rows<T>(p_.query, batch, head, p_.D).at(row, room_.get());
    const T scale = static_cast<T>(p_.scale), huge = std::numeric_limits<T>::max();
    T largest = p_.sink ? T(0) : -huge;
    for (int64_t e = begin; e < end; ++e) {
      keys.prefetch(edges.row_keys[std::min(e + kAhead, edges.count - 1)]);
      const T* key = keys.at(edges.row_keys[e], room_.get() + kRowPitch);
      // A distance beyond every number is as far as numbers go: no infinity meets another.
      const T far = std::min(distance(query, key, p_.D), huge);
      weight[e] = std::max(std::min(-scale * far, huge), -huge);
      largest = std::max(largest, weight[e]);
    }
    if (!p_.softmax) {
      for (int64_t e = begin; e < end; ++e) weight[e] = std::exp(weight[e]);
      return;
    }
    T total = exponentiate(weight + begin, end - begin, largest);
    if (p_.sink) total += std::exp(-largest);
    const T inverse = T(1) / total;
    for (int64_t e = begin; e < end; ++e) weight[e] *= inverse;
  }

  const Problem& p_;
  Scratch<T> room_;
};

// The second pass over the rows, when all weights are there.
template <class T>
struct Sums {
  Forward<T> forward;
  void run(int64_t matrix, int64_t row) { forward.write_sums(matrix, row); }
};

template <class T>
void forward(const Problem& p) {
  if (p.Hk == 0) return;
  run_rows(p.B * p.H, p.M, [&] { return Forward<T>(p); });
  if (p.reverse) run_rows(p.B * p.H, p.M, [&] { return Sums<T>{Forward<T>(p)}; });
}

}  // namespace attn::l1::sparse::ATTN_ISA

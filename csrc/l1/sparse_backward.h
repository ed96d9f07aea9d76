// Gradients by rows (of scores, query and reverse), then by columns (of key and value).
#pragma once

namespace attn::l1::sparse::ATTN_ISA {

// A matrix is a key/value head: its query heads add up.
template <class T>
class RowsBackward {
 public:
  RowsBackward(const Problem& p, const Gradients& g) : p_(p), g_(g), room_(6 * kRowPitch) {}

  void run(int64_t matrix, int64_t row) {
    const int64_t batch = matrix / p_.Hk, kv_head = matrix % p_.Hk, group = p_.H / p_.Hk;
    T* reverse_sum = room(0);
    std::fill(reverse_sum, reverse_sum + p_.E, T(0));
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const T delta = grad_weights(batch, head, kv_head, row, reverse_sum);
      if (g_.grad_score) grad_scores(batch, head, kv_head, row, p_.softmax ? delta : T(0));
    }
    if (g_.reverse) finish_row(g_.reverse, matrix * p_.M + row, reverse_sum, T(1), p_.E);
  }

 private:
  T* room(int64_t i) const { return room_.get() + i * kRowPitch; }

  // Writes the gradients of the weights of a row, and returns their sum by weight.
  T grad_weights(int64_t batch, int64_t head, int64_t kv_head, int64_t row, T* reverse_sum) {
    const Edges& edges = p_.edges;
    const int64_t matrix = batch * p_.H + head;
    const T* weight = per_edge<T>(p_.weight, matrix, edges.count);
    T* grad_score = g_.grad_score ? per_edge<T>(g_.grad_score, matrix, edges.count) : nullptr;
    const Rows<T> values(p_.value, batch, kv_head, p_.E), reverse(p_.reverse, batch, kv_head, p_.E);
    const Rows<T> grads(g_.grad_out, batch, head, p_.E);
    const T* grad_out = grads.at(row, room(1));
    const T* reverse_row = reverse ? reverse.at(row, room(2)) : nullptr;
    T delta = 0;
    for (int64_t e = edges.row_start[row]; e < edges.row_start[row + 1]; ++e) {
      const int64_t key = edges.row_keys[e];
      const int64_t next = edges.row_keys[std::min(e + kAhead, edges.count - 1)];
      T grad = 0;
      if (grad_score != nullptr) {
        values.prefetch(next);
        grad = dot(grad_out, values.at(key, room(3)), p_.E);
      }
      if (reverse_row != nullptr) {
        grads.prefetch(next);
        const T* at_key = grads.at(key, room(4));
        if (grad_score != nullptr) grad += dot(reverse_row, at_key, p_.E);
        if (g_.reverse) add_scaled(reverse_sum, weight[e], at_key, p_.E);
      }
      if (grad_score != nullptr) grad_score[e] = grad;
      delta += weight[e] * grad;
    }
    return delta;
  }

  // Gradients of the weights of a row to those of the scores, in place; and the query's.
  void grad_scores(int64_t batch, int64_t head, int64_t kv_head, int64_t row, T delta) {
    const Edges& edges = p_.edges;
    const int64_t matrix = batch * p_.H + head;
    const int64_t begin = edges.row_start[row], end = edges.row_start[row + 1];
    const T* weight = per_edge<T>(p_.weight, matrix, edges.count);
    T* grad = per_edge<T>(g_.grad_score, matrix, edges.count);
    for (int64_t e = begin; e < end; ++e) grad[e] = weight[e] * (grad[e] - delta);
    if (!g_.query) return;
    const Rows<T> keys(p_.key, batch, kv_head, p_.D);
    const T* query = Rows<T>(p_.query, batch, head, p_.D).at(row, room(3));
    T* sum = room(5);
    std::fill(sum, sum + p_.D, T(0));
    for (int64_t e = begin; e < end; ++e) {
      keys.prefetch(edges.row_keys[std::min(e + kAhead, edges.count - 1)]);
      add_signs(sum, grad[e], query, keys.at(edges.row_keys[e], room(4)), p_.D);
    }
    finish_row(g_.query, matrix * p_.M + row, sum, static_cast<T>(-p_.scale), p_.D);
  }

  const Problem& p_;
  const Gradients& g_;
  Scratch<T> room_;
};

template <class T>
class ColumnsBackward {
 public:
  ColumnsBackward(const Problem& p, const Gradients& g) : p_(p), g_(g), room_(5 * kRowPitch) {}

  void run(int64_t matrix, int64_t column) {
    const int64_t batch = matrix / p_.Hk, kv_head = matrix % p_.Hk, group = p_.H / p_.Hk;
    T *key_sum = room_.get(), *value_sum = room_.get() + kRowPitch;
    std::fill(key_sum, key_sum + p_.D, T(0));
    std::fill(value_sum, value_sum + p_.E, T(0));
    const Rows<T> keys(p_.key, batch, kv_head, p_.D);
    const T* key = g_.key ? keys.at(column, room_.get() + 2 * kRowPitch) : nullptr;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      add_head(batch, head, column, key, key_sum, value_sum);
    }
    const int64_t place = matrix * p_.N + column;
    if (g_.key) finish_row(g_.key, place, key_sum, static_cast<T>(p_.scale), p_.D);
    if (g_.value) finish_row(g_.value, place, value_sum, T(1), p_.E);
  }

 private:
  void add_head(int64_t batch, int64_t head, int64_t column, const T* key, T* key_sum,
                T* value_sum) {
    const Edges& edges = p_.edges;
    const int64_t matrix = batch * p_.H + head;
    const T* weight = per_edge<T>(p_.weight, matrix, edges.count);
    const T* grad_score = g_.key ? per_edge<T>(g_.grad_score, matrix, edges.count) : nullptr;
    const Rows<T> queries(p_.query, batch, head, p_.D), grads(g_.grad_out, batch, head, p_.E);
    T* room = room_.get() + 3 * kRowPitch;
    for (int64_t i = edges.col_start[column]; i < edges.col_start[column + 1]; ++i) {
      const int64_t query = edges.col_queries[i], edge = edges.col_edges[i];
      const int64_t next = edges.col_queries[std::min(i + kAhead, edges.count - 1)];
      if (key != nullptr) {
        queries.prefetch(next);
        add_signs(key_sum, grad_score[edge], queries.at(query, room), key, p_.D);
      }
      if (g_.value) {
        grads.prefetch(next);
        add_scaled(value_sum, weight[edge], grads.at(query, room + kRowPitch), p_.E);
      }
    }
  }

  const Problem& p_;
  const Gradients& g_;
  Scratch<T> room_;
};

template <class T>
void backward(const Problem& p, const Gradients& g) {
  if (p.Hk == 0) return;
  if (g.grad_score || g.reverse) {
    run_rows(p.B * p.Hk, p.M, [&] { return RowsBackward<T>(p, g); });
  }
  if (g.key || g.value) run_rows(p.B * p.Hk, p.N, [&] { return ColumnsBackward<T>(p, g); });
}

}  // namespace attn::l1::sparse::ATTN_ISA

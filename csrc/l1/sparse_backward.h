// Gradients by rows (of scores, query and reverse), then by columns (of key and value).
#pragma once

namespace attn::l1::sparse::ATTN_ISA {

// A matrix is a key/value head: its query heads add up.
template <class T>
class RowsBackward {
 public:
  RowsBackward(const Problem& p, const Gradients& g) : p_(p), g_(g), room_(8 * kRowPitch) {}

  void run(int64_t matrix, int64_t row) {
    const int64_t batch = matrix / p_.Hk, kv_head = matrix % p_.Hk, group = p_.H / p_.Hk;
    RowSum<T> reverse_sum(room(0), p_.E);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const T delta = grad_weights(batch, head, kv_head, row, reverse_sum);
      if (g_.grad_score) grad_scores(batch, head, kv_head, row, p_.softmax ? delta : T(0));
    }
    if (g_.reverse) reverse_sum.store(g_.reverse, matrix * p_.M + row, T(1));
  }

 private:
  T* room(int64_t i) const { return room_.get() + i * kRowPitch; }

  // Writes the gradients of the weights of a row, and returns their sum by weight.
  T grad_weights(int64_t batch, int64_t head, int64_t kv_head, int64_t row,
                 RowSum<T>& reverse_sum) {
    const Edges& edges = p_.edges;
    const int64_t matrix = batch * p_.H + head;
    const T* weight = per_edge<T>(p_.weight, matrix, edges.count);
    T* grad_score = g_.grad_score ? per_edge<T>(g_.grad_score, matrix, edges.count) : nullptr;
    const Rows<T> values(p_.value, batch, kv_head, p_.E), reverse(p_.reverse, batch, kv_head, p_.E);
    const Rows<T> grads(g_.grad_out, batch, head, p_.E);
    const T* grad_out = grads.at(row, room(2));
    const T* reverse_row = reverse ? reverse.at(row, room(3)) : nullptr;
    const int64_t begin = edges.row_start[row], end = edges.row_start[row + 1];
    for (int64_t e = begin; e < end; ++e) {
      const int64_t key = edges.row_keys[e];
      const int64_t next = edges.row_keys[std::min(e + kAhead, edges.count - 1)];
      T grad = 0;
      if (grad_score != nullptr) {
        values.prefetch(next);
        grad = dot(grad_out, values.at(key, room(4)), p_.E);
      }
      if (reverse_row != nullptr) {
        grads.prefetch(next);
        const T* at_key = grads.at(key, room(5));
        if (grad_score != nullptr) grad += dot(reverse_row, at_key, p_.E);
        if (g_.reverse) reverse_sum.add_scaled(weight[e], at_key);
      }
      if (grad_score != nullptr) grad_score[e] = grad;
    }
    return grad_score == nullptr ? T(0) : dot(weight + begin, grad_score + begin, end - begin);
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
    const T* query = Rows<T>(p_.query, batch, head, p_.D).at(row, room(2));
    RowSum<T> sum(room(6), p_.D);
    for (int64_t e = begin; e < end; ++e) {
      keys.prefetch(edges.row_keys[std::min(e + kAhead, edges.count - 1)]);
      sum.add_signs(grad[e], query, keys.at(edges.row_keys[e], room(3)));
    }
    sum.store(g_.query, matrix * p_.M + row, static_cast<T>(-p_.scale));
  }

  const Problem& p_;
  const Gradients& g_;
  Scratch<T> room_;
};

template <class T>
class ColumnsBackward {
 public:
  ColumnsBackward(const Problem& p, const Gradients& g) : p_(p), g_(g), room_(7 * kRowPitch) {}

  void run(int64_t matrix, int64_t column) {
    const int64_t batch = matrix / p_.Hk, kv_head = matrix % p_.Hk, group = p_.H / p_.Hk;
    RowSum<T> key_sum(room_.get(), p_.D), value_sum(room_.get() + 2 * kRowPitch, p_.E);
    const Rows<T> keys(p_.key, batch, kv_head, p_.D);
    const T* key = g_.key ? keys.at(column, room_.get() + 4 * kRowPitch) : nullptr;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      add_head(batch, head, column, key, key_sum, value_sum);
    }
    const int64_t place = matrix * p_.N + column;
    if (g_.key) key_sum.store(g_.key, place, static_cast<T>(p_.scale));
    if (g_.value) value_sum.store(g_.value, place, T(1));
  }

 private:
  void add_head(int64_t batch, int64_t head, int64_t column, const T* key, RowSum<T>& key_sum,
                RowSum<T>& value_sum) {
    const Edges& edges = p_.edges;
    const int64_t matrix = batch * p_.H + head;
    const T* weight = per_edge<T>(p_.weight, matrix, edges.count);
    const T* grad_score = g_.key ? per_edge<T>(g_.grad_score, matrix, edges.count) : nullptr;
    const Rows<T> queries(p_.query, batch, head, p_.D), grads(g_.grad_out, batch, head, p_.E);
    T* room = room_.get() + 5 * kRowPitch;
    for (int64_t i = edges.col_start[column]; i < edges.col_start[column + 1]; ++i) {
      const int64_t query = edges.col_queries[i], edge = edges.col_edges[i];
      const int64_t next = edges.col_queries[std::min(i + kAhead, edges.count - 1)];
      if (key != nullptr) {
        queries.prefetch(next);
        key_sum.add_signs(grad_score[edge], queries.at(query, room), key);
      }
      if (g_.value) {
        grads.prefetch(next);
        value_sum.add_scaled(weight[edge], grads.at(query, room + kRowPitch));
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

// Forward: per block of queries, over blocks of keys, distances to scores to weights relative to
// the running maximum of their row, which multiply the values.
#pragma once

namespace attn::l1::ATTN_ISA {

// Keys and values of all heads as right operands.
template <class T>
struct PackedKeys : PanelPacker<T> {
  using PanelPacker<T>::heads;
  using PanelPacker<T>::padded;
  using PanelPacker<T>::rows_size;

  const Problem& p;
  Scratch<T> key_columns;  // of distances
  Scratch<T> value_rows;

  explicit PackedKeys(const Problem& problem, bool with_values = true)
      : PanelPacker<T>(problem),
        p(problem),
        key_columns(heads() * padded * p.D),
        value_rows(with_values ? heads() * rows_size(p.E) : 0) {
    this->for_each_panel([&](int64_t head, int64_t n, T* copies) {
      this->store_columns(key_columns.get(), head, n, this->read_rows(p.key, head, n, p.D, copies),
                          p.D);
      if (!with_values) return;
      this->store_rows(value_rows.get(), head, n, this->read_rows(p.value, head, n, p.E, copies),
                       p.E);
    });
  }

  const T* columns(const QueryBlock& q) const {
    return key_columns.get() + q.kv_head * padded * p.D;
  }
};

template <class T>
class Forward : SoftmaxRows<T> {
 public:
  Forward(const Problem& p, const ScoreParameters<T>& parameters, const PackedKeys<T>& keys)
      : SoftmaxRows<T>(p, parameters),
        p_(p),
        score_(p),
        keys_(keys),
        query_(query_block_rows(p) * kRowPitch) {}

  void run(const QueryBlock& q) {
    load_queries(query_.get(), p_, q);
    this->clear_rows(q);
    const T* values = keys_.value_rows.get() + q.kv_head * keys_.rows_size(p_.E);
    for_each_key_block<T>(q, [&](KeyBlock<T> keys) {
      for_each_tile(
          q, keys, query_.get(), keys_.columns(q), p_.D,
          [&](int64_t tile, int64_t n, Tile<T>& sums) ATTN_INLINE_LAMBDA {
            score_.of_tile(sums);
            store_tile(this->weights_.get() + tile * kTileRows * kRowPitch + n - keys.first, sums,
                       kRowPitch);
          },
          [](int64_t, int64_t) {});
      this->soften_rows(q, keys);
      this->multiply_values(q, keys, values, keys_.padded);
    });
    for (int64_t r = 0; r < q.rows; ++r) this->finish_row(q, r, double{this->row_max_[r]});
  }

 private:
  const Problem& p_;
  Score<T> score_;
  const PackedKeys<T>& keys_;
  Scratch<T> query_;
};

template <class T>
class FewQueries : public attn::ATTN_ISA::FewQueries<T, FewQueries<T>> {
  using Base = attn::ATTN_ISA::FewQueries<T, FewQueries<T>>;
  friend Base;

 public:
  FewQueries(const Problem& p, const ScoreParameters<T>& parameters)
      : Base(p, parameters), p_(p), score_(p) {}

 private:
  void load_query(T* target, int64_t batch, int64_t head, int64_t m) {
    load_padded(target, p_.query, batch, head, m, p_.D);
  }

  void score_key(int64_t kv_head, int64_t n) {
    const T* key = this->row(p_.key, kv_head, n, p_.D, this->copies_.get());
    for (int64_t r = 0; r < this->rows_; ++r) {
      this->scores_.get()[r * this->pitch_ + n] =
          score_.of(distance(this->query_.get() + r * kRowPitch, key, p_.D));
    }
  }

  const Problem& p_;
  Score<T> score_;
};

// worker(block) for all blocks of queries.
template <class MakeWorker>
void run_query_blocks(const Problem& p, const MakeWorker& make_worker) {
  const int64_t size = query_block_size(p);
  const int64_t blocks = (p.M + size - 1) / size;
  run_tasks(p.B * p.H * blocks, [&](TaskQueue& queue) {
    auto worker = make_worker();
    for (int64_t i; (i = queue.next()) >= 0;) {
      // The last queries of a causal head see the most keys: they go first.
      const int64_t block = blocks - 1 - i % blocks;
      const int64_t head = i / blocks;
      worker.run(QueryBlock(p, head / p.H, head % p.H, block * size, size));
    }
  });
}

template <class T>
void forward(const Problem& whole) {
  if (has_few_queries(whole)) {
    return run_few_queries<FewQueries<T>>(whole, whole, ScoreParameters<T>(whole));
  }
  const int64_t bytes_per_key = sizeof(T) * (whole.D + round_up(whole.E, kPanel<T>));
  for_each_slice(whole, whole.N * bytes_per_key, [&](const Slice& slice) {
    const Problem p = slice.of(whole);
    const ScoreParameters<T> parameters(p);
    const PackedKeys<T> keys(p);
    run_query_blocks(p, [&] { return Forward<T>(p, parameters, keys); });
  });
}

}  // namespace attn::l1::ATTN_ISA

// Scores [B,H,M,N] alone, and their backward: from the gradient of -scale * distance (any other
// factor is in that gradient) to sums of signs.
#pragma once

namespace attn::l1::ATTN_ISA {

template <class T>
class Scores {
 public:
  Scores(const Problem& p, const PackedKeys<T>& keys)
      : p_(p),
        score_(p),
        keys_(keys),
        query_(kQueryBlock * kRowPitch),
        scores_(kQueryBlock * kRowPitch) {}

  void run(const QueryBlock& q) {
    load_queries(query_.get(), p_, q);
    for_each_key_block<T>(q, [&](KeyBlock<T> keys) {
      for_each_tile(
          q, keys, query_.get(), keys_.columns(q), p_.D,
          [&](int64_t tile, int64_t n, Tile<T>& sums) ATTN_INLINE_LAMBDA {
            score_.of_tile(sums);
            store_tile(scores_.get() + tile * kTileRows * kRowPitch + n - keys.first, sums,
                       kRowPitch);
          },
          [](int64_t, int64_t) {});
      for (int64_t r = 0; r < q.rows; ++r) {
        const int64_t row = (q.batch * p_.H + q.head) * p_.M + q.first + r;
        store_row(p_.out, row * p_.N + keys.first, scores_.get() + r * kRowPitch,
                  std::min(keys.last, p_.N) - keys.first);
      }
    });
  }

 private:
  const Problem& p_;
  Score<T> score_;
  const PackedKeys<T>& keys_;
  Scratch<T> query_, scores_;
};

template <class T>
void scores(const Problem& whole) {
  for_each_slice(whole, whole.N * whole.D * sizeof(T), [&](const Slice& slice) {
    const Problem p = slice.of(whole);
    const PackedKeys<T> keys(p, /*with_values=*/false);
    run_query_blocks(p, [&] { return Scores<T>(p, keys); });
  });
}

template <class T>
class ScoresBackward {
 public:
  ScoresBackward(const Problem& p, const Gradients& grads, const PanelPacker<T>& packer,
                 const T* key_rows, const Partials<T>& partials)
      : p_(p),
        grads_(grads),
        packer_(packer),
        key_rows_(key_rows),
        signs_(p, grads, partials),
        query_(kQueryBlock * kRowPitch),
        grad_scores_(kQueryBlock * kRowPitch) {}

  void run(const QueryBlock& q, int64_t part) {
    load_queries(query_.get(), p_, q);
    signs_.clear(q);
    const T* key_rows = key_rows_ + q.kv_head * packer_.rows_size(p_.D);
    const int64_t* stride = grads_.grad_out.stride;
    for_each_key_block<T>(q, [&](KeyBlock<T> keys) {
      const int64_t count = std::min(keys.last, p_.N) - keys.first;
      for (int64_t r = 0; r < q.tiles * kTileRows; ++r) {
        T* row = grad_scores_.get() + r * kRowPitch;
        std::fill(row, row + count, T(0));
        if (r >= q.rows) continue;
        load_row(row, grads_.grad_out,
                 q.batch * stride[0] + q.head * stride[1] + (q.first + r) * stride[2] +
                     keys.first * stride[3],
                 stride[3], count);
      }
      signs_.add(q, keys, query_.get(), grad_scores_.get(), key_rows, packer_.padded, part);
    });
    signs_.store(q, static_cast<T>(p_.scale));
  }

 private:
  const Problem& p_;
  const Gradients& grads_;
  const PanelPacker<T>& packer_;
  const T* key_rows_;
  SignSums<T> signs_;
  Scratch<T> query_, grad_scores_;
};

template <class T>
void scores_backward(const Problem& whole, const Gradients& whole_grads) {
  const int64_t width = 2 * round_up(whole.D, kPanel<T>);
  for_each_slice(whole, whole.N * width * sizeof(T), [&](const Slice& slice) {
    const Problem p = slice.of(whole);
    const Gradients grads = slice.of(whole_grads, whole);
    const PanelPacker<T> packer(p);
    const Scratch<T> rows(packer.heads() * packer.rows_size(p.D));
    packer.for_each_panel([&](int64_t head, int64_t n, T* copies) {
      packer.store_rows(rows.get(), head, n, packer.read_rows(p.key, head, n, p.D, copies), p.D);
    });
    const Partials<T> partials(p, grads, /*want_keys=*/true);
    run_tasks(partials.schedule.tasks(), [&](TaskQueue& queue) {
      ScoresBackward<T> worker(p, grads, packer, rows.get(), partials);
      for (int64_t i; (i = queue.next()) >= 0;) run_backward_task(worker, partials, i);
    });
    finish_keys(p, grads, partials, static_cast<T>(p.scale));
  });
}

}  // namespace attn::l1::ATTN_ISA

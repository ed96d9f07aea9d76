// The end of the backward: sums over queries to the gradients of key, value and key_gain; and the
// schedule of it all.
#pragma once

namespace attn::cosine_sim::ATTN_ISA {

template <class T>
class FinishKeys {
 public:
  static constexpr int64_t kTask = 64;  // keys

  FinishKeys(const Problem& p, const Gradients& grads, const Parameters<T>& parameters,
             const Partials<T>& partials)
      : p_(p),
        grads_(grads),
        parameters_(parameters),
        partials_(partials),
        tasks_((p.N + kTask - 1) / kTask),
        gain_(grads.key_gain ? p.B * p.Hk * tasks_ * p.D : 0) {}

  void run() {
    run_tasks(p_.B * p_.Hk * tasks_, [&](TaskQueue& queue) {
      Scratch<T> rows(3 * kRowPitch);
      for (int64_t i; (i = queue.next()) >= 0;) {
        const int64_t end = std::min(i % tasks_ * kTask + kTask, p_.N);
        T* gain = grads_.key_gain ? gain_.get() + i * p_.D : nullptr;
        if (gain != nullptr) std::fill(gain, gain + p_.D, T(0));
        for (int64_t n = i % tasks_ * kTask; n < end; ++n) {
          if (grads_.value) partials_.finish_value(i / tasks_, n, rows.get());
          if (grads_.key || grads_.key_gain) finish_key(i / tasks_, n, rows.get(), gain);
        }
      }
    });
    partials_.add_up(grads_.key_gain, gain_.get(), p_.Hk, tasks_, p_.D, p_.D);
  }

 private:
  void finish_key(int64_t kv_head, int64_t n, T* grad, T* gain_sum) const {
    T* plain = grad + kRowPitch;
    partials_.add_parts(grad, partials_.key_sum(kv_head, 0), partials_.key_size, n, p_.D);
    load_padded(plain, p_.key, kv_head / p_.Hk, kv_head % p_.Hk, n, p_.D);
    if (!parameters_.key_gain.empty()) {
      T* normalized = plain + kRowPitch;
      std::copy(plain, plain + p_.D, normalized);
      normalize_row(normalized, p_.D, p_.groups);
      const T* gain = parameters_.key_gain.data() + kv_head % p_.Hk * p_.D;
      for (int64_t d = 0; d < p_.D; ++d) {
        if (gain_sum != nullptr) gain_sum[d] += grad[d] * normalized[d];
        grad[d] *= gain[d];
      }
    }
    if (!grads_.key) return;
    normalize_row_backward(grad, plain, p_.D, p_.groups);
    store_row(grads_.key, (kv_head * p_.N + n) * p_.D, grad, p_.D);
  }

  const Problem& p_;
  const Gradients& grads_;
  const Parameters<T>& parameters_;
  const Partials<T>& partials_;
  int64_t tasks_;
  Scratch<T> gain_;  // [B*Hk, tasks, D]
};

template <class T>
void backward(const Problem& p, const Gradients& grads) {
  const Parameters<T> parameters(p);
  const PackedKeys<T> keys(p, parameters, /*backward=*/true);
  const Partials<T> partials(p, grads, wanted(grads).key);
  const int64_t blocks = partials.schedule.blocks;
  const RowSums<T> row_sums(p, grads, blocks);
  run_tasks(partials.schedule.tasks(), [&](TaskQueue& queue) {
    Backward<T> worker(p, grads, parameters, keys, partials, row_sums);
    for (int64_t i; (i = queue.next()) >= 0;) run_backward_task(worker, partials, i);
  });
  partials.finish_parameters();
  partials.add_up(grads.head_scale, row_sums.scale.get(), p.H, blocks, 1, 1);
  partials.add_up(grads.query_gain, row_sums.gain.get(), p.H, blocks, p.D, p.D);
  FinishKeys<T>(p, grads, parameters, partials).run();
}

}  // namespace attn::cosine_sim::ATTN_ISA

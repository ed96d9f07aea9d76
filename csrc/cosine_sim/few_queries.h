// Forward for a handful of queries per key head: dot products with keys where they are.
#pragma once

namespace attn::cosine_sim::ATTN_ISA {

template <class T>
class FewQueries : public attn::ATTN_ISA::FewQueries<T, FewQueries<T>> {
  using Base = attn::ATTN_ISA::FewQueries<T, FewQueries<T>>;
  friend Base;
  using Base::copies_;
  using Base::pitch_;
  using Base::query_;
  using Base::row;
  using Base::rows_;
  using Base::scores_;

 public:
  FewQueries(const Problem& p, const Parameters<T>& parameters)
      : Base(p, parameters),
        p_(p),
        parameters_(parameters),
        simple_(p.groups <= 1 && !p.key_gain) {}

 private:
  void load_query(T* target, int64_t batch, int64_t head, int64_t m) {
    load_normalized(target, p_.query, batch, head, m, p_, parameters_.query_gain);
    for (int64_t d = 0; d < p_.D; ++d) target[d] *= parameters_.scale[head];
  }

  void score_key(int64_t kv_head, int64_t n) {
    const T* key = copies_.get();
    T factor = 1;
    if (simple_) {
      key = row(p_.key, kv_head, n, p_.D, copies_.get());
      if (p_.groups == 1) factor = inverse_norm(dot(key, key, p_.D));
    } else {
      load_normalized(copies_.get(), p_.key, kv_head / p_.Hk, kv_head % p_.Hk, n, p_,
                      parameters_.key_gain);
    }
    for (int64_t r = 0; r < rows_; ++r) {
      scores_.get()[r * pitch_ + n] = dot(query_.get() + r * kRowPitch, key, p_.D) * factor;
    }
  }

  const Problem& p_;
  const Parameters<T>& parameters_;
  bool simple_;
};

}  // namespace attn::cosine_sim::ATTN_ISA

// What is added to the scores of a row, and the end of a softmax.
#pragma once

namespace attn::ATTN_ISA {

constexpr double kLog2E = 1.4426950408889634;

template <class T>
struct ScoreParameters {
  std::vector<T> sink;           // [H]: -inf when absent
  std::vector<T> relative_bias;  // [H,M+N-1], empty when absent

  explicit ScoreParameters(const AttentionProblem& p)
      : sink(read_parameter<T>(p.sink, p.H, 1, -std::numeric_limits<T>::infinity())) {
    if (p.relative_bias && p.M + p.N > 0) {
      relative_bias = read_parameter<T>(p.relative_bias, p.H, p.M + p.N - 1, 0);
    }
  }
};

// row[i] = hidden where mask[i * stride] is false.
template <class T>
ATTN_INLINE void mask_row(T* row, const bool* mask, int64_t stride, int64_t count, T hidden) {
  constexpr int lanes = Simd<T>::lanes;
  typedef uint8_t Bytes __attribute__((vector_size(lanes)));
  int64_t i = 0;
  for (; stride == 1 && i + lanes <= count; i += lanes) {
    Bytes bytes;
    __builtin_memcpy(&bytes, mask + i, sizeof(bytes));
    const IVec<T> keep = __builtin_convertvector(bytes, IVec<T>) != 0;
    store<T>(row + i, keep ? load(row + i) : splat<T>(hidden));
  }
  for (; i < count; ++i) row[i] = mask[i * stride] ? row[i] : hidden;
}

template <class T>
void hide_masked(T* row, const AttentionProblem& p, const QueryBlock& q, int64_t query,
                 int64_t begin, int64_t end, T hidden) {
  const int64_t* stride = p.mask.stride;
  const bool* mask = static_cast<const bool*>(p.mask.data) + q.batch * stride[0] +
                     q.head * stride[1] + query * stride[2] + begin * stride[3];
  mask_row(row, mask, stride[3], end - begin, hidden);
}

// row[n] += what bias, relative bias and mask say about keys [begin, end) of one query;
// scratch has room for as many elements.
template <class T>
void add_extras(T* row, T* scratch, const AttentionProblem& p, const ScoreParameters<T>& parameters,
                const QueryBlock& q, int64_t query, int64_t begin, int64_t end) {
  const int64_t count = end - begin;
  if (p.bias) {
    const int64_t* stride = p.bias.stride;
    load_row(scratch, p.bias,
             q.batch * stride[0] + q.head * stride[1] + query * stride[2] + begin * stride[3],
             stride[3], count);
    for (int64_t i = 0; i < count; ++i) row[i] += scratch[i];
  }
  if (p.relative_bias) {
    const T* offsets =
        parameters.relative_bias.data() + q.head * (p.M + p.N - 1) + (begin - query + p.M - 1);
    for (int64_t i = 0; i < count; ++i) row[i] += offsets[i];
  }
  if (p.mask) {
    hide_masked(row, p, q, query, begin, end, -std::numeric_limits<T>::infinity());
  }
}

// The end of a row whose weights exp(score - shift) add up to sum: its lse, and what its
// accumulated values are multiplied with. A sink is one more weight without a value.
struct Total {
  double lse, factor;

  Total(double shift, double sum, double sink) {
    constexpr double hidden = -std::numeric_limits<double>::infinity();
    lse = sum > 0 ? shift + std::log(sum) : hidden;
    factor = sum > 0 ? 1 / sum : 0;
    if (sink == hidden) return;
    const double larger = std::max(lse, sink);
    const double with_sink = larger + std::log(std::exp(lse - larger) + std::exp(sink - larger));
    factor *= std::exp(lse - with_sink);
    lse = with_sink;
  }
};

}  // namespace attn::ATTN_ISA

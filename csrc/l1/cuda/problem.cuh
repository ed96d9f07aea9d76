// One call of attn::_l1_fwd, _l1_bwd or of the scores as the CUDA kernels see it: plain data that
// is passed by value. The law and the shapes are in attn_ops/l1/reference.py.
//
// B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width, E value width.
#pragma once

#include "common/cuda/device.cuh"

namespace attn::cuda::l1 {

// A borrowed tensor: data + sum(index * stride), strides in elements, 0 where it is broadcast.
struct Array {
  void* data;  // null: the optional tensor is absent
  int64_t stride[4];

  template <class T>
  ATTN_HOST_DEVICE const T* at(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    return static_cast<const T*>(data) + i * stride[0] + j * stride[1] + k * stride[2] +
           l * stride[3];
  }
};

struct Problem {
  int B, H, Hk, M, N, D, E;
  bool inverse;  // score = 1 / (eps + scale * distance), else -(scale * distance)
  float scale, eps;
  int64_t left, right;  // query m sees key n if p - left <= n <= p + right, p = m + N - M
  Array start, stop;    // int32 [1 or B, M]: and if start <= n < stop
  Array query, key, value;
  // Two neighbours of a row can be loaded as one word (16-bit types only).
  bool query_in_pairs, key_in_pairs, value_in_pairs;
  Array mask;  // bool [B,H,M,N]
  Array bias;  // [B,H,M,N], float or query's dtype
  bool bias_is_float;
  Array relative_bias;  // float [H,M+N-1]
  Array sink;           // float [H]
  Array out;            // [B,H,M,E], contiguous
  Array lse;            // float [B,H,M], contiguous
  // Parts of the largest |query|, |key| of every [b, key/value head] (prepass.cuh).
  float* largest;
  int largest_parts;

  // Anything but -(scale * distance) in the scores, and scales that do not order them by distance.
  bool has_extras() const {
    return mask.data || bias.data || relative_bias.data || inverse || !(scale > 0);
  }
};

struct Interval {
  int begin, end;
};

// The keys that query m sees, before element masks. An empty interval may lie anywhere in [0, N].
ATTN_DEVICE Interval visible_keys(const Problem& p, int b, int m) {
  const int64_t position = int64_t{m} + p.N - p.M;
  int64_t begin = position - p.left;
  int64_t end = position + p.right + 1;
  if (p.start.data) {
    const int64_t start = *p.start.at<int>(b, m);
    const int64_t stop = *p.stop.at<int>(b, m);
    begin = begin > start ? begin : start;
    end = end < stop ? end : stop;
  }
  begin = begin > 0 ? begin : 0;
  end = end > 0 ? end : 0;
  return {static_cast<int>(begin < p.N ? begin : p.N), static_cast<int>(end < p.N ? end : p.N)};
}

// What is added to the score of (m, n): biases, or -inf where the mask hides the key.
template <class T>
ATTN_DEVICE float added_to_score(const Problem& p, int b, int h, int m, int n) {
  if (p.mask.data && !*p.mask.at<bool>(b, h, m, n)) return -INFINITY;
  float sum = 0.0f;
  if (p.bias.data) {
    sum = p.bias_is_float ? *p.bias.at<float>(b, h, m, n) : to_float(*p.bias.at<T>(b, h, m, n));
  }
  if (p.relative_bias.data) sum += *p.relative_bias.at<float>(h, int64_t{n} - m + p.M - 1);
  return sum;
}

// The score of a distance before biases, rounded as the formula rounds it: no fused operations.
ATTN_DEVICE float score_of(const Problem& p, float distance) {
  const float scaled = multiply_rounded(p.scale, distance);
  return p.inverse ? 1.0f / add_rounded(p.eps, scaled) : -scaled;
}

}  // namespace attn::cuda::l1

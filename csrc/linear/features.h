// Feature maps and their derivatives: attn_ops/feature_maps.py on rows of the compute type.
#pragma once

namespace attn::linear::ATTN_ISA {

using namespace attn::ATTN_ISA;

// ln 2 in two parts, the first one short: its product with a small integer is exact.
template <class T>
constexpr T kLn2High = sizeof(T) == 8 ? T(0x1.62e42feep-1) : T(0x1.62e4p-1);
template <class T>
constexpr T kLn2Low = sizeof(T) == 8 ? T(0x1.a39ef35793c76p-33) : T(0x1.7f7d1cp-20);

// e^x for x <= 0, 0 where it is not a normal number.
template <class T>
ATTN_INLINE Vec<T> exponential(Vec<T> x) {
  const Vec<T> log2e = splat<T>(T(1.4426950408889634));
  const Vec<T> lowest = splat<T>(Simd<T>::min_exponent * kLn2High<T>);
  const Vec<T> magic = splat<T>(Simd<T>::round_magic);
  const Vec<T> clamped = maximum<T>(x, lowest);
  const Vec<T> rounded = clamped * log2e + magic;
  const Vec<T> whole = rounded - magic;
  const Vec<T> rest = (clamped - whole * splat<T>(kLn2High<T>)) - whole * splat<T>(kLn2Low<T>);
  const Vec<T> power = exp2_split<T>(rest * log2e, rounded);
  const Vec<T> flushed = x < lowest ? Vec<T>{} : power;
  return x == x ? flushed : x;
}

// log(1 + x) for 0 <= x <= 1, by the series of artanh: x / (2 + x) is at most 1/3.
template <class T>
ATTN_INLINE Vec<T> log_one_plus(Vec<T> x) {
  constexpr int terms = sizeof(T) == 8 ? 17 : 8;
  const Vec<T> z = x / (x + splat<T>(2));
  const Vec<T> square = z * z;
  Vec<T> sum = splat<T>(T(2) / T(2 * terms - 1));
#pragma GCC unroll 17
  for (int i = terms - 2; i >= 0; --i) sum = sum * square + splat<T>(T(2) / T(2 * i + 1));
  return sum * z;
}

template <class T>
ATTN_INLINE Vec<T> minus_magnitude(Vec<T> x) {
  return x > Vec<T>{} ? -x : x;
}

constexpr int kSoftplusLinear = 20;  // PyTorch's threshold: above it softplus(x) = x

struct EluPlusOne {
  template <class T>
  static ATTN_INLINE Vec<T> value(Vec<T> x) {
    return x > Vec<T>{} ? x + splat<T>(1) : exponential<T>(minus_magnitude<T>(x));
  }
  template <class T>
  static ATTN_INLINE Vec<T> slope(Vec<T> x) {
    return x > Vec<T>{} ? splat<T>(1) : exponential<T>(minus_magnitude<T>(x));
  }
};

struct Relu {
  template <class T>
  static ATTN_INLINE Vec<T> value(Vec<T> x) {
    return x < Vec<T>{} ? Vec<T>{} : x;
  }
  template <class T>
  static ATTN_INLINE Vec<T> slope(Vec<T> x) {
    return x > Vec<T>{} ? splat<T>(1) : Vec<T>{};
  }
};

struct Softplus {
  template <class T>
  static ATTN_INLINE Vec<T> value(Vec<T> x) {
    const Vec<T> correction = log_one_plus<T>(exponential<T>(minus_magnitude<T>(x)));
    const Vec<T> sum = (x > Vec<T>{} ? x : Vec<T>{}) + correction;
    return x > splat<T>(kSoftplusLinear) ? x : sum;
  }
  template <class T>
  static ATTN_INLINE Vec<T> slope(Vec<T> x) {
    const Vec<T> small = exponential<T>(minus_magnitude<T>(x));
    const Vec<T> one = splat<T>(1);
    const Vec<T> sigmoid = (x > Vec<T>{} ? one : small) / (one + small);
    return x > splat<T>(kSoftplusLinear) ? one : sigmoid;
  }
};

// row[d] = map(row[d]); the padding behind the row becomes zero again.
template <class Map, class T>
void map_row(T* row, int64_t width) {
  for (int64_t d = 0; d < width; d += Simd<T>::lanes) {
    store<T>(row + d, Map::template value<T>(load(row + d)));
  }
  for (int64_t d = width; d < round_up(width, Simd<T>::lanes); ++d) row[d] = 0;
}

// grad[d] *= map'(row[d])
template <class Map, class T>
void chain_row(T* grad, const T* row, int64_t width) {
  for (int64_t d = 0; d < width; d += Simd<T>::lanes) {
    store<T>(grad + d, load(grad + d) * Map::template slope<T>(load(row + d)));
  }
}

template <class T>
void map_row(FeatureMap map, T* row, int64_t width) {
  if (map == FeatureMap::elu_plus_one) map_row<EluPlusOne>(row, width);
  if (map == FeatureMap::relu) map_row<Relu>(row, width);
  if (map == FeatureMap::softplus) map_row<Softplus>(row, width);
}

template <class T>
void chain_row(FeatureMap map, T* grad, const T* row, int64_t width) {
  if (map == FeatureMap::elu_plus_one) chain_row<EluPlusOne>(grad, row, width);
  if (map == FeatureMap::relu) chain_row<Relu>(grad, row, width);
  if (map == FeatureMap::softplus) chain_row<Softplus>(grad, row, width);
}

// --- taylor: 1, u[i], then for every i the products u[i] u[j] with j >= i

// Features [begin, end) of one row.
struct Block {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

template <class T>
T taylor_scale(int64_t width) {
  return static_cast<T>(std::pow(static_cast<double>(width), -0.25));
}

// body(i, j, position): the products with i inside of the block run from position (in the block)
// on, from u[i] u[j] on.
template <class Body>
ATTN_INLINE void for_each_taylor_run(Block block, int64_t width, const Body& body) {
  int64_t first = 1 + width;
  for (int64_t i = 0; i < width && first < block.end; first += width - i, ++i) {
    const int64_t skipped = std::max<int64_t>(block.begin - first, 0);
    if (skipped < width - i) body(i, i + skipped, first + skipped - block.begin);
  }
}

// target[f - begin] = feature f of u, zeros behind. u is readable, and zero, one vector past its
// end; so is room behind the target.
template <class T>
void taylor_features(T* target, const T* u, int64_t width, Block block) {
  constexpr int lanes = Simd<T>::lanes;
  if (block.begin == 0) target[0] = 1;
  for (int64_t f = std::max<int64_t>(block.begin, 1); f < std::min(block.end, width + 1); ++f) {
    target[f - block.begin] = u[f - 1];
  }
  for_each_taylor_run(block, width, [&](int64_t i, int64_t j, int64_t at) ATTN_INLINE_LAMBDA {
    const Vec<T> factor = splat<T>(u[i]);
    T* row = target + at;
    // What is written past the run is written again by the next one.
    for (int64_t n = 0; n < std::min(width - j, block.size() - at); n += lanes) {
      store<T>(row + n, load(u + j + n) * factor);
    }
    if (j == i) row[0] *= T(0.7071067811865476);
  });
  for (int64_t f = block.size(); f < block.size() + lanes; ++f) target[f] = 0;
}

// grad_u += what the gradient of features in the block gives; grad is changed.
template <class T>
void chain_taylor(T* grad_u, T* grad, const T* u, int64_t width, Block block) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t f = block.size(); f < block.size() + lanes; ++f) grad[f] = 0;
  for (int64_t f = std::max<int64_t>(block.begin, 1); f < std::min(block.end, width + 1); ++f) {
    grad_u[f - 1] += grad[f - block.begin];
  }
  for_each_taylor_run(block, width, [&](int64_t i, int64_t j, int64_t at) ATTN_INLINE_LAMBDA {
    T* row = grad + at;
    if (j == i) row[0] *= T(0.7071067811865476);
    const Vec<T> factor = splat<T>(u[i]);
    Vec<T> sum{};
    for (int64_t n = 0; n < std::min(width - j, block.size() - at); n += lanes) {
      store<T>(grad_u + j + n, load(grad_u + j + n) + load(row + n) * factor);
      sum += load(row + n) * load(u + j + n);  // u is zero where the run has ended
    }
    grad_u[i] += horizontal_sum<T>(sum);
  });
}

}  // namespace attn::linear::ATTN_ISA

// Vectors of the instruction set that this translation unit is compiled for (see isa_begin.h).
// Everything is defined under the target pragma: functions that are only inlined into one would be
// lowered to SSE, ten times slower.
#pragma once

namespace attn::ATTN_ISA {

#define ATTN_INLINE inline __attribute__((always_inline))
#define ATTN_INLINE_LAMBDA __attribute__((always_inline))

// round_magic: adding it leaves round(x) in the low bits.
template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(ATTN_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(ATTN_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(ATTN_VECTOR_BYTES)));
  using Index = int32_t;
  static constexpr int lanes = ATTN_VECTOR_BYTES / 4;
  static constexpr int mantissa_bits = 23;
  static constexpr float round_magic = 0x1.8p23f;
  static constexpr float min_exponent = -126.0f;
  // Minimax on [-1/2, 1/2] with 2^0 = 1 exactly, relative error 9e-8.
  static constexpr int terms = 6;
  static constexpr float exp2_coefficients[terms] = {
      1.0f, 6.931469776e-1f, 2.402224209e-1f, 5.550733743e-2f, 9.671512643e-3f, 1.326472715e-3f};
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(ATTN_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(ATTN_VECTOR_BYTES)));
  typedef uint64_t Bits __attribute__((vector_size(ATTN_VECTOR_BYTES)));
  using Index = int64_t;
  static constexpr int lanes = ATTN_VECTOR_BYTES / 8;
  static constexpr int mantissa_bits = 52;
  static constexpr double round_magic = 0x1.8p52;
  static constexpr double min_exponent = -1022.0;
  // ln(2)^k / k!: the truncated series is exact to 4e-18 on [-1/2, 1/2].
  static constexpr int terms = 14;
  static constexpr double exp2_coefficients[terms] = {1.0,
                                                      6.93147180559945309417e-1,
                                                      2.40226506959100712334e-1,
                                                      5.55041086648215799532e-2,
                                                      9.61812910762847716198e-3,
                                                      1.33335581464284434234e-3,
                                                      1.54035303933816099544e-4,
                                                      1.52527338040598402800e-5,
                                                      1.32154867901443094884e-6,
                                                      1.01780860092396997275e-7,
                                                      7.05491162080112332987e-9,
                                                      4.44553827187081150760e-10,
                                                      2.56784359934882051420e-11,
                                                      1.36914888539041288809e-12};
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IVec = typename Simd<T>::I;

template <class T>
ATTN_INLINE Vec<T> load(const T* source) {
  Vec<T> v;
  __builtin_memcpy(&v, source, sizeof(v));
  return v;
}

template <class T>
ATTN_INLINE void store(T* target, Vec<T> v) {
  __builtin_memcpy(target, &v, sizeof(v));
}

template <class T>
ATTN_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // gcc broadcasts from memory for this spelling
}

// x, a number or a vector, rounded: the compiler does not see where it comes from, so a product
// does not become part of an FMA.
template <class V>
ATTN_INLINE V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <class T>
ATTN_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <int Down, class T, int... Lane>
ATTN_INLINE Vec<T> rotated(Vec<T> v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, ((Lane + Down) % Simd<T>::lanes)...);
}

// By halves of whole vectors: few operations, one after the other.
template <class T, int Half = Simd<T>::lanes / 2, class Combine>
ATTN_INLINE T reduced(Vec<T> v, const Combine& combine) {
  if constexpr (Half == 0) {
    return v[0];
  } else {
    v = combine(v, rotated<Half, T>(v, std::make_integer_sequence<int, Simd<T>::lanes>()));
    return reduced<T, Half / 2>(v, combine);
  }
}

template <class T>
ATTN_INLINE T horizontal_sum(Vec<T> v) {
  return reduced<T>(v, [](Vec<T> a, Vec<T> b) ATTN_INLINE_LAMBDA { return a + b; });
}

template <class T>
ATTN_INLINE T horizontal_max(Vec<T> v) {
  return reduced<T>(v, [](Vec<T> a, Vec<T> b) ATTN_INLINE_LAMBDA { return maximum<T>(a, b); });
}

template <class T>
ATTN_INLINE IVec<T> lane_index() {
  IVec<T> index{};
  for (int i = 0; i < Simd<T>::lanes; ++i) index[i] = i;
  return index;
}

// {a0, b0, a1, b1, ...} of the lower halves, of the upper halves.
template <class T, int First, int... Lane>
ATTN_INLINE Vec<T> interleave_from(Vec<T> a, Vec<T> b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (First + Lane / 2 + Lane % 2 * Simd<T>::lanes)...);
}

template <class T>
ATTN_INLINE Vec<T> interleave_low(Vec<T> a, Vec<T> b) {
  return interleave_from<T, 0>(a, b, std::make_integer_sequence<int, Simd<T>::lanes>());
}

template <class T>
ATTN_INLINE Vec<T> interleave_high(Vec<T> a, Vec<T> b) {
  constexpr int lanes = Simd<T>::lanes;
  return interleave_from<T, lanes / 2>(a, b, std::make_integer_sequence<int, lanes>());
}

// 2^(fraction + whole) for a fraction in [-1/2, 1/2]; rounded is whole + round_magic.
template <class T>
ATTN_INLINE Vec<T> exp2_split(Vec<T> fraction, Vec<T> rounded) {
  using S = Simd<T>;
  Vec<T> power = splat<T>(S::exp2_coefficients[S::terms - 1]);
#pragma GCC unroll 16
  for (int i = S::terms - 2; i >= 0; --i) {
    power = power * fraction + splat<T>(S::exp2_coefficients[i]);
  }
  using Bits = typename S::Bits;  // unsigned: wraps for scores that are hidden afterwards
  return (Vec<T>)((Bits)power + ((Bits)rounded << S::mantissa_bits));
}

// 2^(x - shift), where magic = round_magic - shift for an integer shift: the shift costs nothing,
// it rides in the bits that become the exponent. x - shift must stay above min_exponent.
template <class T>
ATTN_INLINE Vec<T> exp2_shifted(Vec<T> x, Vec<T> magic) {
  const Vec<T> rounded = x + magic;
  return exp2_split<T>(x - (rounded - magic), rounded);
}

// 2^x for x <= 0 (a little above is fine), exactly 0 where 2^x is not a normal number.
template <class T>
ATTN_INLINE Vec<T> exp2_flushed(Vec<T> x) {
  const Vec<T> lowest = splat<T>(Simd<T>::min_exponent);
  const Vec<T> power = exp2_shifted<T>(maximum<T>(x, lowest), splat<T>(Simd<T>::round_magic));
  return x < lowest ? Vec<T>{} : power;
}

template <class T>
ATTN_INLINE T dot(const T* a, const T* b, int64_t count) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum += load(a + i) * load(b + i);
  T tail = 0;
  for (; i < count; ++i) tail += a[i] * b[i];
  return horizontal_sum<T>(sum) + tail;
}

}  // namespace attn::ATTN_ISA

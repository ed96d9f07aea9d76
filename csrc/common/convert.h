// Rows of any dtype and stride in, rows of the compute type out, and back.
#pragma once

namespace attn::ATTN_ISA {

ATTN_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

ATTN_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// Storage types of 16 bits. Conversions have no branches, so that loops over them vectorise.
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

ATTN_INLINE double widen(double x) {
  return x;
}
ATTN_INLINE float widen(float x) {
  return x;
}
ATTN_INLINE float widen(Bfloat16 x) {
  return bits_to_float(uint32_t{x.bits} << 16);
}
ATTN_INLINE float widen(Half x) {
  const uint32_t word = uint32_t{x.bits} << 16;
  const uint32_t sign = word & 0x80000000u;
  const uint32_t magnitude = word + word;
  const float normal = bits_to_float((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = bits_to_float((magnitude >> 17) | (126u << 23)) - 0.5f;
  const uint32_t bits = magnitude < (1u << 27) ? float_to_bits(subnormal) : float_to_bits(normal);
  return bits_to_float(sign | bits);
}

ATTN_INLINE void narrow(double x, double& out) {
  out = x;
}
ATTN_INLINE void narrow(float x, float& out) {
  out = x;
}
ATTN_INLINE void narrow(float x, Bfloat16& out) {  // round to nearest even, NaN stays NaN
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
ATTN_INLINE void narrow(float x, Half& out) {
  const uint32_t word = float_to_bits(x);
  const uint32_t twice = word + word;
  const uint32_t bias = (twice & 0xFF000000u) < 0x71000000u ? 0x71000000u : twice & 0xFF000000u;
  // The two factors overflow what a half cannot hold to infinity; the sum rounds to nearest even.
  const float scaled = bits_to_float(word & 0x7FFFFFFFu) * 0x1.0p+112f * 0x1.0p-110f;
  const uint32_t sum = float_to_bits(bits_to_float((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  const uint32_t sign = (word >> 16) & 0x8000u;
  out.bits = static_cast<uint16_t>(sign | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

template <class Stored, class T>
ATTN_INLINE void load_stored(T* target, const Stored* source, int64_t stride, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i * stride]);
  }
}

// target[i] = element (offset + i * stride) of the view.
template <class T>
void load_row(T* target, const View& v, int64_t offset, int64_t stride, int64_t count) {
  if constexpr (sizeof(T) == 8) {
    load_stored(target, static_cast<const double*>(v.data) + offset, stride, count);
  } else if (v.dtype == ScalarType::Float) {
    load_stored(target, static_cast<const float*>(v.data) + offset, stride, count);
  } else if (v.dtype == ScalarType::BFloat16) {
    load_stored(target, static_cast<const Bfloat16*>(v.data) + offset, stride, count);
  } else {
    load_stored(target, static_cast<const Half*>(v.data) + offset, stride, count);
  }
}

template <class Stored, class T>
ATTN_INLINE void store_stored(Stored* target, const T* source, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(source[i], target[i]);
}

// Elements offset .. offset + count of a contiguous view = source.
template <class T>
void store_row(const View& v, int64_t offset, const T* source, int64_t count) {
  if constexpr (sizeof(T) == 8) {
    store_stored(static_cast<double*>(v.data) + offset, source, count);
  } else if (v.dtype == ScalarType::Float) {
    store_stored(static_cast<float*>(v.data) + offset, source, count);
  } else if (v.dtype == ScalarType::BFloat16) {
    store_stored(static_cast<Bfloat16*>(v.data) + offset, source, count);
  } else {
    store_stored(static_cast<Half*>(v.data) + offset, source, count);
  }
}

}  // namespace attn::ATTN_ISA

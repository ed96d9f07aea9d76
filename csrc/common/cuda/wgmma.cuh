// Products of a warpgroup: d (+)= a b, 64 x N, in float32. d[4j + e] of thread (g, t) is row
// g + 8 * (e / 2), column 8j + 2t + e % 2.
//
// Assembly has to name every register of d, so that each N is written out: operands after d are
// numbered from N / 2 on.
#pragma once

#include "common/cuda/device.cuh"

namespace attn::cuda {

// a 64 x 16 K-major in shared memory, b N x 16 K-major (keys in rows of D).
template <class T, int N>
ATTN_DEVICE void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
// a 16 x 64 and b 16 x N in shared memory, both with rows of k: M-major and N-major.
template <class T, int N>
ATTN_DEVICE void multiply_transposed(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
// a 64 x 16 in registers, b 16 x N in shared memory, N-major (values in rows of D).
template <class T, int N>
ATTN_DEVICE void multiply_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                    int accumulate);
// a 64 x 16 in registers, b N x 16 K-major.
template <class T, int N>
ATTN_DEVICE void multiply_held(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                               int accumulate);

#define ATTN_NAMES_32                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTN_NAMES_64                                                                            \
  ATTN_NAMES_32                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define ATTN_FLOATS_8(i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ATTN_FLOATS_32(i) \
  ATTN_FLOATS_8(i), ATTN_FLOATS_8(i + 8), ATTN_FLOATS_8(i + 16), ATTN_FLOATS_8(i + 24)
#define ATTN_FLOATS_64(i) ATTN_FLOATS_32(i), ATTN_FLOATS_32(i + 32)

// `operands`: a and b; `flag`: accumulate; `majors`: 1 for each operand in shared memory whose rows
// are of k.
#define ATTN_PRODUCT(type, N, count, operands, flag, majors, ...)                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag                              \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type \
               " {" ATTN_NAMES_##count "}, " operands ", p, 1, 1, " majors ";\n}\n"  \
               : ATTN_FLOATS_##count(0)                                              \
               : __VA_ARGS__, "l"(b), "r"(accumulate))

#define ATTN_PRODUCT_SHARED(name, T, type, N, count, operands, flag, majors)               \
  template <>                                                                              \
  ATTN_DEVICE void name<T, N>(float (&d)[count], uint64_t a, uint64_t b, int accumulate) { \
    ATTN_PRODUCT(type, N, count, operands, flag, majors, "l"(a));                          \
  }
#define ATTN_PRODUCT_REGISTERS(name, T, type, N, count, operands, flag, majors)           \
  template <>                                                                             \
  ATTN_DEVICE void name<T, N>(float (&d)[count], const uint32_t (&a)[4], uint64_t b,      \
                              int accumulate) {                                           \
    ATTN_PRODUCT(type, N, count, operands, flag, majors, "r"(a[0]), "r"(a[1]), "r"(a[2]), \
                 "r"(a[3]));                                                              \
  }

#define ATTN_PRODUCTS_64(T, type)                                                                 \
  ATTN_PRODUCT_SHARED(multiply_shared, T, type, 64, 32, "%32, %33", "%34", "0, 0")                \
  ATTN_PRODUCT_SHARED(multiply_transposed, T, type, 64, 32, "%32, %33", "%34", "1, 1")            \
  ATTN_PRODUCT_REGISTERS(multiply_registers, T, type, 64, 32, "{%32, %33, %34, %35}, %36", "%37", \
                         "1")
#define ATTN_PRODUCTS_128(T, type)                                                                 \
  ATTN_PRODUCT_SHARED(multiply_shared, T, type, 128, 64, "%64, %65", "%66", "0, 0")                \
  ATTN_PRODUCT_REGISTERS(multiply_registers, T, type, 128, 64, "{%64, %65, %66, %67}, %68", "%69", \
                         "1")                                                                      \
  ATTN_PRODUCT_REGISTERS(multiply_held, T, type, 128, 64, "{%64, %65, %66, %67}, %68", "%69", "0")

ATTN_PRODUCTS_64(BFloat, "bf16")
ATTN_PRODUCTS_64(Half, "f16")
ATTN_PRODUCTS_128(BFloat, "bf16")
ATTN_PRODUCTS_128(Half, "f16")

#undef ATTN_NAMES_32
#undef ATTN_NAMES_64
#undef ATTN_FLOATS_8
#undef ATTN_FLOATS_32
#undef ATTN_FLOATS_64
#undef ATTN_PRODUCT
#undef ATTN_PRODUCT_SHARED
#undef ATTN_PRODUCT_REGISTERS
#undef ATTN_PRODUCTS_64
#undef ATTN_PRODUCTS_128

}  // namespace attn::cuda

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

#define ATTN_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ATTN_NAMES_32 \
  ATTN_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTN_NAMES_40 \
  ATTN_NAMES_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ATTN_NAMES_48 \
  ATTN_NAMES_40       \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define ATTN_NAMES_56 \
  ATTN_NAMES_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ATTN_NAMES_64 \
  ATTN_NAMES_56       \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ATTN_NAMES_96                                                                       \
  ATTN_NAMES_64                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ATTN_NAMES_128                                                                       \
  ATTN_NAMES_96                                                                              \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "     \
  "%125, %126, %127"

#define ATTN_FLOATS_8(i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ATTN_FLOATS_16(i) ATTN_FLOATS_8(i), ATTN_FLOATS_8(i + 8)
#define ATTN_FLOATS_32(i) ATTN_FLOATS_16(i), ATTN_FLOATS_16(i + 16)
#define ATTN_FLOATS_40(i) ATTN_FLOATS_32(i), ATTN_FLOATS_8(i + 32)
#define ATTN_FLOATS_48(i) ATTN_FLOATS_32(i), ATTN_FLOATS_16(i + 32)
#define ATTN_FLOATS_56(i) ATTN_FLOATS_48(i), ATTN_FLOATS_8(i + 48)
#define ATTN_FLOATS_64(i) ATTN_FLOATS_32(i), ATTN_FLOATS_32(i + 32)
#define ATTN_FLOATS_96(i) ATTN_FLOATS_64(i), ATTN_FLOATS_32(i + 64)
#define ATTN_FLOATS_128(i) ATTN_FLOATS_64(i), ATTN_FLOATS_64(i + 64)

// `operands`: a and b; `flag`: accumulate; `majors`: 1 for each operand in shared memory whose rows
// are of k.
#define ATTN_PRODUCT(type, N, count, operands, flag, majors, ...)                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag                              \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type \
               " {" ATTN_NAMES_##count "}, " operands ", p, 1, 1, " majors ";\n}\n"  \
               : ATTN_FLOATS_##count(0)                                              \
               : __VA_ARGS__, "l"(b), "r"(accumulate))

#define ATTN_SHARED(name, T, type, N, count, majors, n0, n1, n2)                           \
  template <>                                                                              \
  ATTN_DEVICE void name<T, N>(float (&d)[count], uint64_t a, uint64_t b, int accumulate) { \
    ATTN_PRODUCT(type, N, count, "%" #n0 ", %" #n1, "%" #n2, majors, "l"(a));              \
  }
#define ATTN_REGISTERS(name, T, type, N, count, majors, n0, n1, n2, n3, n4, n5)              \
  template <>                                                                                \
  ATTN_DEVICE void name<T, N>(float (&d)[count], const uint32_t (&a)[4], uint64_t b,         \
                              int accumulate) {                                              \
    ATTN_PRODUCT(type, N, count, "{%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4, "%" #n5, \
                 majors, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));                        \
  }

#define ATTN_PRODUCTS(T, type)                                                        \
  ATTN_SHARED(multiply_shared, T, type, 64, 32, "0, 0", 32, 33, 34)                   \
  ATTN_SHARED(multiply_shared, T, type, 80, 40, "0, 0", 40, 41, 42)                   \
  ATTN_SHARED(multiply_shared, T, type, 96, 48, "0, 0", 48, 49, 50)                   \
  ATTN_SHARED(multiply_shared, T, type, 112, 56, "0, 0", 56, 57, 58)                  \
  ATTN_SHARED(multiply_shared, T, type, 128, 64, "0, 0", 64, 65, 66)                  \
  ATTN_SHARED(multiply_transposed, T, type, 32, 16, "1, 1", 16, 17, 18)               \
  ATTN_SHARED(multiply_transposed, T, type, 64, 32, "1, 1", 32, 33, 34)               \
  ATTN_REGISTERS(multiply_held, T, type, 128, 64, "0", 64, 65, 66, 67, 68, 69)        \
  ATTN_REGISTERS(multiply_registers, T, type, 32, 16, "1", 16, 17, 18, 19, 20, 21)    \
  ATTN_REGISTERS(multiply_registers, T, type, 64, 32, "1", 32, 33, 34, 35, 36, 37)    \
  ATTN_REGISTERS(multiply_registers, T, type, 80, 40, "1", 40, 41, 42, 43, 44, 45)    \
  ATTN_REGISTERS(multiply_registers, T, type, 96, 48, "1", 48, 49, 50, 51, 52, 53)    \
  ATTN_REGISTERS(multiply_registers, T, type, 128, 64, "1", 64, 65, 66, 67, 68, 69)   \
  ATTN_REGISTERS(multiply_registers, T, type, 192, 96, "1", 96, 97, 98, 99, 100, 101) \
  ATTN_REGISTERS(multiply_registers, T, type, 256, 128, "1", 128, 129, 130, 131, 132, 133)

ATTN_PRODUCTS(BFloat, "bf16")
ATTN_PRODUCTS(Half, "f16")

#undef ATTN_NAMES_16
#undef ATTN_NAMES_32
#undef ATTN_NAMES_40
#undef ATTN_NAMES_48
#undef ATTN_NAMES_56
#undef ATTN_NAMES_64
#undef ATTN_NAMES_96
#undef ATTN_NAMES_128
#undef ATTN_FLOATS_8
#undef ATTN_FLOATS_16
#undef ATTN_FLOATS_32
#undef ATTN_FLOATS_40
#undef ATTN_FLOATS_48
#undef ATTN_FLOATS_56
#undef ATTN_FLOATS_64
#undef ATTN_FLOATS_96
#undef ATTN_FLOATS_128
#undef ATTN_PRODUCT
#undef ATTN_SHARED
#undef ATTN_REGISTERS
#undef ATTN_PRODUCTS

}  // namespace attn::cuda
